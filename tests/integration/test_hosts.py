"""Three hosts with their own addresses: jobs from outside with the token, an unreachable host."""

import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from data_pipelines.verify_shards import find_faults
from efae.checkpoints.events import read_events
from tests.conftest import ROOT
from tests.integration.hosts import HostCluster, Network, find_obstacle
from tests.integration.train_jobs import (
    SHARDS,
    find_run,
    find_version,
    read_summary,
    run_uri,
    submitted,
)

OBSTACLE = find_obstacle()
pytestmark = [
    pytest.mark.s3,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # Several nodes on the addresses of one host are in test_elastic.
    pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE),
]
RAY = str(Path(sys.executable).with_name("ray"))
STEPS = 200


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs and two hosts of one CPU; the tests' own process is outside."""
    with (
        tempfile.TemporaryDirectory(prefix="efae-") as folder,
        Network(3) as network,
        HostCluster(network, Path(folder)) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        build_shards("mnist", SHARDS, resolution=32, samples_per_shard=500, held_out=64)
        yield cluster


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that holds what git has, and nothing else."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def run(cluster, checkout):
    """Of a worker on either host, one of which was cut off for a while."""
    options = [f"--training.steps={STEPS}", f"--training.evaluation-interval={STEPS}"]
    with submitted("over-hosts", *options, "--ray.num-workers=2", folder=checkout) as job:
        job.wait_for_checkpoint(40)
        cluster.network.cut(2)
        job.wait_for_event("failure")
        cluster.bring_back(2)
        job.wait()
    return find_run("over-hosts")


def ask(cluster, path, token=None, body=None):
    """Status of the dashboard's answer to somebody outside the cluster."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(cluster.environment["RAY_ADDRESS"] + path, body, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("body", [None, b'{"entrypoint": "true"}'], ids=["list", "submit"])
def test_nothing_is_answered_without_the_token(cluster, body):
    token = cluster.state.ray_token
    assert ask(cluster, "/api/jobs/", token) == 200
    assert ask(cluster, "/api/jobs/", None, body) == 401
    assert ask(cluster, "/api/jobs/", token[::-1], body) in (401, 403)


def test_no_job_is_taken_without_the_token(cluster, checkout, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray looks for a token too
    command = [RAY, "job", "submit", "--working-dir", ".", "--submission-id=stranger"]
    command += ["--", "python", "jobs/train.py", "quickstart"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert result.returncode
    assert "token" in result.stdout + result.stderr
    assert ask(cluster, "/api/jobs/stranger", cluster.state.ray_token) == 404


def test_a_run_outlives_a_host_that_is_cut_off(cluster, run):
    summary = read_summary(run)
    assert (summary["steps"], summary["world_size"]) == (STEPS, 2)
    assert summary["recoveries"] == 1
    assert run.info.status == "FINISHED"
    events = read_events(run_uri("over-hosts"))
    # The worker that was cut off may have noted that its storage was out of reach.
    told = [event for event in events if event.kind != "outage"]
    assert [event.kind for event in told] == ["start", "failure", "start"]
    assert f" on {cluster.network.address(2)} was lost" in told[1].facts["what"]
    assert events[-1].facts["world_size"] == 2
    assert events[-1].facts["step"] >= 40
    for host in (1, 2):  # either read shards for itself
        assert list(cluster.disk(host).rglob("*.chunk"))


def test_a_sweep_runs_on_all_hosts(cluster, checkout):
    options = [
        *("--training.steps=40", "--training.evaluation-interval=20"),
        *("--training.checkpoint-interval=20", "--training.held-out-images=16"),
        *("--training.validation-images=16", "--optimizer.warmup-steps=5"),
        *("--sweep.trials=2", "--sweep.finalists=0", "--sweep.finalist-seeds=0"),
        *("--sweep.no-early-stopping", "--ray.num-workers=1"),
    ]
    with submitted("hosts-sweep", *options, job="tune", folder=checkout) as job:
        job.wait()
    sweep = find_run("hosts-sweep")
    assert sweep.info.status == "FINISHED"
    client = MlflowClient(cluster.environment["MLFLOW_TRACKING_URI"])
    children = f"tags.mlflow.parentRunId = '{sweep.info.run_id}'"
    trials = [run.info for run in client.search_runs([sweep.info.experiment_id], children)]
    assert [trial.status for trial in trials] == ["FINISHED"] * 2
    # Each takes the one CPU of a host: at the same time they were on different ones.
    assert max(t.start_time for t in trials) < min(t.end_time for t in trials)


def test_latents_are_written_from_all_hosts(cluster, run, checkout):
    for host in (1, 2):
        for chunk in cluster.disk(host).rglob("*.chunk"):
            chunk.unlink()
    output = "s3://efae-data/over-hosts"
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "jobs/encode.py"]
    command += [f"--model=models:/efae/{find_version(run).version}"]
    # Slow enough for the second actor to come before the first has done everything.
    command += [f"--data={SHARDS}/train", f"--output={output}", "--batch-size=2"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(find_faults(output)) == []
    assert len(ShardDataset.open(output)) == len(ShardDataset.open(f"{SHARDS}/train"))
    for host in (1, 2):  # either read shards for itself
        assert list(cluster.disk(host).rglob("*.chunk"))
