"""The model folder: config.json, safetensors and manifest.json, in the style of diffusers.

It is what `Autoencoder.save_pretrained` writes, what the registry stores, and what `efae.load` and
`efae.exchange.diffusers_adapter` read. Beside our configuration, config.json holds the settings
that latent-diffusion code reads. The hashes detect damage and mix-ups; an attacker can write new
ones, but cannot make a reader run code.

The same reader reads a checkpoint as a model with its EMA weights, and folders of older versions.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efae import __version__
from efae.config import AnyConfig, Config, GeneratorConfig
from efae.config import forms as configuration
from efae.model.networks.diffusers_vae import CLASSES, name_in_diffusers, name_in_efae
from efae.model.representation import build_representation
from efae.model.stored_files import (
    CONFIG,
    EMA,
    MANIFEST,
    MODEL,
    OWN_CONFIG,
    OWN_WEIGHTS,
    WEIGHTS,
    CheckpointError,
    dump_manifest,
    pack_tensors,
    parse_manifest,
    read_file,
    read_from,
    read_verified,
    sha256,
    unpack_tensors,
)
from efae.symmetry import Representation

CARD = "README.md"
CLASS_NAME = "AutoencoderEFAE"
_GENERATOR = "LatentGeneratorEFAE"
BUILTIN = "builtin:"
"""Prefix of the names of models that ship in this package."""
_BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}


@dataclass(frozen=True, eq=False)
class StoredModel:
    """The content of a model folder, read and verified once.

    Attributes:
        uri: Path or URI it was read from, for messages.
        files: Contents of weights, configuration and manifest, by file name.
        weights_file: Name of the weights among them.
        weights: Tensors by parameter name, on the CPU, in the precision they are stored in.
        settings: Configuration that the model is built from, be it an autoencoder or a generator.
    """

    uri: str
    files: Mapping[str, bytes] = field(repr=False)
    weights_file: str
    weights: Mapping[str, Tensor] = field(repr=False)
    settings: AnyConfig = field(repr=False)

    @property
    def config(self) -> Config:
        """Configuration of an autoencoder.

        Raises:
            CheckpointError: The model is a generator.
        """
        if not isinstance(self.settings, Config):
            raise CheckpointError(
                self.uri,
                "holds a generator of latents, not an autoencoder: sample from it with"
                " jobs/generate.py sample",
            )
        return self.settings

    @property
    def digest(self) -> str:
        """sha256 of the weights, which names the model in models:/NAME@sha256:HEX.

        That of "diffusers:PATH" covers config.json, too: it holds the factors of the latents.
        """
        files = json.loads(self.files[MANIFEST])["files"]
        weights: str = files[self.weights_file]["sha256"]
        if self.uri.startswith("diffusers:"):
            return sha256(f"{weights} {files[CONFIG]['sha256']}".encode())
        return weights

    @property
    def manifest_digest(self) -> str:
        """sha256 of the manifest, which holds the hashes of weights and configuration."""
        return sha256(self.files[MANIFEST])

    def write(self, folder: Path, card: str = "") -> None:
        """Write the files into a folder.

        Args:
            folder: Folder, created if missing; a model in it is replaced.
            card: Text of README.md; if empty, an existing README.md stays.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # the folder stays incomplete while we write
        for name, data in self.files.items():  # the manifest is last
            (folder / name).write_bytes(data)
        if card:
            (folder / CARD).write_text(card, encoding="utf-8")


def pack_model(
    weights: Mapping[str, Tensor], config: Config, representation: Representation
) -> StoredModel:
    """Make the files of a model folder, in memory.

    Args:
        weights: Tensors by parameter name, on any device.
        config: Configuration that the model is built from.
        representation: Representation of its latents.
    """
    if config.model.kind == "diffusers":
        return _pack_diffusers(weights, config)
    settings = {
        "_class_name": CLASS_NAME,
        "_efae_version": __version__,
        **describe_latent(config, representation),
        "efae": asdict(config),
    }
    files = {
        CONFIG: (json.dumps(settings, indent=2) + "\n").encode(),
        WEIGHTS: pack_tensors(weights, {"format": "pt"}),
    }
    files[MANIFEST] = dump_manifest(files, {})
    return StoredModel("a new model", files, WEIGHTS, weights, config)


def as_model_folder(stored: StoredModel) -> StoredModel:
    """Return a model as `save_pretrained` writes it, also one from a checkpoint or of version 2."""
    if stored.weights_file == WEIGHTS:
        return stored
    if isinstance(stored.settings, GeneratorConfig):
        packed = pack_generator(stored.weights, stored.settings)
    else:
        representation = build_representation(stored.settings)
        packed = pack_model(stored.weights, stored.settings, representation)
    return replace(packed, uri=stored.uri)


def pack_generator(weights: Mapping[str, Tensor], config: GeneratorConfig) -> StoredModel:
    """Make the files of a generator's folder, in memory.

    Args:
        weights: Tensors by parameter name, on any device.
        config: Configuration that the generator is built from.
    """
    settings = {"_class_name": _GENERATOR, "_efae_version": __version__, "efae": asdict(config)}
    files = {
        CONFIG: (json.dumps(settings, indent=2) + "\n").encode(),
        WEIGHTS: pack_tensors(weights, {"format": "pt"}),
    }
    files[MANIFEST] = dump_manifest(files, {})
    return StoredModel("a new generator", files, WEIGHTS, weights, config)


def parse_model(uri: str, manifest: bytes, read: Callable[[str], bytes]) -> StoredModel:
    """Read, verify and unpack a model, or the EMA weights of a checkpoint; each file once.

    Args:
        uri: Folder, for messages.
        manifest: Bytes of its manifest.
        read: Function that returns another file of the folder by its name.

    Raises:
        CheckpointError: The folder is incomplete, damaged, or of another format.
    """
    parsed = parse_manifest(uri, manifest)
    if OWN_CONFIG in parsed["files"]:
        return _parse_diffusers(uri, manifest, parsed, read)
    weights = next(name for name in (WEIGHTS, EMA, MODEL) if name in parsed["files"])
    files = read_verified(uri, (CONFIG, weights), parsed, read)
    return StoredModel(
        uri,
        files | {MANIFEST: manifest},
        weights,
        unpack_tensors(uri, weights, files[weights]),
        parse_settings(uri, files[CONFIG]),
    )


def _pack_diffusers(weights: Mapping[str, Tensor], config: Config) -> StoredModel:
    """Make the files of an autoencoder of diffusers, whose scale is that of our latents."""
    architecture = json.loads(config.start.architecture)
    settings = dict(architecture)
    if not config.keeps_latents:
        power = weights["bottleneck.power"].double().clamp(min=1e-6)
        settings["scaling_factor"] = float(power.mean().rsqrt())
        if architecture.get("shift_factor") is not None:
            settings["shift_factor"] = 0.0  # a shift would not commute with a change of sign
        stale = ("latents_mean", "latents_std")  # pipelines would apply them beside the factor
        settings |= {name: None for name in stale if name in architecture}
    theirs: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        plain = name_in_diffusers(name)
        if plain is None:
            ours[name] = tensor
        else:
            theirs[plain] = tensor
    files = {
        CONFIG: (json.dumps(settings, indent=2) + "\n").encode(),
        OWN_CONFIG: (json.dumps(asdict(config), indent=2) + "\n").encode(),
        WEIGHTS: pack_tensors(theirs, {"format": "pt"}),
        OWN_WEIGHTS: pack_tensors(ours, {"format": "pt"}),
    }
    files[MANIFEST] = dump_manifest(files, {})
    return StoredModel("a new model", files, WEIGHTS, weights, config)


def _parse_diffusers(
    uri: str, manifest: bytes, parsed: Mapping[str, Any], read: Callable[[str], bytes]
) -> StoredModel:
    """Invert `_pack_diffusers`."""
    files = read_verified(uri, (CONFIG, OWN_CONFIG, WEIGHTS, OWN_WEIGHTS), parsed, read)
    theirs = unpack_tensors(uri, WEIGHTS, files[WEIGHTS])
    weights = {name_in_efae(name): tensor for name, tensor in theirs.items()}
    weights |= unpack_tensors(uri, OWN_WEIGHTS, files[OWN_WEIGHTS])
    config = parse_config(uri, files[OWN_CONFIG])
    return StoredModel(uri, files | {MANIFEST: manifest}, WEIGHTS, weights, config)


def read_folder(folder: str | Path) -> StoredModel:
    """Read the model in a local folder.

    Raises:
        CheckpointError: The folder does not exist or holds a pickle; a file is missing, damaged, of
            another kind or of another model; or a setting is unknown.
    """
    folder, uri = Path(folder), str(folder)
    if not folder.is_dir():
        raise CheckpointError(uri, "no such folder; models are not downloaded here")
    names = {path.name for path in folder.iterdir()}
    pickles = sorted(name for name in names if Path(name).suffix.lower() in _PICKLES)
    if pickles:
        raise CheckpointError(
            uri,
            f"holds {', '.join(pickles)}, which may be a pickle, and those can run code:"
            " nothing here was opened; take it out if you trust the rest",
        )

    if MANIFEST in names:
        return parse_model(uri, (folder / MANIFEST).read_bytes(), read_from(folder))
    if WEIGHTS in names:
        return _parse_unlisted(uri, folder)
    raise CheckpointError(uri, f"{MANIFEST} is missing")


def find_folder(uri: str) -> Path | None:
    """Return the local folder of the model that `uri` names; None if there is none.

    Raises:
        ValueError: No model "builtin:NAME" ships; the message lists those that do.
    """
    if uri.startswith(BUILTIN):
        known = {path.name: path for path in _BUILTIN_FOLDER.iterdir() if path.is_dir()}
        name = uri.removeprefix(BUILTIN)
        if name not in known:
            names = ", ".join(f"{BUILTIN}{name}" for name in sorted(known))
            raise ValueError(f"no model {uri!r} comes with efae {__version__}; use {names}")
        return known[name]
    folder = Path(uri)
    is_path = ":" not in uri.partition("/")[0]
    return folder if is_path and any((folder / n).exists() for n in (MANIFEST, WEIGHTS)) else None


def parse_config(uri: str, data: bytes) -> Config:
    """Parse the configuration of an autoencoder in our config.json, as `parse_settings` does."""
    settings = parse_settings(uri, data)
    if not isinstance(settings, Config):
        raise CheckpointError(uri, f"{CONFIG} describes a generator, not an autoencoder")
    return settings


def parse_settings(uri: str, data: bytes) -> AnyConfig:
    """Parse the configuration in our config.json.

    Raises:
        CheckpointError: It describes another kind of model, or holds an unknown setting.
    """
    try:
        settings: Any = json.loads(data)
        name = settings.get("_class_name", CLASS_NAME)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(uri, f"{CONFIG} is not the configuration of a model") from error
    if name not in (CLASS_NAME, _GENERATOR):
        own = f"diffusers:{uri}"
        hint = (
            f": give {own} to use it as it is, without views, or make it equivariant with"
            f" jobs/finetune.py fine_tune --start.model {own}"
        )
        hint = hint if name in CLASSES else ""
        raise CheckpointError(
            uri, f"{CONFIG} describes a model of class {name}, not {CLASS_NAME}{hint}"
        )
    writer = f"written by efae {settings['_efae_version']}, " if "_efae_version" in settings else ""
    try:
        return configuration.parse_run(settings["efae"] if "_class_name" in settings else settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            uri, f"{CONFIG} is {writer}not valid for this efae {__version__} ({error})"
        ) from error


def check_weights(stored: StoredModel, expected: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of stored weights with those that the configuration implies.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape; the first few are named.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.weights.items()}
    faults = [f"{name} is missing" for name in expected if name not in shapes]
    faults += [f"{name} is unknown" for name in shapes if name not in expected]
    faults += [
        f"{name} has shape {shapes[name]}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            stored.uri,
            f"{stored.weights_file}: its weights are not its configuration's:"
            f" {'; '.join(faults[:3])}{more}",
        )


def describe_latent(config: Config, representation: Representation) -> dict[str, Any]:
    """Return the settings that latent-diffusion code reads, in diffusers' names, and the action.

    Latents are scaled already, so the scaling factor is 1 and the shift 0. `force_upcast`, without
    which pipelines of SDXL fail, is off: with it they ask for layers of AutoencoderKL, and the
    adapter itself widens weights that need it. Pipelines compute the pixels per latent cell as
    2 ** (len(block_out_channels) - 1); block_out_channels is left out if they are no power of two.
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
        "force_upcast": False,
        "group": representation.group.name,
        "representation": dict(representation.multiplicities),
    }
    if config.model.downsampling == 2**halvings:
        described["block_out_channels"] = [config.model.encoder_hidden_size] * (halvings + 1)
    return described


def _parse_unlisted(uri: str, folder: Path) -> StoredModel:
    """Read a folder that save_pretrained wrote before manifest.json existed.

    The header of its weights holds the hashes of config.json and of the tensors.
    """
    files = {name: read_file(uri, name, read_from(folder)) for name in (CONFIG, WEIGHTS)}
    config = parse_config(uri, files[CONFIG])
    weights = unpack_tensors(uri, WEIGHTS, files[WEIGHTS])
    length = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
    header = json.loads(files[WEIGHTS][8:length]).get("__metadata__", {})
    if "config_sha256" not in header:
        raise CheckpointError(uri, f"{MANIFEST} is missing")
    if header["config_sha256"] != sha256(files[CONFIG]):
        raise CheckpointError(uri, f"{CONFIG} was changed, or comes from another model")
    if header.get("tensors_sha256") != hash_tensors(weights):
        raise CheckpointError(uri, f"{WEIGHTS} is damaged: its tensors have another sha256")
    files[MANIFEST] = dump_manifest(files, {})
    return StoredModel(uri, files, WEIGHTS, weights, config)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of weights by parameter name, which no file format or device changes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
