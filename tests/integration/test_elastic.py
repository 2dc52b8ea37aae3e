"""Runs whose nodes leave and join: 2 -> 1 -> 2 workers in mid-epoch, and 4 -> 2 without memory."""

import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos.audit import audit, read_attempts
from benchmarks.chaos.cluster import Cluster
from cluster.services import client_environment
from cluster.state import load
from data_pipelines import ShardDataset
from efae.checkpoints.events import read_events
from tests.integration.train_jobs import (
    LOG_INTERVAL,
    LONG_STEPS,
    SHARDS,
    find_run,
    read_curve,
    read_summary,
    run_uri,
    submitted,
)

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
NOTICE_SECONDS = 6


@contextlib.contextmanager
def nodes(session_stack, size):
    """A head without CPUs and `size` nodes, on the session's S3 and MLflow."""
    running = load(session_stack.folder)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="efae-") as name:
        patch.setenv("EFAE_RAY_HEAD_CPUS", "0")
        ports = {key: port for key, port in running.ports.items() if not key.startswith("ray")}
        state = dataclasses.replace(running, folder=Path(name), ports=ports, processes={})
        with Cluster(state, size=size) as cluster:
            for key, value in client_environment(state).items():
                patch.setenv(key, value)
            yield cluster


@pytest.fixture(scope="module")
def cluster(session_stack, long_run):
    with nodes(session_stack, size=2) as cluster:
        yield cluster


def give_notice(node):
    """What a cloud does before it takes a node back; returns the node's raylet."""
    raylet = find_raylet(node)
    (node_id,) = (a.split("=")[1] for a in raylet.cmdline() if a.startswith("--node_id="))
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "drain-node", f"--address={os.environ['RAY_ADDRESS']}", f"--node-id={node_id}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken back"]
    command += [f"--deadline-remaining-seconds={NOTICE_SECONDS}"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return raylet


def find_raylet(node):
    return next(p for p in psutil.Process(node.pid).children(recursive=True) if is_raylet(p))


def is_raylet(process):
    command = process.cmdline()
    return bool(command) and Path(command[0]).name == "raylet"


@pytest.fixture(scope="module")
def elastic_run(cluster, tmp_path_factory):
    log = tmp_path_factory.mktemp("samples")
    options = ["--ray.num-workers", "1", "2", "--ray.resize-interval-seconds=5"]
    options += ["--loss.perceptual=tests.integration.loss_terms:slow"]
    options += [f"--training.steps={LONG_STEPS}", f"--tracking.sample-log={log}"]
    with submitted("elastic", *options, inside=False) as job:
        job.wait_for_checkpoint(80)
        raylet = give_notice(cluster.nodes[0])
        job.wait_for_event("notice")
        time.sleep(NOTICE_SECONDS)
        with contextlib.suppress(psutil.NoSuchProcess):  # it may go by itself
            raylet.kill()
        job.wait_for_event("start", 2)
        cluster.start_node()
        job.wait_for_event("start", 3)
        job.wait()
    return find_run("elastic"), read_attempts(log)


def test_it_shrank_and_grew(elastic_run):
    run, attempts = elastic_run
    assert [attempt.world_size for attempt in attempts] == [2, 1, 2]
    starts = [e.facts["world_size"] for e in read_events(run_uri("elastic")) if e.kind == "start"]
    assert starts == [2, 1, 2]
    assert read_summary(run)["world_size"] == 2


def test_the_notice_left_checkpoints_just_in_time(elastic_run):
    """Every log interval from the notice on, so that less than two of them are done again."""
    _, attempts = elastic_run
    reached = max(step for steps in attempts[0].ranks.values() for step in steps)
    assert reached - attempts[1].first_step < 2 * LOG_INTERVAL


def test_no_sample_was_lost_or_repeated(elastic_run):
    _, attempts = elastic_run
    found = audit(attempts, ShardDataset.open(f"{SHARDS}/train").keys, LONG_STEPS, 32)
    assert found.pop("steps_done_again") > 0
    assert set(found.values()) == {0}, found


def test_the_loss_is_that_of_the_undisturbed_run(elastic_run, long_run):
    """Up to the noise that is drawn: by rank, of which there was one for a while."""
    losses, expected = (dict(read_curve(run, "loss")) for run in (elastic_run[0], long_run))
    assert (
        sorted(losses)
        == sorted(expected)
        == list(range(LOG_INTERVAL, LONG_STEPS + 1, LOG_INTERVAL))
    )
    ratios = [losses[step] / expected[step] for step in expected]
    assert 0.97 < statistics.mean(ratios) < 1.03
    assert abs(read_summary(elastic_run[0])["psnr"] - read_summary(long_run)["psnr"]) < 0.5


def test_a_shrunken_run_that_is_out_of_memory_halves_its_micro_batch(
    session_stack, train_shards, tmp_path
):
    """32 images: 8 for each of four workers, 16 for each of two, whose memory is enough for 8."""
    options = ["--ray.num-workers", "2", "4", "--ray.resize-interval-seconds=600"]
    options += ["--loss.perceptual=tests.integration.loss_terms:hungry"]
    options += ["--ray.max-failures=6", f"--tracking.sample-log={tmp_path}"]
    with nodes(session_stack, 4) as cluster, submitted("hungry", *options, inside=False) as job:
        job.wait_for_checkpoint(40)
        for node in cluster.nodes[:2]:
            find_raylet(node).kill()
        job.wait_for_event("memory")
        job.wait()
    events = read_events(run_uri("hungry"))
    sizes = {e.facts["micro_batch_size"] for e in events if e.kind == "memory"}
    starts = [e.facts["world_size"] for e in events if e.kind == "start"]
    assert sizes == {16}
    assert starts[0] == 4
    assert starts[-1] == 2
    assert "with at most 8 images per forward pass" in str(events[-1])
    found = audit(read_attempts(tmp_path), ShardDataset.open(f"{SHARDS}/train").keys, 160, 32)
    found.pop("steps_done_again")
    assert set(found.values()) == {0}, found
