"""What several files of integration tests compare with: the run that nothing disturbs."""

import pytest

from data_pipelines.build_shards import build_shards
from tests.integration.train_jobs import OPTIONS, SHARDS, find_run, run_job


@pytest.fixture(scope="session")
def train_shards(local_stack):
    """The shards of `train_jobs.OPTIONS`."""
    build_shards("mnist", SHARDS, resolution=32, samples_per_shard=500, held_out=64)


@pytest.fixture(scope="session")
def whole_run(train_shards):
    """The MLflow run of `train_jobs.OPTIONS`, trained without an interruption."""
    result = run_job("train", *OPTIONS, "--tracking.run-name=whole")
    assert result.returncode == 0, result.stdout + result.stderr
    return find_run("whole")
