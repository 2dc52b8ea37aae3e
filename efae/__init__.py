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

    Its files are checked by their hashes; nothing in them is unpickled or run. With EFAE_OFFLINE=1
    in the environment no server is asked: what was loaded before comes from the cache.

    Args:
        uri: "models:/efae@champion", "models:/efae/3", "models:/efae@sha256:HEX" (the version's tag
            "digest", 12 digits or more), "runs:/RUN_ID/model", or the path or s3:// address of a
            checkpoint or model folder.
        device: where to put it, as torch names devices.

    Raises:
        ValueError: an unknown name, alias, version, digest or folder, or not in the cache while
            offline; the message says what exists.
        CheckpointError: files that do not match their manifest, or that what was registered.
        ConnectionError: MLflow fails.
        StorageError: the storage refuses or does not answer.
    """
    from efae.registry import pull

    return pull.load(uri, device)
