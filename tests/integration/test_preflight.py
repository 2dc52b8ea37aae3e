"""The preflight command on real servers: no fault, two faults, an open cluster of two nodes."""

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from cluster import processes
from cluster.ports import pick_free
from data_pipelines import storage
from data_pipelines.build_shards import build_shards

pytestmark = [pytest.mark.s3, pytest.mark.ray]
ROOT = Path(__file__).parents[2]
SHARDS = "s3://efae-data/preflight-job"


@pytest.fixture(scope="module", autouse=True)
def shards(local_stack):
    build_shards("mnist", SHARDS, resolution=32, samples_per_shard=2500, held_out=64)


def preflight(*overrides, **environment):
    """Exit status, and the lines of the checks by their first word."""
    result = subprocess.run(
        [
            *(sys.executable, "jobs/preflight.py", "quickstart", "--data.channels=1"),
            *(f"--data.uri={SHARDS}/train", f"--data.held-out-uri={SHARDS}/held_out"),
            *overrides,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "Traceback" not in result.stderr, result.stderr
    lines = {"ok": [], "note": [], "FAIL": []}
    for line in result.stdout.splitlines():
        state, _, rest = line.partition(" ")
        if state in lines:
            lines[state].append(rest.strip())
    return result.returncode, lines, result


def test_all_is_well(local_stack):
    status, lines, result = preflight()
    assert status == 0, result.stdout + result.stderr
    assert [line.partition(":")[0] for line in lines["ok"]] == [
        *("configuration", "MLflow", "images", "held-out images", "storage", "cluster"),
        *("versions on 127.0.0.1", "clock on 127.0.0.1", "disk on 127.0.0.1"),
        *("shared memory on 127.0.0.1", "images on 127.0.0.1", "storage on 127.0.0.1"),
        *("MLflow on 127.0.0.1", "auth on 127.0.0.1"),
    ]
    assert not lines["FAIL"] + lines["note"]
    assert "all 14 checks passed" in result.stdout
    assert not [name for name in storage.list_files("s3://efae-runs/ray") if "preflight" in name]


def test_all_that_is_wrong_is_said_at_once(local_stack):
    mlflow = f"http://127.0.0.1:{pick_free(1)[0]}"
    status, lines, result = preflight(
        "--ray.storage-uri=s3://no-such-bucket/runs", MLFLOW_TRACKING_URI=mlflow
    )
    assert status == 1
    about_mlflow, about_storage = lines["FAIL"]
    assert mlflow in about_mlflow
    assert "MLFLOW_TRACKING_URI" in about_mlflow
    assert "create bucket 'no-such-bucket'" in about_storage
    assert "2 of 12 checks failed: MLflow; storage" in result.stderr


def start_node(folder, name, *options, **environment):
    """Starts `ray start`; the process that was started, and its log."""
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--block", *options),
        *("--min-worker-port=0", "--max-worker-port=0", "--num-cpus=2", "--disable-usage-stats"),
        f"--object-store-memory={100 * 2**20}",
        f"--dashboard-agent-listen-port={pick_free(1)[0]}",
        f"--temp-dir={folder}/{name}",
    ]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    log = Path(folder) / f"{name}.log"
    return processes.start(command, inherited | settings | environment, log), log


@pytest.fixture
def open_cluster(local_stack):
    """A head that asks for no token and a node with a wrong secret; their clients' variables."""
    gcs, dashboard, client, autoscaler, metrics = pick_free(5)
    # A short path, because Unix sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="efae-", ignore_cleanup_errors=True) as folder:
        started = []
        try:
            head, log = start_node(
                folder,
                "head",
                *("--head", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
                *(f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
                RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # stays on 127.0.0.1
                AUTOSCALER_METRIC_PORT=str(autoscaler),
                DASHBOARD_METRIC_PORT=str(metrics),
            )
            started.append(head)
            wait_until(lambda: answers(f"http://127.0.0.1:{dashboard}/api/jobs/"), log)
            # In capitals, because Ray replaces "localhost" by the host's outward address.
            node, log = start_node(
                folder,
                "node",
                *(f"--address=LOCALHOST:{gcs}", "--node-ip-address=127.0.0.2"),
                RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="1",
                AWS_SECRET_ACCESS_KEY="wrong",
            )
            started.append(node)
            wait_until(lambda: "Ray runtime started" in log.read_text(), log)
            yield {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
        finally:
            for process in reversed(started):
                processes.stop(process)


def wait_until(condition, log):
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def answers(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_an_open_cluster_and_a_node_without_access_are_refused(open_cluster):
    status, lines, result = preflight(**open_cluster)
    assert status == 1, result.stdout + result.stderr
    failed = {line.partition(": ")[0]: line for line in lines["FAIL"]}
    assert set(failed) == {"auth on 127.0.0.1", "images on 127.0.0.2", "storage on 127.0.0.2"}
    assert "RAY_AUTH_MODE=token" in failed["auth on 127.0.0.1"]
    for what in ("images", "storage"):
        assert "AWS_SECRET_ACCESS_KEY" in failed[f"{what} on 127.0.0.2"]
        assert f"{what} on 127.0.0.1" in lines["ok"]
    assert "wrong" not in result.stdout + result.stderr
    # The order of nodes is Ray's.
    shared = [line for line in lines["ok"] if "127.0.0.1" in line and "127.0.0.2" in line]
    assert len(shared) == 5, shared  # versions, clock, disk, shared memory, MLflow
