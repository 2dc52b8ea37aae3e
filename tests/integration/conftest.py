"""Fixtures that several integration tests share: a registry, an undisturbed run."""

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from data_pipelines.build_shards import build_shards
from efae.model.pretrained import read_folder
from efae.registry import registration
from efae.registry.versions import RegisteredVersion
from efae.tracking import runs
from efae.tracking.runs import Run
from efae.tracking.server import Server
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


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conventional autoencoder in a folder of diffusers; its cells have 2 px."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=32,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of models that is this test's own."""
    monkeypatch.setenv("EFAE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(local_stack: dict[str, str]) -> Server:
    """The stack's MLflow."""
    return Server(local_stack["MLFLOW_TRACKING_URI"])


@pytest.fixture
def client(server: Server) -> MlflowClient:
    return server.client()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a registered model that is this test's own."""
    return request.node.name.replace("[", "-").rstrip("]")


@pytest.fixture
def run(server: Server, name: str) -> Run:
    return runs.find_or_create_run(server, "registry", name, {})[0]


@pytest.fixture
def run_id(run: Run) -> str:
    return run.id


@pytest.fixture
def register(tmp_path: Path, name: str, run: Run):
    """Registers a tiny model of this seed."""

    def register(seed: int = 0) -> RegisteredVersion:
        folder = write_model(tmp_path / f"model-{seed}", seed)
        metrics, tags = {"psnr": 24.125}, {"preset": "quickstart"}
        stored = read_folder(folder)
        return registration.register_model(stored, name, run, metrics, tags)

    return register
