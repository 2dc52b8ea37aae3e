"""Unreachable servers and a stalled worker in one run, which waits and loses nothing."""

import signal
import time

import pytest

from cluster import processes
from cluster.state import load
from tests.conftest import find_workers
from tests.integration.train_jobs import (
    LOG_INTERVAL,
    LONG_STEPS,
    find_run,
    find_version,
    read_curve,
    read_summary,
    submitted,
)

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def end_servers(stack, *names):
    """SIGKILL, at once."""
    for name in names:
        processes.stop(load(stack.folder).processes[name], grace_seconds=0)


def start_servers(stack):
    result = stack.run("up")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def disturbed_run(session_stack, local_stack, long_run):
    with submitted("disturbed", f"--training.steps={LONG_STEPS}") as job:
        try:
            job.wait_for_checkpoint(80)
            end_servers(session_stack, "s3", "mlflow")
            time.sleep(15)
            start_servers(session_stack)
            stalled = find_workers("RayTrainWorker", local_stack)[0]
            stalled.send_signal(signal.SIGSTOP)
            time.sleep(5)
            stalled.send_signal(signal.SIGCONT)
            job.wait_for_checkpoint(240)
            end_servers(session_stack, "mlflow")
            job.wait_for("wait for MLflow", lambda: "waiting for MLflow" in job.log.read_text())
        finally:
            start_servers(session_stack)
        job.wait()
    return find_run("disturbed")


def test_nothing_is_lost_or_done_again(disturbed_run, long_run):
    summary = read_summary(disturbed_run)
    assert summary["recoveries"] == 0
    assert disturbed_run.info.status == "FINISHED"
    assert find_version(disturbed_run).tags["digest"] == find_version(long_run).tags["digest"]


def test_the_summary_says_what_happened(disturbed_run):
    events = read_summary(disturbed_run)["events"]
    assert any("MLflow was unreachable" in line for line in events), events


def test_curves_arrive_later_once_and_in_order(disturbed_run, long_run):
    for name in ("loss", "gradient_norm"):
        curve = read_curve(disturbed_run, name)
        assert [step for step, _ in curve] == list(
            range(LOG_INTERVAL, LONG_STEPS + 1, LOG_INTERVAL)
        )
        assert curve == read_curve(long_run, name)


def test_a_run_of_more_than_ten_seconds_has_system_metrics(disturbed_run):
    assert any(name.startswith("system/") for name in disturbed_run.data.metrics)
