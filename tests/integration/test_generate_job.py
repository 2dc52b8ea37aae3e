"""jobs/generate.py on the real stack: trained, killed and resumed, sampled by Ray tasks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from data_pipelines import ShardDataset
from data_pipelines.verify_shards import find_faults
from efae.checkpoints.checkpoint import read_checkpoint
from efae.checkpoints.run_folder import find_newest_checkpoint
from efae.model.pretrained import read_folder
from efae.registry import pull
from tests.conftest import ROOT, find_workers
from tests.integration.test_encode_job import write_model
from tests.integration.train_jobs import SHARDS, find_run, list_artifacts, run_job, run_uri
from tests.unit.shards.test_latents import encode_shards, make_form

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.slow]
LATENTS = "s3://efae-data/generate-job"
STEPS = 120
OPTIONS = [
    "generate_quickstart",
    f"--data.uri={LATENTS}",
    f"--data.held-out-uri={LATENTS}",
    "--data.classes=10",
    "--data.views=0.5",
    "--generator.hidden-size=64",
    "--generator.depth=2",
    f"--training.steps={STEPS}",
    "--training.global-batch-size=32",
    "--training.log-interval=10",
    "--training.checkpoint-interval=40",
    "--training.evaluation-interval=60",
    "--flow.sampler-steps=4",
]


@pytest.fixture(scope="module")
def latents(train_shards, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    model = write_model(folder)
    digest = read_folder(folder).digest
    form = make_form(model, "float16", cells=(4, 4)).model_copy(
        update={"model_digest": digest, "model_uri": str(folder)}
    )
    return encode_shards(f"{SHARDS}/held_out", LATENTS, model, form).uri


@pytest.fixture(scope="module")
def whole(latents) -> str:
    """The URI of a generator that was trained without an interruption."""
    checked = run_job("preflight", *OPTIONS)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "ok  held-out latents: 64 at " in checked.stdout
    result = run_job("generate", "train", *OPTIONS, "--tracking.run-name=generator-whole")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "held-out loss" in result.stdout
    return result.stdout.split("--model ")[1].split()[0]


def read_final(name: str):
    return read_checkpoint(f"{run_uri(name)}/step-{STEPS:08d}")


def test_the_run_is_in_mlflow_and_the_registry(whole):
    run = find_run("generator-whole")
    assert run.data.params["generator.hidden_size"] == "64"
    assert list_artifacts(run, "samples") == {f"step-{s:08d}.png" for s in (60, 120)}
    assert {"loss", "held_out/loss", "images_per_second"} <= run.data.metrics.keys()
    stored = pull.read(whole)
    for name, weight in read_final("generator-whole").ema.items():
        assert torch.equal(stored.weights[name], weight), name
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_killed_runs_end_with_the_weights_of_an_uninterrupted_run(whole, local_stack, victim):
    name = f"generator-killed-{victim}"
    command = [sys.executable, "jobs/generate.py", "train", *OPTIONS, f"--tracking.run-name={name}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE) as driver:
        give_up_at = time.monotonic() + 250
        while find_newest_checkpoint(run_uri(name)) is None:
            assert driver.poll() is None
            assert time.monotonic() < give_up_at
            time.sleep(0.1)
        if victim == "driver":
            driver.kill()
        else:
            os.kill(find_workers("RayTrainWorker", local_stack)[0].pid, signal.SIGKILL)
        driver.communicate(timeout=280)
    if victim == "driver":
        result = run_job("generate", *command[2:])
        assert result.returncode == 0, result.stdout + result.stderr
        assert "resuming from step" in result.stdout
    else:
        assert driver.returncode == 0
    expected, found = read_final("generator-whole"), read_final(name)
    for kind in ("model", "ema", "optimizer"):
        for key, tensor in getattr(expected, kind).items():
            assert torch.equal(getattr(found, kind)[key], tensor), (kind, key)


def test_ray_tasks_draw_the_images_that_one_process_draws(whole, tmp_path):
    options = ["--count=20", "--samples-per-shard=8", "--guidance=2", "--seed=1"]
    for place in ("ray", "here"):
        output = f"--output={tmp_path / place}"
        result = run_job(
            "generate", "sample", f"--model={whole}", output, *options, f"--on={place}"
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "20 images, 20 of them drawn now" in result.stdout
    drawn, here = ShardDataset.open(tmp_path / "ray"), ShardDataset.open(tmp_path / "here")
    assert drawn.id == here.id
    assert list(find_faults(str(tmp_path / "ray"))) == []
    assert drawn.image_shape == (1, 32, 32)
    assert json.loads((tmp_path / "ray" / "statistics.json").read_text())["images"] == 20


def test_images_instead_of_latents_and_a_generator_instead_of_a_tokenizer_are_refused(
    train_shards, whole
):
    result = run_job("generate", "train", *OPTIONS, f"--data.uri={SHARDS}/train")
    assert result.returncode == 1
    assert f"error: {SHARDS}/train holds images: encode them first" in result.stderr
    result = run_job("evaluate", f"--model={whole}", f"--data={SHARDS}/held_out")
    assert result.returncode == 1
    assert "holds a generator of latents, not an autoencoder" in result.stderr
