"""The Grafana dashboard speaks of metrics that a cluster exported, the PodMonitor of its ports."""

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from cluster.dashboards.list_metrics import list_metrics, read_targets

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "cluster/dashboards"
DASHBOARD = json.loads((FOLDER / "training.json").read_text())
EXPORTED = {
    name: set(labels)
    for name, *labels in map(str.split, (FOLDER / "ray_metrics.txt").read_text().splitlines())
}
GPU_LABELS = EXPORTED["ray_node_cpu_count"] | {"GpuIndex", "GpuDeviceName"}
NO_METRIC = {"sum", "avg", "min", "max", "count", "by", "rate", "increase", "label_values"}


def find_gpu_metrics():
    """What Ray exports of GPUs, which no machine of ours has, from its source."""
    spec = importlib.util.find_spec("ray")
    source = Path(spec.origin).parent / "dashboard/modules/reporter/reporter_agent.py"
    names = re.findall(r'^    "(\w*(?:gpu|gram)\w*)": Gauge\(', source.read_text(), re.MULTILINE)
    return {f"ray_{name}": GPU_LABELS for name in names}


KNOWN = EXPORTED | find_gpu_metrics()


def list_targets():
    return [
        (panel["title"], target)
        for panel in DASHBOARD["panels"]
        if panel["type"] != "row"
        for target in panel["targets"]
    ]


def read_query(query):
    """(metric, labels that its selector names) pairs, and the labels of ``by``."""
    selected = [
        (name, set(re.findall(r"(\w+)\s*[=!]~?", matchers)))
        for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", query)
    ]
    groups = re.findall(r"\bby \(([^)]*)\)", query)
    return selected, {label.strip() for group in groups for label in group.split(",")}


@pytest.mark.parametrize(("title", "target"), list_targets())
def test_every_metric_and_label_was_exported(title, target):
    selected, groups = read_query(target["expr"])
    assert selected
    for name, labels in selected:
        assert name in KNOWN, f"{title}: Ray exports no {name}"
        assert labels | groups <= KNOWN[name], title
    # Nothing else in the query looks like a metric: one without a selector would go unchecked.
    rest = re.sub(r"\{[^}]*\}|by \([^)]*\)|\[1h\]", "", target["expr"])
    assert set(re.findall(r"[a-z_]\w*", rest)) <= NO_METRIC | {name for name, _ in selected}
    assert target["expr"].count("(") == target["expr"].count(")")
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == groups


def test_a_metric_that_is_not_exported_is_found():
    selected, _ = read_query('sum by (ip) (ray_node_gpus_utilisation{SessionName=~"$session"})')
    assert [name in KNOWN for name, _ in selected] == [False]


def test_it_is_a_dashboard():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    name, label = re.fullmatch(
        r"label_values\((\w+), (\w+)\)", variables["session"]["query"]
    ).groups()
    assert label in EXPORTED[name]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} == {"row", "timeseries"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels)))
    assert used == set(variables)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] == "timeseries":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references) > 0


def test_no_panel_lies_on_another():
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for one, other in itertools.combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y


def test_the_docs_name_metrics_that_exist():
    text = (ROOT / "docs/operating.md").read_text()
    named = set(re.findall(r"\bray_(?:node|placement|resources|actors|train_c)\w*", text))
    assert named
    assert named <= set(KNOWN)


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


def test_names_and_labels_are_read_from_what_a_process_exports(tmp_path):
    text = (
        "# HELP ray_a Of {braces} 1\n# TYPE ray_a gauge\n"
        'ray_a{Name="x, \\"y\\"",State="1"} 2.0\nray_a{Other=""} 0\nray_b 1e-3\n'
    )
    assert list_metrics(text) == {"ray_a": {"Name", "State", "Other"}, "ray_b": set()}
    discovery = tmp_path / "discovery.json"
    discovery.write_text('[{"labels": {"job": "ray"}, "targets": ["10.0.0.1:1", "10.0.0.2:2"]}]')
    assert read_targets(discovery) == ["10.0.0.1:1", "10.0.0.2:2"]
