"""The main job on real servers, from shards to a registered model, and what comes after."""

import json
import os

import pytest
from mlflow import MlflowClient

from tests.integration.train_jobs import (
    LOG_INTERVAL,
    OPTIONS,
    SHARDS,
    STEPS,
    find_run,
    list_artifacts,
    read_curve,
    read_summary,
    run_job,
)

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.timeout(600)]


def test_mlflow_holds_curves_parameters_pictures_and_report(whole_run):
    run = whole_run
    logged = range(LOG_INTERVAL, STEPS + 1, LOG_INTERVAL)
    for name in ("loss", "images_per_second", "loss_by_t/0.5", "gradient_norm"):
        steps = [step for step, _ in read_curve(run, name)]
        assert steps == sorted(set(steps)), name
        assert set(steps) <= set(logged)
    losses = read_curve(run, "loss")
    assert [step for step, _ in losses] == list(logged)
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert run.data.params["model.level"] == "exact"
    assert {f"step-{step:08d}.png" for step in (STEPS // 2, STEPS)} <= list_artifacts(
        run, "reconstructions"
    )
    assert {"report.html", "summary.json", "orbit.png"} <= list_artifacts(run, "report")


def test_summary_says_what_the_contract_lists(whole_run):
    summary = read_summary(whole_run)
    assert summary["steps"] == STEPS
    assert summary["images_seen"] == STEPS * 32
    assert summary["checkpoints"] == STEPS // 40 - 1  # before the last
    assert summary["checkpoint_stall_seconds"] > 0
    assert [line.split("  ")[1] for line in summary["events"]] == ["2 workers begin"]
    assert summary["world_size"] == 2
    assert summary["device"] == "cpu"
    assert summary["precision"] == "fp32"
    assert summary["model_uri"].startswith("models:/efae/")
    assert 0 <= summary["worst_gap_db"] < 1e-3
    assert 10 < summary["linear_psnr"] < 60
    assert whole_run.data.metrics["summary/linear_psnr"] == summary["linear_psnr"]
    assert summary["group_law_error"] <= 1e-6
    assert 0 <= summary["data_wait_fraction"] < 1


def test_the_registered_model_gives_the_same_numbers_elsewhere(whole_run, tmp_path):
    """Another process pulls the version from the registry and measures it anew."""
    summary = read_summary(whole_run)
    result = run_job(
        "evaluate",
        f"--model={summary['model_uri']}",
        f"--data={SHARDS}/held_out",
        f"--output={tmp_path / 'report'}",
        "--images=16",
        EFAE_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads((tmp_path / "report/summary.json").read_text())["psnr"]
    assert measured == pytest.approx(summary["psnr"], abs=0.01)
    assert (tmp_path / "report/report.html").stat().st_size > 100_000


def test_a_finished_run_says_so(whole_run):
    result = run_job("train", *OPTIONS, "--tracking.run-name=whole")
    assert result.returncode == 1
    assert "run_name='whole'" in result.stderr
    assert "finished" in result.stderr


@pytest.mark.slow
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
