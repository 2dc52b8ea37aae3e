"""Ray's autoscaler, with nodes on this host, on a cluster that starts without workers."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cluster import ports, processes
from cluster.services import client_environment
from cluster.serving import start, wait_until_ready
from cluster.state import load
from tests.conftest import ROOT
from tests.integration.train_jobs import OPTIONS

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.slow]
IDLE_SECONDS = 12
HEAD = f"{0:0>5}".rjust(56, "f")


@pytest.fixture
def cluster(session_stack, train_shards, monkeypatch):
    """A head without CPUs whose autoscaler may start two nodes of one CPU."""
    running = load(session_stack.folder)
    shared = {name: port for name, port in running.ports.items() if not name.startswith("ray")}
    taken = shared | {"ray.gcs": ports.pick_free(1)[0]}
    with tempfile.TemporaryDirectory(prefix="efae-", ignore_cleanup_errors=True) as folder:
        state = dataclasses.replace(running, folder=Path(folder), ports=taken, processes={})
        config = Path(folder) / "autoscaling.json"
        config.write_text(json.dumps(configure_autoscaler(f"{state.host}:{taken['ray.gcs']}")))
        settings = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        }
        start(state, "ray", ["--num-cpus=0", f"--autoscaling-config={config}"], settings)
        try:
            wait_until_ready(state, "ray")
            for name, value in client_environment(state).items():
                monkeypatch.setenv(name, value)
            yield
        finally:
            processes.stop(state.processes["ray"])


def configure_autoscaler(gcs):
    nodes = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "from-zero",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs,
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "auth": {},
        "max_workers": 2,
        "upscaling_speed": 10,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "available_node_types": {"ray.head.default": head, "worker": nodes},
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        **{name: [] for name in ("cluster_synced_files", "file_mounts_sync_continuously")},
        **{name: [] for name in ("initialization_commands", "setup_commands")},
        **{f"{role}_setup_commands": [] for role in ("head", "worker")},
        **{f"{role}_start_ray_commands": [] for role in ("head", "worker")},
    }


def preflight(*options):
    result = subprocess.run(
        [sys.executable, "jobs/preflight.py", *OPTIONS, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    return result.returncode, result.stdout + result.stderr


def count_nodes():
    code = "import ray; ray.init(); print('alive:', sum(node['Alive'] for node in ray.nodes()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(re.findall(r"^alive: (\d+)$", result.stdout, re.MULTILINE)[-1])


def test_nodes_are_asked_for_and_let_go(cluster):
    status, said = preflight()
    assert status == 1
    assert "the workers ask for 2 CPUs, but the cluster has 0" in said, said
    assert "--ray.autoscaling" in said
    status, said = preflight("--ray.autoscaling", "--ray.placement-timeout-seconds=90")
    assert status == 0, said
    assert "nodes: 3, CPUs: 2" in said
    give_up_at = time.monotonic() + 60
    while count_nodes() > 1:  # nothing asks for them any more
        assert time.monotonic() < give_up_at
        time.sleep(1)
    begin = time.monotonic()
    options = ["--ray.num-workers=3", "--ray.autoscaling", "--ray.placement-timeout-seconds=3"]
    status, said = preflight(*options)
    assert status == 1
    assert "the workers ask for 3 CPUs, but the cluster has" in said
    assert "ray status" in said
    assert time.monotonic() - begin > 3
