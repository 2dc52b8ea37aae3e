"""A small training job as users submit it, and its results in MLflow and storage."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.chaos.suite import SMALL_MODEL
from efae.checkpoints.checkpoint import checkpoint_name
from efae.checkpoints.events import read_events
from efae.checkpoints.run_folder import find_newest_checkpoint

ROOT = Path(__file__).parents[2]
SHARDS = "s3://efae-data/train-job"
STEPS, LOG_INTERVAL = 160, 10
LONG_STEPS = 600
"""Enough for what happens to a run in minutes."""
OPTIONS = [
    "quickstart",
    f"--data.uri={SHARDS}/train",
    f"--data.held-out-uri={SHARDS}/held_out",
    *SMALL_MODEL,
    f"--training.steps={STEPS}",
    "--training.global-batch-size=32",
    f"--training.log-interval={LOG_INTERVAL}",
    "--training.checkpoint-interval=40",
    f"--training.evaluation-interval={STEPS // 2}",
    "--training.held-out-images=16",
    "--tracking.no-portable",  # ten seconds a run; test_portable has its own
]


@dataclass(frozen=True)
class Job:
    """A submitted job that runs."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, timeout: float = 280) -> str:
        """Its output, when it has ended with status 0."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"runs for {timeout} s: {self.log.read_text()}") from None
        assert status == 0, self.log.read_text()
        return self.log.read_text()

    def wait_for(self, what: str, happened: Callable[[], Any], timeout: float = 150) -> Any:
        """The first true answer of `happened` while the job runs."""
        give_up_at = time.monotonic() + timeout
        while not (answer := happened()):
            assert self.process.poll() is None, f"ended before {what}: {self.log.read_text()}"
            assert time.monotonic() < give_up_at, f"no {what}: {self.log.read_text()}"
            time.sleep(0.2)
        return answer

    def wait_for_checkpoint(self, step: int) -> None:
        """Until the run has a checkpoint of `step` or later."""
        name = checkpoint_name(step)

        def find() -> bool:
            newest = find_newest_checkpoint(run_uri(self.name))
            return newest is not None and newest.rpartition("/")[2] >= name

        self.wait_for(f"checkpoint of step {step}", find)

    def wait_for_event(self, kind: str, count: int = 1) -> None:
        """Until the run has `count` events of this kind."""

        def find() -> bool:
            return sum(event.kind == kind for event in read_events(run_uri(self.name))) >= count

        self.wait_for(f"{count} events {kind!r}", find)


@contextmanager
def submitted(
    name: str,
    *options: str,
    inside: bool = True,
    job: str = "train",
    submission_id: str = "",
    folder: Path = ROOT,
) -> Iterator[Job]:
    """The job under this name of its run or sweep, ended with the block.

    Through `ray job submit` from `folder`, a checkout, or with its driver outside the cluster,
    where tests can be imported.
    """
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--working-dir", str(folder)]
    command += [f"--submission-id={submission_id}"] if submission_id else []
    command = [*([*command, "--", "python"] if inside else [sys.executable]), f"jobs/{job}.py"]
    names = {"train": "--tracking.run-name", "tune": "--sweep.name"}
    command += [*OPTIONS, *options, f"{names[job]}={name}"]
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                # The log is read while it grows.
                env={**os.environ, "PYTHONPATH": str(folder), "PYTHONUNBUFFERED": "1"},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Job(name, process, log)
        finally:
            process.kill()
            process.wait()


def run_job(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A job's program, run to its end as a driver outside the cluster."""
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


def run_uri(name: str) -> str:
    """Where the run's checkpoints and events are."""
    return f"s3://efae-runs/ray/{name}"


def find_run(name: str) -> Any:
    """The one MLflow run of this name."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("efae")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert len(runs) == 1
    return runs[0]


def read_summary(run: Any) -> dict[str, Any]:
    """The summary.json among the run's artifacts."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    path = client.download_artifacts(run.info.run_id, "report/summary.json")
    return json.loads(Path(path).read_text())


def read_curve(run: Any, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, in the order in which MLflow has them."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)]


def list_artifacts(run: Any, folder: str) -> set[str]:
    """Names of the run's artifacts in this folder."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, folder)}


def find_version(run: Any) -> Any:
    """The registered version that the run made; its tag "digest" is of the weights."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    versions = client.search_model_versions("name = 'efae'")
    return next(version for version in versions if version.run_id == run.info.run_id)
