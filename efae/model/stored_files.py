"""The format of checkpoint and model folders: safetensors, and a manifest with hashes.

``manifest.json`` holds the size and sha256 of the other files and is written last, so a folder
without it is half-written. Only the names below are ever read: a name in a manifest never becomes
a path. Nothing is pickled.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OWN_CONFIG, OWN_WEIGHTS = "efae.json", "efae.safetensors"
"""Our part of a model folder that is also a folder of one of diffusers' own classes."""
STATE, CONFIG, MANIFEST = "state.json", "config.json", "manifest.json"
CHECKPOINT_FILES = (MODEL, EMA, OPTIMIZER, STATE, CONFIG)
MODEL_FILES = (WEIGHTS, CONFIG)
_VERSIONS = {
    frozenset(CHECKPOINT_FILES): 2,
    frozenset({MODEL, CONFIG}): 2,  # a model registered before version 3
    frozenset(MODEL_FILES): 3,
    frozenset({*MODEL_FILES, OWN_CONFIG, OWN_WEIGHTS}): 4,
}


class CheckpointError(ValueError):
    """A checkpoint or model folder cannot be used.

    Attributes:
        uri: Folder.
        reason: Fault of the folder.
    """

    def __init__(self, uri: str, reason: str):
        super().__init__(f"{uri}: {reason}")
        self.uri = uri
        self.reason = reason

    def __reduce__(self):  # Ray sends exceptions between processes
        return CheckpointError, (self.uri, self.reason)


def sha256(data: bytes) -> str:
    """Return the sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def dump_manifest(contents: Mapping[str, bytes], facts: Mapping[str, Any]) -> bytes:
    """Return the manifest of a folder with these files.

    Args:
        contents: Bytes by file name.
        facts: JSON values to keep beside the hashes.

    Raises:
        ValueError: The facts are not finite JSON.
    """
    files = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in contents.items()}
    manifest = {"format_version": _VERSIONS[frozenset(contents)], **facts, "files": files}
    return json.dumps(manifest, indent=2, allow_nan=False).encode()


def parse_manifest(uri: str, data: bytes) -> dict[str, Any]:
    """Parse a manifest, the inverse of `dump_manifest`, and check its format and file names.

    Args:
        uri: Folder, for messages.
        data: Bytes of the manifest.

    Returns:
        {"format_version": int, "files": {name: {"bytes": int, "sha256": str}}} and the facts.

    Raises:
        CheckpointError: The data are no manifest, or of another format.
    """
    try:
        manifest = json.loads(data)
        version, files = manifest["format_version"], manifest["files"]
        names = frozenset(files)
        sizes_and_hashes = [(int(f["bytes"]), str(f["sha256"])) for f in files.values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(uri, f"{MANIFEST} is not a manifest") from error
    if version not in _VERSIONS.values():
        raise CheckpointError(
            uri, f"format version {version!r}; this efae reads 2 to 4: use another efae"
        )
    if _VERSIONS.get(names) != version or not sizes_and_hashes:
        raise CheckpointError(uri, f"{MANIFEST} lists {sorted(names)}")
    return manifest


def read_from(folder: Path) -> Callable[[str], bytes]:
    """Return a function that reads a file of a local folder by its name."""
    return lambda name: (folder / name).read_bytes()


def read_file(uri: str, name: str, read: Callable[[str], bytes]) -> bytes:
    """Read one file of a folder, without verifying it.

    Args:
        uri: Folder, for messages.
        name: Name of the file.
        read: Function that returns a file of the folder by its name.

    Raises:
        CheckpointError: The file is missing.
    """
    try:
        return read(name)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(uri, f"{name} is missing") from error


def read_verified(
    uri: str, names: Iterable[str], manifest: Mapping[str, Any], read: Callable[[str], bytes]
) -> dict[str, bytes]:
    """Read files of a folder by name, and verify each against the manifest.

    Args:
        uri: Folder, for messages.
        names: Names of the files.
        manifest: Manifest, as `parse_manifest` returns it.
        read: Function that returns a file of the folder by its name.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    found: dict[str, bytes] = {}
    for name in names:
        if name not in manifest["files"]:
            raise CheckpointError(
                uri, f"holds no {name}: it is a model, not a checkpoint to resume from"
            )
        found[name] = data = read_file(uri, name, read)
        expected = manifest["files"][name]
        if len(data) != expected["bytes"]:
            raise CheckpointError(uri, f"{name} has {len(data)} bytes, not {expected['bytes']}")
        if sha256(data) != expected["sha256"]:
            raise CheckpointError(uri, f"{name} is damaged: its sha256 is not the manifest's")
    return found


def pack_tensors(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file; equal tensors give equal bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata)


def unpack_tensors(uri: str, name: str, data: bytes) -> dict[str, Tensor]:
    """Read a safetensors file to tensors on the CPU; `uri` and `name` are for messages.

    Raises:
        CheckpointError: The data are no safetensors file.
    """
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(uri, f"{name} is not a safetensors file ({error})") from error
