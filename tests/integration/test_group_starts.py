"""Groups of workers that are killed while they start, or find no room, on a cluster of two CPUs."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos.cluster import Cluster
from cluster.services import client_environment
from cluster.state import load
from efae.artifacts.run_events import read_events
from tests.integration.train_jobs import (
    OPTIONS,
    find_run,
    find_version,
    run_job,
    run_uri,
    submitted,
)

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(session_stack, train_shards):
    """A head without CPUs and two nodes, on the session's S3 and MLflow: two workers fill it."""
    running = load(session_stack.folder)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="efae-") as name:
        patch.setenv("EFAE_RAY_HEAD_CPUS", "0")
        ports = {key: port for key, port in running.ports.items() if not key.startswith("ray")}
        state = dataclasses.replace(running, folder=Path(name), ports=ports, processes={})
        with Cluster(state, size=2) as cluster:
            for key, value in client_environment(state).items():
                patch.setenv(key, value)
            yield cluster


def has_reserved(cluster):
    """Whether a placement group has its nodes."""
    state = cluster.state
    request = urllib.request.Request(
        f"http://{state.host}:{state.ports['ray']}/api/v0/placement_groups",
        headers={"Authorization": f"Bearer {state.ray_token}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        groups = json.load(answer)["data"]["result"]["result"]
    return any(group["state"] == "CREATED" for group in groups)


def kill(cluster, kind):
    (process,) = cluster.find(kind)
    process.kill()
    psutil.wait_procs([process])


def test_a_controller_that_dies_before_its_workers_begin_leaves_the_nodes_free(whole_run, cluster):
    with submitted("unborn", "--ray.max-failures=1") as job:
        job.wait_for("placement group", lambda: has_reserved(cluster))
        kill(cluster, "controller")
        job.wait(timeout=120)
    kinds = [event.kind for event in read_events(run_uri("unborn"))]
    assert kinds == ["failure", "start"]
    assert find_version(find_run("unborn")).tags["digest"] == find_version(whole_run).tags["digest"]


def test_a_run_that_finds_no_room_says_who_holds_it_and_ends(cluster):
    code = "import ray, time; ray.init(); "
    code += "ray.util.placement_group([{'CPU': 1}]).wait(60); print('held', flush=True); "
    code += "print(ray.get_runtime_context().get_job_id(), flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            lines = iter(other.stdout)
            next(line for line in lines if line == "held\n")
            job_id = next(lines).strip()
            options = ["--ray.placement-timeout-seconds=3", "--ray.max-failures=2"]
            result = run_job("train", *OPTIONS, *options, "--tracking.run-name=roomless")
        finally:
            other.kill()
    assert result.returncode == 1
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for what in (
        "2 workers need 2 CPUs",
        f"job {job_id} holds 1",
        "ray.max_failures=2",
        "3 starts",
    ):
        assert what in said
    assert [event.kind for event in read_events(run_uri("roomless"))] == ["standstill"]


@pytest.mark.slow
def test_an_elastic_group_that_loses_a_node_while_it_starts_goes_on_with_what_is_left(cluster):
    options = ["--ray.num-workers", "1", "2", "--ray.placement-timeout-seconds=5"]
    with submitted("shrunk", *options, "--training.steps=80") as job:
        job.wait_for("placement group", lambda: has_reserved(cluster))
        cluster.find("raylet")[0].kill()
        job.wait(timeout=200)
    starts = [event for event in read_events(run_uri("shrunk")) if event.kind == "start"]
    assert [event.facts["world_size"] for event in starts] == [1]
