"""One checkpoint: a folder of safetensors and JSON, hashed, complete or absent. No pickle.

The folder ``step-00001234`` holds six files, of which the manifest is written last; see
`efae.model.stored_files`. It can also be read as a model, with the EMA weights.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipelines import storage
from data_pipelines.storage import Location
from efae.config import AnyConfig
from efae.config import forms as configuration
from efae.model.pretrained import StoredModel, parse_model, parse_settings
from efae.model.stored_files import (
    CHECKPOINT_FILES,
    CONFIG,
    EMA,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointError,
    dump_manifest,
    pack_tensors,
    parse_manifest,
    read_file,
    read_verified,
    unpack_tensors,
)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to resume as if it had not stopped.

    Attributes:
        model: Weights by parameter name, on the CPU.
        ema: Moving average of the weights, by the same names.
        optimizer: State of the optimizer by PARAMETER.KEY.
        metadata: JSON values; always with "step", the number of optimizer updates done.
        config: Configuration of the run.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    metadata: dict[str, Any]
    config: AnyConfig


def checkpoint_name(step: int) -> str:
    """Return the folder name of a checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def write_checkpoint(
    uri: str | Path,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    config: AnyConfig,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Write a checkpoint to a folder or URI, straight from memory.

    Equal state gives equal bytes. Tensors may be on any device but may not share memory.

    Args:
        uri: Path or URI of the folder; a checkpoint there is replaced.
        model: Weights by parameter name.
        ema: Averaged weights, by the same names.
        optimizer: State of the optimizer by PARAMETER.KEY.
        metadata: JSON values, "step" among them.
        config: Configuration of the run.
        scores: Finite numbers by which a run's checkpoints are compared; kept in the manifest.

    Raises:
        ValueError: The metadata or scores are not finite JSON.
        KeyError: The metadata lack "step".
        StorageError: The storage refuses or does not answer.
    """
    contents = {
        MODEL: pack_tensors(model),
        EMA: pack_tensors(ema),
        OPTIMIZER: pack_tensors(optimizer),
        STATE: json.dumps(dict(metadata), allow_nan=False).encode(),
        CONFIG: configuration.to_json(config).encode(),
    }
    facts = {"step": int(metadata["step"]), "scores": dict(scores or {})}
    manifest, folder = dump_manifest(contents, facts), Location.parse(uri)
    storage.delete(folder / MANIFEST)  # the folder stays incomplete while we write
    for name, data in {**contents, MANIFEST: manifest}.items():
        storage.write_bytes(folder / name, data)


def read_checkpoint(uri: str | Path) -> Checkpoint:
    """Read the checkpoint at a path or URI, and check its bytes against the manifest.

    Raises:
        CheckpointError: The folder is no complete, undamaged checkpoint of this format.
        StorageError: The storage refuses or does not answer.
    """
    uri = str(uri)
    manifest = read_manifest(uri)
    files = read_verified(uri, CHECKPOINT_FILES, manifest, _read_from(uri))
    return Checkpoint(
        model=unpack_tensors(uri, MODEL, files[MODEL]),
        ema=unpack_tensors(uri, EMA, files[EMA]),
        optimizer=unpack_tensors(uri, OPTIMIZER, files[OPTIMIZER]),
        metadata=_parse_state(uri, files[STATE]),
        config=parse_settings(uri, files[CONFIG]),
    )


def read_origin(uri: str) -> tuple[dict[str, Any], AnyConfig]:
    """Read metadata and configuration of a checkpoint, without its tensors.

    Raises:
        CheckpointError: The folder is incomplete, damaged, or of another format.
        StorageError: The storage refuses or does not answer.
    """
    manifest = read_manifest(uri)
    files = read_verified(uri, (STATE, CONFIG), manifest, _read_from(uri))
    return _parse_state(uri, files[STATE]), parse_settings(uri, files[CONFIG])


def read_model(uri: str) -> StoredModel:
    """Read a model folder, or a checkpoint as a model with its EMA weights.

    Raises:
        CheckpointError: The folder is incomplete, damaged, or of another format.
        StorageError: The storage refuses or does not answer.
    """
    read = _read_from(uri)
    return parse_model(uri, read_file(uri, MANIFEST, read), read)


def read_manifest(uri: str) -> dict[str, Any]:
    """Read the manifest of a checkpoint or model folder; see `parse_manifest`.

    Raises:
        CheckpointError: The manifest is missing, malformed or of another format.
        StorageError: The storage refuses or does not answer.
    """
    return parse_manifest(uri, read_file(uri, MANIFEST, _read_from(uri)))


def _read_from(uri: str) -> Callable[[str], bytes]:
    folder = Location.parse(uri)
    return lambda name: storage.read_bytes(folder / name)


def _parse_state(uri: str, data: bytes) -> dict[str, Any]:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(uri, f"{STATE} is not JSON") from error
