"""Bad input ends before any work starts: one message with value, place and remedy, status != 0."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cluster.ports import pick_free
from data_pipelines.build_shards import build_shards
from jobs.train import main
from tests.conftest import ROOT

pytestmark = [pytest.mark.s3, pytest.mark.ray]


def assert_refused(status, said, *parts):
    said = " ".join(said.replace("│", " ").split())
    assert status != 0, said
    assert "Traceback" not in said
    for part in parts:
        assert part in said


def refuse_here(capsys, arguments, *parts):
    """What is refused before there is a driver needs no process of its own."""
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    assert_refused(status, captured.out + captured.err, *parts)


def run_driver(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, "jobs/train.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["quikstart"], ["quikstart", "quickstart"]),
        (["quickstart", "--optimizer.learning_rat", "1"], ["learning_rat", "learning-rate"]),
        (["quickstart", "--training.steps", "many"], ["training.steps", "many"]),
        (
            ["quickstart", "--training.global-batch-size", "1"],
            ["training.global_batch_size=1", "fewer than the 2 workers"],
        ),
        (
            ["quickstart", "--data.resolution", "30"],
            ["data.resolution=30", "multiple of model.downsampling=8"],
        ),
    ],
    ids=["preset", "override", "type", "batch", "resolution"],
)
def test_wrong_command_line(capsys, arguments, parts):
    refuse_here(capsys, arguments, *parts)


def test_impossible_representation(local_stack, capsys):
    arguments = ["quickstart", "--representation.rotation-dims", "15"]
    refuse_here(capsys, arguments, "rotation_dims=15", "even")


def test_missing_bucket(local_stack):
    status, said = run_driver("quickstart", "--data.uri", "s3://no-such-bucket/set")
    assert_refused(status, said, "s3://no-such-bucket", "error:")


def test_missing_shards(local_stack):
    status, said = run_driver("quickstart", "--data.uri", "s3://efae-data/nothing-here")
    assert_refused(status, said, "s3://efae-data/nothing-here", "build_shards")


def test_wrong_credentials(local_stack):
    status, said = run_driver("quickstart", AWS_SECRET_ACCESS_KEY="wrong")
    assert_refused(status, said, "s3://efae-data", "AWS_SECRET_ACCESS_KEY")
    assert "wrong" not in said


def test_mlflow_down(local_stack):
    address = f"http://127.0.0.1:{pick_free(1)[0]}"
    status, said = run_driver("quickstart", MLFLOW_TRACKING_URI=address)
    assert_refused(status, said, address, "MLFLOW_TRACKING_URI")


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((16, 32), ["16 x 32, not square", "group D4", "--representation.group flips"]),
        ((16, 16), ["16 x 16", "data.resolution=32"]),
    ],
    ids=["not square", "other size"],
)
def test_images_that_do_not_fit(local_stack, tmp_path, shape, parts):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for name in "ab":
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    uri = f"s3://efae-data/refusals-{shape[1]}"
    build_shards(f"folder:{tmp_path}", uri)
    status, said = run_driver("quickstart", f"--data.uri={uri}")
    assert_refused(status, said, uri, *parts)


def test_more_workers_than_the_cluster_has(local_stack):
    uri = "s3://efae-data/refusals-cpus"
    build_shards("mnist", uri, resolution=32)
    status, said = run_driver(
        "quickstart",
        *("--data.channels=1", f"--data.uri={uri}", f"--data.held-out-uri={uri}"),
        *("--ray.num-workers=64", "--training.global-batch-size=64"),
    )
    assert_refused(status, said, "ray.num_workers=64", "64 CPUs", "the cluster has")
