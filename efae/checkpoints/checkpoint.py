"""State <-> folder: safetensors and JSON, hashed, complete or absent. No pickle.

A checkpoint is a folder ``step-00001234`` of six files. ``manifest.json`` holds the bytes and
sha256 of the others and is written last, so a folder without it is half-written. A model is the
same idea with the EMA weights alone; a checkpoint can be read as a model.

Only the names below are ever read: what a manifest says never becomes a path.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from data_pipelines import storage
from data_pipelines.storage import Location
from efae import config_forms as configuration
from efae.config import Config

FORMAT_VERSION = 2
MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE, CONFIG, MANIFEST = "state.json", "config.json", "manifest.json"
CHECKPOINT_FILES = (MODEL, EMA, OPTIMIZER, STATE, CONFIG)
MODEL_FILES = (MODEL, CONFIG)


class CheckpointError(Exception):
    """A checkpoint or model folder that must not be used, and why.

    Attributes:
        uri: the folder.
        reason: what is wrong with it.
    """

    def __init__(self, uri: str, reason: str):
        super().__init__(f"{uri}: {reason}")
        self.uri = uri
        self.reason = reason

    def __reduce__(self):  # Ray sends exceptions between processes
        return CheckpointError, (self.uri, self.reason)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on as if nothing had happened.

    Attributes:
        model: the weights by parameter name, on the CPU.
        ema: their moving average, by the same names.
        optimizer: its state by PARAMETER.KEY.
        metadata: JSON values; "step", the optimizer updates done, is always there.
        config: of the run.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    metadata: dict[str, Any]
    config: Config


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def write_checkpoint(
    uri: str | Path,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    config: Config,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Writes a checkpoint to a folder or URI, straight from memory.

    Equal state gives equal bytes. Tensors may be on any device but may not share memory.

    Args:
        uri: a checkpoint there is replaced.
        model: as in `Checkpoint`, and so the others.
        ema: the averaged weights.
        optimizer: state by PARAMETER.KEY.
        metadata: JSON values, "step" among them.
        config: of the run.
        scores: what checkpoints of a run are compared by, kept in the manifest; finite.

    Raises:
        ValueError: the metadata or scores are not finite JSON.
        KeyError: "step" is not among them.
        StorageError: the storage refuses or does not answer.
    """
    contents = {
        MODEL: _pack(model),
        EMA: _pack(ema),
        OPTIMIZER: _pack(optimizer),
        STATE: json.dumps(dict(metadata), allow_nan=False).encode(),
        CONFIG: configuration.to_json(config).encode(),
    }
    _write_folder(str(uri), contents, {"step": int(metadata["step"]), "scores": dict(scores or {})})


def read_checkpoint(uri: str | Path) -> Checkpoint:
    """The checkpoint at a path or URI, after its bytes were checked against the manifest.

    Raises:
        CheckpointError: not a complete, undamaged checkpoint of this format.
        StorageError: the storage refuses or does not answer.
    """
    uri = str(uri)
    manifest = read_manifest(uri)
    model, ema, optimizer, state, config = (
        read_verified(uri, name, manifest) for name in CHECKPOINT_FILES
    )
    return Checkpoint(
        model=_unpack(uri, MODEL, model),
        ema=_unpack(uri, EMA, ema),
        optimizer=_unpack(uri, OPTIMIZER, optimizer),
        metadata=_parse_state(uri, state),
        config=_parse_config(uri, config),
    )


def read_origin(uri: str) -> tuple[dict[str, Any], Config]:
    """Metadata and configuration of a checkpoint, without its tensors.

    Raises:
        CheckpointError: not complete, damaged, or of another format.
        StorageError: the storage refuses or does not answer.
    """
    manifest = read_manifest(uri)
    state, config = (read_verified(uri, name, manifest) for name in (STATE, CONFIG))
    return _parse_state(uri, state), _parse_config(uri, config)


def write_model(
    directory: Path, weights: Mapping[str, Tensor], config: Config, card: Mapping[str, Any]
) -> None:
    """Writes a model into `directory`, which is made if need be.

    Args:
        directory: a local folder; a model in it is replaced.
        weights: by parameter name.
        config: what the model is built from.
        card: JSON values that travel in the manifest.
    """
    contents = {MODEL: _pack(weights), CONFIG: configuration.to_json(config).encode()}
    _write_folder(str(directory), contents, {"card": dict(card)})


def read_model(uri: str | Path) -> tuple[dict[str, Tensor], Config]:
    """Weights (on the CPU) and configuration of a model, or the EMA weights of a checkpoint.

    Raises:
        CheckpointError: not complete, damaged, or of another format.
        StorageError: the storage refuses or does not answer.
    """
    uri = str(uri)
    manifest = read_manifest(uri)
    contents = {name: read_file(uri, name) for name in model_files(manifest)}
    return parse_model(uri, manifest, contents)


def parse_model(
    uri: str, manifest: Mapping[str, Any], contents: Mapping[str, bytes]
) -> tuple[dict[str, Tensor], Config]:
    """As `read_model` gives it, from the bytes of `model_files` by name; `uri` is for messages.

    Raises:
        CheckpointError: they are not what the manifest says, or no weights and configuration.
    """
    for name, data in contents.items():
        check_file(uri, name, data, manifest)
    weights, config = model_files(manifest)
    return _unpack(uri, weights, contents[weights]), _parse_config(uri, contents[config])


def model_files(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """The names of weights and configuration in a folder with this manifest."""
    return (EMA if EMA in manifest["files"] else MODEL), CONFIG


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a checkpoint or model folder, checked for format and file names.

    Returns:
        {"format_version": int, "files": {name: {"bytes": int, "sha256": str}}} and the facts that
        the writer added: "step", or "card".

    Raises:
        CheckpointError: there is none, it is not a manifest, or of another format.
        StorageError: the storage refuses or does not answer.
    """
    return parse_manifest(uri, read_file(uri, MANIFEST))


def parse_manifest(uri: str, data: bytes) -> dict[str, Any]:
    """The manifest in `data`, as `read_manifest` gives it; `uri` is for messages.

    Raises:
        CheckpointError: not a manifest, or of another format.
    """
    try:
        manifest = json.loads(data)
        version, files = manifest["format_version"], manifest["files"]
        names = set(files)
        sizes_and_hashes = [(int(f["bytes"]), str(f["sha256"])) for f in files.values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(uri, f"{MANIFEST} is not a manifest") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            uri, f"format version {version!r}; this efae reads {FORMAT_VERSION}: use another efae"
        )
    if names not in (set(CHECKPOINT_FILES), set(MODEL_FILES)) or not sizes_and_hashes:
        raise CheckpointError(uri, f"{MANIFEST} lists {sorted(names)}")
    return manifest


def read_verified(uri: str, name: str, manifest: Mapping[str, Any]) -> bytes:
    """One file, after its bytes were compared with the manifest.

    Raises:
        CheckpointError: missing or damaged.
        StorageError: the storage refuses or does not answer.
    """
    if name not in manifest["files"]:
        raise CheckpointError(
            uri, f"holds no {name}: it is a model, not a checkpoint to go on from"
        )
    data = read_file(uri, name)
    check_file(uri, name, data, manifest)
    return data


def read_file(uri: str, name: str) -> bytes:
    """One file of a checkpoint or model folder, unchecked.

    Raises:
        CheckpointError: missing.
        StorageError: the storage refuses or does not answer.
    """
    try:
        return storage.read_bytes(Location.parse(uri) / name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(uri, f"{name} is missing") from error


def check_file(uri: str, name: str, data: bytes, manifest: Mapping[str, Any]) -> None:
    """Compares size and sha256 of the file `name` with the manifest's.

    Raises:
        CheckpointError: they differ.
    """
    expected = manifest["files"][name]
    if len(data) != expected["bytes"]:
        raise CheckpointError(uri, f"{name} has {len(data)} bytes, not {expected['bytes']}")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CheckpointError(uri, f"{name} is damaged: its sha256 is not the manifest's")


def _write_folder(uri: str, contents: Mapping[str, bytes], facts: dict[str, Any]) -> None:
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    facts = {"format_version": FORMAT_VERSION, **facts, "files": files}
    manifest = json.dumps(facts, indent=2, allow_nan=False).encode()
    folder = Location.parse(uri)
    storage.delete(folder / MANIFEST)  # while we write, the folder is not complete
    for name, data in {**contents, MANIFEST: manifest}.items():
        storage.write_bytes(folder / name, data)


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _unpack(uri: str, name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(uri, f"{name} is not a safetensors file ({error})") from error


def _parse_state(uri: str, data: bytes) -> dict[str, Any]:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(uri, f"{STATE} is not JSON") from error


def _parse_config(uri: str, data: bytes) -> Config:
    try:
        return configuration.from_json(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(uri, f"{CONFIG} is not valid for this efae ({error})") from error
