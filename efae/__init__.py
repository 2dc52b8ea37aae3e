"""Equivariant flow autoencoders: latents that flip and rotate with their images.

Importing this package is cheap: torch, ray and mlflow are imported by what needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efae.model.autoencoder import Autoencoder

__version__ = "0.1.0"


def load(uri: str, device: str = "cpu") -> Autoencoder:
    """The model at `uri`, in evaluation mode.

    Args:
        uri: "models:/efae@champion", "models:/efae/3", "runs:/RUN_ID/model", or the path or
            s3:// address of a checkpoint or model folder.
        device: where to put it, as torch names devices.

    Raises:
        ValueError: an unknown name, alias, version or folder; the message says what exists.
        CheckpointError: files that do not match their manifest.
    """
    from efae.artifacts import registry

    return registry.load(uri, device)
