"""The preflight command on real servers: all well, two things wrong, a cluster left open."""

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


@pytest.fixture
def open_cluster(local_stack):
    """A head node that asks for no token; the variables of its clients."""
    gcs, dashboard, agent, client, *metrics = map(str, pick_free(6))
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        *("--min-worker-port=0", "--max-worker-port=0", "--num-cpus=2", "--disable-usage-stats"),
        f"--object-store-memory={100 * 2**20}",
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment |= dict(
        zip(("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"), metrics, strict=True)
    )
    del environment["RAY_ADDRESS"], environment["RAY_API_SERVER_ADDRESS"]
    # A short path, because Unix sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="efae-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        head = processes.start([*command, f"--temp-dir={folder}"], environment, log)
        try:
            deadline = time.monotonic() + 90
            while not answers(f"http://127.0.0.1:{dashboard}/api/jobs/"):
                assert processes.is_running(head), log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield variables
        finally:
            processes.stop(head)


def answers(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_a_cluster_that_anyone_may_use_is_refused(open_cluster):
    status, lines, result = preflight(**open_cluster)
    assert status == 1, result.stdout + result.stderr
    (auth,) = lines["FAIL"]
    assert auth.startswith("auth on 127.0.0.1: whoever reaches http://127.0.0.1:")
    assert "RAY_AUTH_MODE=token" in auth
    assert len(lines["ok"]) == 13
