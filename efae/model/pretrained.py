"""A model as a folder in the style of diffusers: config.json and safetensors, nothing else.

Two readers share it: `Autoencoder.from_pretrained` and `efae.exchange.diffusers_adapter`. Beside
our configuration, config.json says what latent-diffusion code asks of an autoencoder. The header of
the weights holds the hash of config.json and that of the tensors, so that neither goes with
another. The hashes find accidents and mix-ups; somebody who means harm can write new ones, and can
still not make a reader run code.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from efae import __version__
from efae import config_forms as configuration
from efae.config import Config
from efae.symmetry import Representation

CONFIG, WEIGHTS, CARD = "config.json", "diffusion_pytorch_model.safetensors", "README.md"
CLASS_NAME = "AutoencoderEFAE"
_REQUIRED = {
    *("_class_name", "_efae_version", "efae", "in_channels", "out_channels", "latent_channels"),
    *("sample_size", "scaling_factor", "shift_factor", "group", "representation"),
}
BUILTIN = "builtin:"
"""Before the names of the models that come with this package."""
_BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}


def describe_latent(config: Config, representation: Representation) -> dict[str, Any]:
    """What latent-diffusion code reads, by the names of diffusers; and how the group acts.

    Latents are handed out at unit scale, so that there is nothing to scale or to shift. Pipelines
    take 2 ** (len(block_out_channels) - 1) for the pixels of a latent cell; it is left out where
    those are no power of two.
    """
    height, width = config.data.image_size
    halvings = config.model.downsampling.bit_length() - 1
    described: dict[str, Any] = {
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "latent_channels": representation.dim,
        "sample_size": height if height == width else [height, width],
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "group": representation.group.name,
        "representation": dict(representation.multiplicities),
    }
    if config.model.downsampling == 2**halvings:
        described["block_out_channels"] = [config.model.encoder_hidden_size] * (halvings + 1)
    return described


def write_pretrained(
    folder: str | Path,
    weights: Mapping[str, Tensor],
    config: Config,
    representation: Representation,
    card: str = "",
) -> None:
    """Write the folder.

    Args:
        folder: made if need be; a model in it is replaced.
        weights: by parameter name, on any device.
        config: what the model is built from.
        representation: of its latents.
        card: becomes README.md; a README.md that is there stays if this is empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "_class_name": CLASS_NAME,
        "_efae_version": __version__,
        **describe_latent(config, representation),
        "efae": asdict(config),
    }
    text = (json.dumps(settings, indent=2) + "\n").encode()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {
        "format": "pt",
        "config_sha256": hashlib.sha256(text).hexdigest(),
        "tensors_sha256": _hash_tensors(tensors),
    }
    # In this order: weights that are cut off are noticed, and older ones do not fit the new text.
    (folder / CONFIG).write_bytes(text)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata)
    if card:
        (folder / CARD).write_text(card, encoding="utf-8")


def read_pretrained(folder: str | Path) -> tuple[dict[str, Tensor], Config]:
    """Weights (on the CPU, as they were stored) and configuration of a folder.

    Raises:
        ValueError: no such folder; it holds a pickle; a file is missing, damaged, of another kind
            or of another model; an unknown setting.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; models are not downloaded here")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _PICKLES)
    if pickles:
        raise ValueError(
            f"{folder}: holds {', '.join(pickles)}, which may be a pickle, and those can run code:"
            " nothing here was opened; take it out if you trust the rest"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing")
    text = (folder / CONFIG).read_bytes()
    settings = _parse_settings(folder, text)
    tensors, metadata = _read_tensors(folder / WEIGHTS)
    for name in ("config_sha256", "tensors_sha256"):
        if name not in metadata:
            raise ValueError(f"{folder / WEIGHTS}: its header has no {name}: not written by efae")
    if hashlib.sha256(text).hexdigest() != metadata["config_sha256"]:
        raise ValueError(
            f"{folder / CONFIG}: not the configuration that was saved with {WEIGHTS} (its sha256"
            " differs): it was changed, or comes from another model"
        )
    if _hash_tensors(tensors) != metadata["tensors_sha256"]:
        raise ValueError(f"{folder / WEIGHTS}: damaged, its tensors have another sha256")
    try:
        config = configuration.from_dict(settings["efae"])
    except ValueError as error:
        raise ValueError(
            f"{folder / CONFIG}: written by efae {settings['_efae_version']}, and not valid for"
            f" efae {__version__}: {error}"
        ) from error
    return tensors, config


def is_builtin(uri: str) -> bool:
    """Whether `uri` names a model that comes with this package: "builtin:NAME"."""
    return uri.startswith(BUILTIN)


def find_builtin(uri: str) -> Path:
    """The folder of a model that comes with this package.

    Args:
        uri: "builtin:NAME".

    Raises:
        ValueError: there is no such model; the message lists those that exist.
    """
    known = {path.name: path for path in _BUILTIN_FOLDER.iterdir() if path.is_dir()}
    name = uri.removeprefix(BUILTIN)
    if name not in known:
        names = ", ".join(f"{BUILTIN}{name}" for name in sorted(known))
        raise ValueError(f"no model {uri!r} comes with efae {__version__}; use {names}")
    return known[name]


def check_weights(
    folder: str | Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Compare names and shapes of weights from a folder with those of a model.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the first few are named.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = [f"{name} is missing" for name in expected if name not in shapes]
    faults += [f"{name} is unknown" for name in shapes if name not in expected]
    faults += [
        f"{name} has shape {shapes[name]}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{Path(folder) / WEIGHTS}: {'; '.join(faults[:3])}{more}")


def _parse_settings(folder: Path, text: bytes) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        settings: Any = json.loads(text)
        name = settings.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not the configuration of a model") from error
    if name != CLASS_NAME:
        raise ValueError(f"{path}: describes a model of class {name}, not {CLASS_NAME}")
    if missing := sorted(_REQUIRED - set(settings)):
        raise ValueError(f"{path}: has no {', '.join(missing)}")
    if unknown := sorted(set(settings) - _REQUIRED - {"block_out_channels"}):
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)}")
    return settings


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        opened: Any = safetensors.safe_open(path, framework="pt")
        with opened as file:
            # Copies: what is read may stay mapped to the file, which may change.
            tensors = {str(name): file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
