"""Worker groups that are killed, or cannot be placed, on a cluster of two CPUs."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos.cluster import Cluster
from cluster import processes
from cluster.services import client_environment
from cluster.state import load
from efae.checkpoints.checkpoint import checkpoint_name
from efae.checkpoints.events import read_events
from efae.checkpoints.run_folder import find_newest_checkpoint
from tests.conftest import find_workers
from tests.integration.train_jobs import (
    OPTIONS,
    ROOT,
    STEPS,
    find_run,
    find_version,
    read_curve,
    run_job,
    run_uri,
    submitted,
)

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.timeout(600)]
LAST = checkpoint_name(STEPS)


def has_reserved(state):
    """Whether a placement group has its nodes."""
    request = urllib.request.Request(
        f"http://{state.host}:{state.ports['ray']}/api/v0/placement_groups",
        headers={"Authorization": f"Bearer {state.ray_token}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        groups = json.load(answer)["data"]["result"]["result"]
    return any(group["state"] == "CREATED" for group in groups)


@pytest.fixture(scope="module")
def battered_run(session_stack, local_stack, whole_run):
    """A run that loses its controller, then a worker, then S3 for a while; and its output."""

    def kill(title):
        process = find_workers(title, local_stack)[0]
        process.kill()
        psutil.wait_procs([process])

    with submitted("battered", "--ray.max-failures=2") as job:
        job.wait_for("placement group", lambda: has_reserved(load(session_stack.folder)))
        kill("TrainController")
        job.wait_for_checkpoint(40)
        kill("RayTrainWorker")
        job.wait_for_event("start", 2)
        assert find_newest_checkpoint(run_uri("battered")) < f"{run_uri('battered')}/{LAST}"
        processes.stop(load(session_stack.folder).processes["s3"], grace_seconds=0)
        try:
            time.sleep(5)
        finally:
            result = session_stack.run("up")
        assert result.returncode == 0, result.stdout + result.stderr
        job.wait()
    return find_run("battered")


def test_a_controller_that_dies_before_its_workers_begin_leaves_the_nodes_free(battered_run):
    lost, start = read_events(run_uri("battered"))[:2]
    assert (lost.kind, start.kind) == ("failure", "start")
    assert "Ray's controller was lost" in lost.facts["what"]
    assert start.facts["step"] == 0


def test_a_killed_worker_and_an_outage_of_s3_cost_time_and_nothing_else(battered_run, whole_run):
    kinds = [event.kind for event in read_events(run_uri("battered"))]
    assert kinds == ["failure", "start", "failure", "start"]
    assert find_version(battered_run).tags["digest"] == find_version(whole_run).tags["digest"]
    assert read_curve(battered_run, "loss") == read_curve(whole_run, "loss")


@pytest.fixture(scope="module")
def roomless_run(train_shards):
    """A run beside another job that holds a CPU; that job's id."""
    code = "import ray, time; ray.init(); "
    code += "ray.util.placement_group([{'CPU': 1}]).wait(60); print('held', flush=True); "
    code += "print(ray.get_runtime_context().get_job_id(), flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            lines = iter(other.stdout)
            next(line for line in lines if line == "held\n")
            job_id = next(lines).strip()
            options = ["--ray.placement-timeout-seconds=2", "--ray.max-failures=1"]
            result = run_job("train", *OPTIONS, *options, "--tracking.run-name=roomless")
        finally:
            other.kill()
    return result, job_id


def test_a_run_that_finds_no_room_says_who_holds_it_and_ends(roomless_run):
    result, job_id = roomless_run
    assert result.returncode == 1
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for what in (
        "2 workers need 2 CPUs",
        f"job {job_id} holds 1",
        "ray.max_failures=1",
        "2 starts",
    ):
        assert what in said
    assert [event.kind for event in read_events(run_uri("roomless"))] == ["standstill"]


RESERVE = """
import ray, sys
from ray.util import (
    get_placement_group, placement_group, placement_group_table, remove_placement_group
)
from efae.worker_groups import find_shortage, free_orphans

def reserve(name, lifetime=None):
    assert placement_group([{"memory": 1}], name=name, lifetime=lifetime).wait(60)

@ray.remote(num_cpus=0)
class Creator:
    def reserve(self, *arguments):
        reserve(*arguments)

job = sys.argv[1]
ray.init(log_to_driver=False)
reserve(f"{job}-driver")
living, dead = Creator.remote(), Creator.remote()
ray.get([living.reserve.remote(f"{job}-living"), dead.reserve.remote(f"{job}-dead")])
ray.get(dead.reserve.remote(f"{job}-detached", "detached"))
ray.kill(dead)
print("reserved", flush=True)
if input() == "free":
    free_orphans()
    _, holders = find_shortage({"memory": 2.0**60}, 1)
    assert ray.get_runtime_context().get_job_id() in holders
    table = placement_group_table().values()
    print("left", *(group["name"] for group in table if group["state"] == "CREATED"), flush=True)
    input()
remove_placement_group(get_placement_group(f"{job}-detached"))
"""


def test_only_what_dead_actors_of_the_same_job_reserved_is_freed(local_stack):
    def begin(name):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", RESERVE, name], cwd=ROOT, **pipes)

    with begin("other") as other, begin("mine") as mine:
        try:
            for driver in (other, mine):
                assert "reserved\n" in iter(driver.stdout.readline, "")
            print("free", file=mine.stdin, flush=True)
            left = next(line for line in mine.stdout if line.startswith("left"))
            for driver in (other, mine):
                driver.communicate("end\n", timeout=60)
                assert driver.returncode == 0
        finally:
            other.kill()
            mine.kill()
    kinds = {"driver", "living", "detached"}
    expected = {f"{job}-{kind}" for job in ("mine", "other") for kind in kinds}
    assert set(left.split()[1:]) == expected | {"other-dead"}


@pytest.fixture
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


@pytest.mark.slow
def test_an_elastic_group_that_loses_a_node_while_it_starts_goes_on_with_what_is_left(cluster):
    options = ["--ray.num-workers", "1", "2", "--ray.placement-timeout-seconds=5"]
    with submitted("shrunk", *options, "--training.steps=80") as job:
        job.wait_for("placement group", lambda: has_reserved(cluster.state))
        cluster.find("raylet")[0].kill()
        job.wait(timeout=200)
    starts = [event for event in read_events(run_uri("shrunk")) if event.kind == "start"]
    assert [event.facts["world_size"] for event in starts] == [1]
