"""State <-> folder: safetensors and JSON, hashed, complete or absent. No pickle.

A checkpoint is a folder ``step-00001234`` of six files; the manifest among them is written last,
see `efae.model.stored_files`. It can be read as a model, that of its EMA weights.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipelines import storage
from data_pipelines.storage import Location
from efae import config_forms as configuration
from efae.config import Config
from efae.model.pretrained import StoredModel, parse_config, parse_model
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
        MODEL: pack_tensors(model),
        EMA: pack_tensors(ema),
        OPTIMIZER: pack_tensors(optimizer),
        STATE: json.dumps(dict(metadata), allow_nan=False).encode(),
        CONFIG: configuration.to_json(config).encode(),
    }
    facts = {"step": int(metadata["step"]), "scores": dict(scores or {})}
    manifest, folder = dump_manifest(contents, facts), Location.parse(uri)
    storage.delete(folder / MANIFEST)  # while we write, the folder is not complete
    for name, data in {**contents, MANIFEST: manifest}.items():
        storage.write_bytes(folder / name, data)


def read_checkpoint(uri: str | Path) -> Checkpoint:
    """The checkpoint at a path or URI, after its bytes were checked against the manifest.

    Raises:
        CheckpointError: not a complete, undamaged checkpoint of this format.
        StorageError: the storage refuses or does not answer.
    """
    uri = str(uri)
    manifest = read_manifest(uri)
    files = read_verified(uri, CHECKPOINT_FILES, manifest, _read_from(uri))
    return Checkpoint(
        model=unpack_tensors(uri, MODEL, files[MODEL]),
        ema=unpack_tensors(uri, EMA, files[EMA]),
        optimizer=unpack_tensors(uri, OPTIMIZER, files[OPTIMIZER]),
        metadata=_parse_state(uri, files[STATE]),
        config=parse_config(uri, files[CONFIG]),
    )


def read_origin(uri: str) -> tuple[dict[str, Any], Config]:
    """Metadata and configuration of a checkpoint, without its tensors.

    Raises:
        CheckpointError: not complete, damaged, or of another format.
        StorageError: the storage refuses or does not answer.
    """
    manifest = read_manifest(uri)
    files = read_verified(uri, (STATE, CONFIG), manifest, _read_from(uri))
    return _parse_state(uri, files[STATE]), parse_config(uri, files[CONFIG])


def read_model(uri: str) -> StoredModel:
    """The EMA weights of a checkpoint as a model; or the model in a folder.

    Raises:
        CheckpointError: not complete, damaged, or of another format.
        StorageError: the storage refuses or does not answer.
    """
    read = _read_from(uri)
    return parse_model(uri, read_file(uri, MANIFEST, read), read)


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a checkpoint or model folder; see `parse_manifest`.

    Raises:
        CheckpointError: there is none, it is not a manifest, or of another format.
        StorageError: the storage refuses or does not answer.
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
