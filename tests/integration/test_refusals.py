"""Bad input ends before any work starts: one message with value, place and remedy, status != 0."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.ports import pick_free
from data_pipelines.build_shards import build_shards

pytestmark = [pytest.mark.s3, pytest.mark.ray]
ROOT = Path(__file__).parents[2]


def train(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "jobs/train.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def assert_refused(result, *parts):
    said = " ".join((result.stdout + result.stderr).replace("│", " ").split())
    assert result.returncode != 0, said
    assert "Traceback" not in said
    for part in parts:
        assert part in said


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
def test_wrong_command_line(local_stack, arguments, parts):
    assert_refused(train(*arguments), *parts)


def test_impossible_representation(local_stack):
    result = train("quickstart", "--representation.rotation-dims", "15")
    assert_refused(result, "rotation_dims=15", "even")


def test_missing_bucket(local_stack):
    result = train("quickstart", "--data.uri", "s3://no-such-bucket/set")
    assert_refused(result, "s3://no-such-bucket", "error:")


def test_missing_shards(local_stack):
    result = train("quickstart", "--data.uri", "s3://efae-data/nothing-here")
    assert_refused(result, "s3://efae-data/nothing-here", "build_shards")


def test_wrong_credentials(local_stack):
    result = train("quickstart", AWS_SECRET_ACCESS_KEY="wrong")
    assert_refused(result, "s3://efae-data", "AWS_SECRET_ACCESS_KEY")
    assert "wrong" not in result.stdout + result.stderr


def test_mlflow_down(local_stack):
    address = f"http://127.0.0.1:{pick_free(1)[0]}"
    result = train("quickstart", MLFLOW_TRACKING_URI=address)
    assert_refused(result, address, "MLFLOW_TRACKING_URI")


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
    assert_refused(train("quickstart", f"--data.uri={uri}"), uri, *parts)


def test_more_workers_than_the_cluster_has(local_stack):
    uri = "s3://efae-data/refusals-cpus"
    build_shards("mnist", uri, resolution=32)
    result = train(
        "quickstart",
        *("--data.channels=1", f"--data.uri={uri}", f"--data.held-out-uri={uri}"),
        *("--ray.num-workers=64", "--training.global-batch-size=64"),
    )
    assert_refused(result, "ray.num_workers=64", "64 CPUs", "the cluster has")
