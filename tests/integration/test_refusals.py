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


@pytest.fixture(scope="module")
def all_wrong(local_stack):
    """What one driver says to four faults at once, and the address of the MLflow that is down."""
    mlflow = f"http://127.0.0.1:{pick_free(1)[0]}"
    status, said = run_driver(
        "quickstart",
        "--data.uri=s3://no-such-bucket/set",
        "--data.held-out-uri=s3://efae-data/nothing-here",
        *("--ray.num-workers=64", "--training.global-batch-size=64"),
        MLFLOW_TRACKING_URI=mlflow,
    )
    assert_refused(status, said, "error: preflight: 4 of")
    return said, mlflow


def find_line(said, what):
    """Of the check that failed."""
    return next(line for line in said.splitlines() if line.startswith(f"FAIL {what}:"))


def test_missing_bucket(all_wrong):
    assert "s3://no-such-bucket" in find_line(all_wrong[0], "images")


def test_missing_shards(all_wrong):
    line = find_line(all_wrong[0], "held-out images")
    assert "s3://efae-data/nothing-here" in line
    assert "build_shards" in line


def test_mlflow_down(all_wrong):
    said, address = all_wrong
    line = find_line(said, "MLflow")
    assert address in line
    assert "MLFLOW_TRACKING_URI" in line


def test_more_workers_than_the_cluster_has(all_wrong):
    line = find_line(all_wrong[0], "cluster")
    assert "ray.num_workers=64" in line
    assert "64 CPUs" in line
    assert "the cluster has" in line


def test_wrong_credentials(local_stack):
    status, said = run_driver("quickstart", AWS_SECRET_ACCESS_KEY="wrong")
    assert_refused(status, said, "s3://efae-data", "AWS_SECRET_ACCESS_KEY")
    assert "wrong" not in said


def test_images_that_do_not_fit(local_stack, tmp_path):
    uris = []
    for shape in ((16, 32), (16, 16)):
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        folder = tmp_path / str(shape[1])
        folder.mkdir()
        for name in "ab":
            Image.fromarray(pixels).save(folder / f"{name}.png")
        uris.append(f"s3://efae-data/refusals-{shape[1]}")
        build_shards(f"folder:{folder}", uris[-1])
    status, said = run_driver(
        "quickstart", f"--data.uri={uris[0]}", f"--data.held-out-uri={uris[1]}"
    )
    assert_refused(status, said, *uris)
    line = find_line(said, "images")
    assert "16 x 32, not square" in line
    assert "group D4" in line
    assert "--representation.group flips" in line
    line = find_line(said, "held-out images")
    assert "16 x 16" in line
    assert "data.resolution=32" in line
