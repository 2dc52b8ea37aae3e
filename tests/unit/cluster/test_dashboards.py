"""The Grafana dashboard can be imported, and the PodMonitor asks for ports that pods have."""

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "cluster/dashboards"
DASHBOARD = json.loads((FOLDER / "training.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_every_panel_has_its_source_and_identifiers():
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers) > 0
    for panel in PANELS:
        assert panel["type"] == "timeseries"
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0


def test_every_variable_is_defined_and_used():
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert defined == set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS)))


def test_every_query_is_about_the_session_and_names_its_curves():
    for target in (target for panel in PANELS for target in panel["targets"]):
        query = target["expr"]
        selectors = re.findall(r"\bray_\w+(?:\{([^}]*)\})", query)
        assert selectors
        assert all('SessionName=~"$session"' in selector for selector in selectors)
        assert query.count("(") == query.count(")")
        groups = re.findall(r"\bby \(([^)]*)\)", query)
        named = {label.strip() for group in groups for label in group.split(",")}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == named


def test_the_pod_monitor_asks_for_a_port_that_ray_pods_have():
    monitor = yaml.safe_load((FOLDER / "pod-monitor.yaml").read_text())
    assert monitor["kind"] == "PodMonitor"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    cluster = yaml.safe_load((ROOT / "cluster/kuberay/base/cluster.yaml").read_text())["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert endpoint["port"] in {port["name"] for port in ports}
    policies = list(yaml.safe_load_all((ROOT / "cluster/kuberay/base/network.yaml").read_text()))
    (policy,) = (p for p in policies if p["metadata"]["name"] == "efae-metrics")
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"]
