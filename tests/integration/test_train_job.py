"""The main job on real servers, from shards to a registered model, and what comes after."""

import json
import os

import pytest
import torch
from mlflow import MlflowClient

import efae
from efae.evaluation.held_out import read_held_out
from efae.evaluation.measures import to_float
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


@pytest.mark.slow
def test_a_registered_model_is_distilled_into_one_step(whole_run, tmp_path, monkeypatch):
    """The workers read the copy in the run's folder; the student has the teacher's latents."""
    monkeypatch.setenv("EFAE_CACHE_DIR", str(tmp_path / "cache"))
    teacher_uri = read_summary(whole_run)["model_uri"]
    result = run_job(
        "train",
        *OPTIONS,
        f"--flow.distill-from={teacher_uri}",
        "--training.steps=40",
        "--tracking.run-name=distilled",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok  starting model" in result.stdout
    student = efae.load(read_summary(find_run("distilled"))["model_uri"])
    teacher = efae.load(teacher_uri)
    assert (student.config.flow.default_steps, teacher.config.flow.default_steps) == (1, 4)
    image = to_float(read_held_out(student.config.data, 16))
    latent, noise = teacher.encode(image), torch.randn(image.shape)
    assert torch.equal(student.encode(image), latent)
    goal = teacher.decode(latent, noise=noise)
    errors = [
        (model.decode(latent, 1, noise) - goal).square().mean() for model in (student, teacher)
    ]
    assert errors[0] < 0.7 * errors[1]
