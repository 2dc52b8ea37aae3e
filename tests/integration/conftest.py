"""What several files of integration tests share: a registry's fixtures, an undisturbed run."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_pipelines.build_shards import build_shards
from efae.model.pretrained import read_folder
from efae.registry import registration
from efae.registry.pull import RegisteredVersion
from efae.tracking import runs
from tests.integration.stored_models import write_model
from tests.integration.train_jobs import LONG_STEPS, OPTIONS, SHARDS, find_run, run_job


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


@pytest.fixture(scope="session")
def long_run(train_shards):
    """The same for `train_jobs.LONG_STEPS`."""
    options = [f"--training.steps={LONG_STEPS}", "--tracking.run-name=long"]
    result = run_job("train", *OPTIONS, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    return find_run("long")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of models that is this test's own."""
    monkeypatch.setenv("EFAE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tracking_uri(local_stack: dict[str, str]) -> str:
    return local_stack["MLFLOW_TRACKING_URI"]


@pytest.fixture
def client(tracking_uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a registered model that is this test's own."""
    return request.node.name.replace("[", "-").rstrip("]")


@pytest.fixture
def run_id(tracking_uri: str, name: str) -> str:
    return runs.find_or_create_run(tracking_uri, "registry", name, {})[0]


@pytest.fixture
def register(tmp_path: Path, name: str, run_id: str, tracking_uri: str):
    """Registers a tiny model of this seed."""

    def register(seed: int = 0) -> RegisteredVersion:
        folder = write_model(tmp_path / f"model-{seed}", seed)
        metrics, tags = {"psnr": 24.125}, {"preset": "quickstart"}
        return registration.register_model(
            read_folder(folder), name, run_id, metrics, tags, tracking_uri, portable=False
        )

    return register
