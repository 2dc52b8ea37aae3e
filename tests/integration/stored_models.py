"""Small models for registry tests, and their storage."""

from pathlib import Path

import torch
from mlflow import MlflowClient

from efae.checkpoints import checkpoint
from efae.config import Config
from efae.config import forms as configuration
from efae.model.autoencoder import Autoencoder

TINY = configuration.with_overrides(
    Config(),
    {
        "data.resolution": 16,
        "model.hidden_size": 32,
        "model.encoder_hidden_size": 32,
        "model.depth": 1,
    },
)


def make_model(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(TINY)


def write_model(folder: Path, seed: int = 0) -> Path:
    make_model(seed).save_pretrained(folder)
    return folder


def artifact_address(client: MlflowClient, run_id: str, path: str) -> str:
    """Where the stack's MLflow keeps an artifact of a run."""
    root = client.get_run(run_id).info.artifact_uri or ""
    return root.replace("mlflow-artifacts:/", "s3://mlflow/artifacts/") + f"/{path}"


def write_run(run_uri: str, steps: tuple[int, ...]) -> None:
    for step in steps:
        weights = make_model(seed=step).state_dict()
        checkpoint.write_checkpoint(
            f"{run_uri}/{checkpoint.checkpoint_name(step)}",
            model={"raw": torch.zeros(2)},
            ema=weights,
            optimizer={},
            metadata={"step": step},
            config=TINY,
        )
