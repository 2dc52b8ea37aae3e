"""The main job on real servers: two workers, one of them killed, to a registered model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_pipelines.build_shards import build_shards
from efae.artifacts.checkpoint import checkpoint_name
from efae.artifacts.run_checkpoints import find_newest_checkpoint
from tests.conftest import find_workers

pytestmark = [pytest.mark.s3, pytest.mark.ray]
ROOT = Path(__file__).parents[2]
SHARDS = "s3://efae-data/train-job"
OPTIONS = [
    "quickstart",
    f"--data.uri={SHARDS}/train",
    f"--data.held-out-uri={SHARDS}/held_out",
    "--data.channels=1",
    "--data.decode-threads=1",
    "--representation.dim=12",
    "--representation.rotation-dims=4",
    "--model.hidden-size=64",
    "--model.num-heads=2",
    "--model.encoder-hidden-size=64",
    "--model.depth=2",
    "--training.steps=600",
    "--training.global-batch-size=32",
    "--training.log-interval=10",
    "--training.checkpoint-interval=40",
    "--training.evaluation-interval=300",
    "--training.held-out-images=64",
]


@pytest.fixture(scope="module")
def shards(local_stack):
    build_shards("mnist", SHARDS, resolution=32, samples_per_shard=500, held_out=64)


def run_job(name, *arguments, **environment):
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


def kill_a_worker_after(step, job, environment):
    """SIGKILL one worker once the run has a checkpoint of `step` or later."""
    newest = None
    while newest is None or newest < checkpoint_name(step):
        assert job.poll() is None, "the job ended before a worker could be killed"
        time.sleep(0.2)
        found = find_newest_checkpoint("s3://efae-runs/ray/killed")
        newest = found and found.rpartition("/")[2]
    find_workers("RayTrainWorker", environment)[0].send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def killed_run(local_stack, shards, tmp_path_factory):
    log = tmp_path_factory.mktemp("killed") / "log"
    command = [
        *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", str(ROOT)),
        *("--", "python", "jobs/train.py", *OPTIONS, "--tracking.run-name=killed"),
    ]
    with log.open("w") as output:
        job = subprocess.Popen(
            command, env=os.environ, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            kill_a_worker_after(80, job, local_stack)
            status = job.wait(timeout=280)
        finally:
            job.kill()
            job.wait()
    assert status == 0, log.read_text()
    return find_run("killed"), log.read_text()


@pytest.fixture(scope="module")
def whole_run(local_stack, shards):
    result = run_job("train", *OPTIONS, "--tracking.run-name=whole")
    assert result.returncode == 0, result.stdout + result.stderr
    return find_run("whole")


def find_run(name):
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("efae")
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert len(runs) == 1
    return runs[0]


def read_summary(run):
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return json.loads(
        Path(client.download_artifacts(run.info.run_id, "report/summary.json")).read_text()
    )


def list_artifacts(run, folder):
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, folder)}


def find_version(run):
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return next(
        v for v in client.search_model_versions("name = 'efae'") if v.run_id == run.info.run_id
    )


def test_a_killed_worker_costs_a_recovery_and_nothing_else(killed_run, whole_run):
    run, output = killed_run
    assert run.info.status == "FINISHED"
    assert "recoveries: 1" in output
    summary, whole = read_summary(run), read_summary(whole_run)
    assert summary["recoveries"] == 1
    assert whole["recoveries"] == 0
    assert summary["psnr"] == whole["psnr"]
    assert find_version(run).tags["digest"] == find_version(whole_run).tags["digest"]


def test_one_run_without_duplicate_steps(killed_run):
    run, _ = killed_run
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    for name in ("loss", "images_per_second", "loss_by_t/0.5", "gradient_norm"):
        steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
        assert steps == sorted(set(steps)), name
        assert set(steps) <= set(range(10, 601, 10))
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in losses] == list(range(10, 601, 10))
    assert losses[-1].value < 0.5 * losses[0].value
    assert any(name.startswith("system/") for name in run.data.metrics)
    assert run.data.params["model.level"] == "exact"
    assert {"step-00000300.png", "step-00000600.png"} <= list_artifacts(run, "reconstructions")
    assert {"report.html", "summary.json", "orbit.png"} <= list_artifacts(run, "report")


def test_summary_says_what_the_contract_lists(whole_run):
    summary = read_summary(whole_run)
    assert summary["steps"] == 600
    assert summary["images_seen"] == 600 * 32
    assert summary["world_size"] == 2
    assert summary["device"] == "cpu"
    assert summary["precision"] == "fp32"
    assert summary["model_uri"].startswith("models:/efae/")
    assert 0 <= summary["worst_gap_db"] < 1e-3
    assert summary["group_law_error"] <= 1e-6
    assert 0 <= summary["data_wait_fraction"] < 1


def test_the_registered_model_gives_the_same_numbers_elsewhere(killed_run, whole_run, tmp_path):
    """Another process pulls the champion from the registry and measures it anew."""
    result = run_job(
        "evaluate",
        "--model=models:/efae@champion",
        f"--data={SHARDS}/held_out",
        f"--output={tmp_path / 'report'}",
        EFAE_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert result.returncode == 0, result.stderr
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    champion = client.get_model_version_by_alias("efae", "champion")
    expected = read_summary(client.get_run(champion.run_id))["psnr"]
    measured = json.loads((tmp_path / "report/summary.json").read_text())["psnr"]
    assert measured == pytest.approx(expected, abs=0.01)
    assert (tmp_path / "report/report.html").stat().st_size > 100_000


def test_a_finished_run_says_so(whole_run):
    result = run_job("train", *OPTIONS, "--tracking.run-name=whole")
    assert result.returncode == 1
    assert "run_name='whole'" in result.stderr
    assert "finished" in result.stderr


def test_a_driver_lost_after_training_goes_on_where_it_was(whole_run):
    """Not finished in MLflow, trained to the end in storage: evaluated and registered once."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    client.set_terminated(whole_run.info.run_id, "FAILED")
    before = {v.version for v in client.search_model_versions("name = 'efae'")}
    result = run_job("train", *OPTIONS, "--tracking.run-name=whole")
    assert result.returncode == 0, result.stdout + result.stderr
    assert find_run("whole").info.status == "FINISHED"
    assert {v.version for v in client.search_model_versions("name = 'efae'")} == before
    assert read_summary(whole_run)["images_per_second"] > 0
