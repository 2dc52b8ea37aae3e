"""Equivariant flow autoencoders: latents that flip and rotate with their images.

Importing this package is cheap: torch, ray and mlflow are imported only where they are needed, and
each name below on first use.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from pathlib import Path

    from efae.config import Config
    from efae.model.autoencoder import Autoencoder
    from efae.model.objective import Objective
    from efae.model.precision import Precision
    from efae.presets import PRESETS
    from efae.symmetry import C4, D4, FLIPS, MIRROR, TRIVIAL, Representation

__version__ = "0.1.0"
__all__ = [
    "C4",
    "D4",
    "FLIPS",
    "MIRROR",
    "PRESETS",
    "TRIVIAL",
    "Autoencoder",
    "Config",
    "Objective",
    "Representation",
    "load",
]
_HOMES = {
    "Autoencoder": "efae.model.autoencoder",
    "Config": "efae.config",
    "Objective": "efae.model.objective",
    "PRESETS": "efae.presets",
}


def load(
    uri: "str | Path", device: str = "cpu", precision: "Precision | None" = None
) -> "Autoencoder":
    """Load the model at `uri` for inference: evaluation mode, no gradients.

    Its files are verified by their hashes; nothing in them is unpickled or run. With EFAE_OFFLINE=1
    in the environment, models come from the local cache and no server is contacted.

    Args:
        uri: "builtin:openmoji-32", "models:/efae@champion", "models:/efae/3",
            "models:/efae@sha256:HEX" (the version's tag "digest", 12 digits or more),
            "runs:/RUN_ID/model", or the path or s3:// address of a checkpoint or of a folder that
            `save_pretrained` wrote; or "diffusers:PATH", an autoencoder of diffusers as it is, over
            the trivial group.
        device: Torch device for the model.
        precision: Precision that it runs in: "fp32", "tf32", "bf16" or "fp16"; None leaves it to
            the caller (`torch.autocast`).

    Raises:
        ValueError: The name, alias, version, digest or folder does not exist, or is not in the
            cache while offline; or there is no such precision; the message lists what exists.
        CheckpointError: The files do not match their manifest, or differ from what was registered.
        ConnectionError: MLflow fails.
        StorageError: The storage refuses or does not answer.
    """
    from efae.model.precision import Precision
    from efae.model.pretrained import find_folder, read_folder

    known = get_args(Precision)
    if precision not in (None, *known):
        raise ValueError(
            f"efae.load: precision={precision!r} is unknown: use {', '.join(known)} or None"
        )
    folder = find_folder(str(uri))
    if folder is not None:  # saves the seconds that importing MLflow takes
        from efae.model.autoencoder import Autoencoder

        model = Autoencoder.restore(read_folder(folder), device)
    else:
        from efae.registry import pull

        model = pull.load(str(uri), device)
    model.precision = precision
    return model


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(_HOMES.get(name, "efae.symmetry")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
