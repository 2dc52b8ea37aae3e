"""Index of a shard set: the object ``index.json`` beside its tars, written last.

The shards are plain WebDataset tars that any reader can read. The index adds sizes, checksums and
the offset of every member, so that a sample is sliced from its shard without parsing the tar. It
stores columns instead of one object per sample, which takes about 50 bytes per sample, and the size
of every image if they differ.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipelines import storage
from data_pipelines.images.codec import image_extensions
from data_pipelines.images.headers import MAX_PIXELS
from data_pipelines.shards.intake import shorten
from data_pipelines.shards.tar_members import TarContent, read_members
from data_pipelines.storage import Location, LocationLike

INDEX_NAME = "index.json"
SHEET_NAME, STATISTICS_NAME = "contact_sheet.png", "statistics.json"
"""Files that `describe_set` writes beside the index."""
LABEL = "cls"
"""Extension of the member that holds an image's class."""
CLASSES = "classes"
"""Key of an index's provenance: names of the classes, in order of their labels."""
VERSION = 1
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Members:
    """Places of the members with one extension in a shard; one row per sample, -1 for none."""

    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray


@dataclass(frozen=True)
class Shard:
    """One tar."""

    name: str
    bytes: int
    sha256: str
    keys: list[str]
    members: dict[str, Members]
    left_out: list[str] = field(default_factory=list[str])
    """Keys of samples in the tar that are not part of the set, such as damaged images."""
    sizes: np.ndarray | None = None
    """Height and width of each image, int64 (n, 2); None if they are not recorded."""

    def leave_out(self, keys: Collection[str]) -> "Shard":
        """Return the same tar without the samples of these keys."""
        kept = np.array([key not in keys for key in self.keys], bool)
        members = {
            extension: Members(columns.offset[kept], columns.size[kept], columns.crc32[kept])
            for extension, columns in self.members.items()
            if (columns.offset[kept] >= 0).any()
        }
        remaining = [key for key in self.keys if key not in keys]
        sizes = None if self.sizes is None else self.sizes[kept]
        return replace(self, keys=remaining, members=members, left_out=list(keys), sizes=sizes)

    def images(self) -> Members:
        """Return each sample's image: the member that `image_extensions` prefers.

        Raises:
            ValueError: A sample has no image.
        """
        found = Members(*np.full((3, len(self.keys)), -1, np.int64))
        for extension in image_extensions(self.members):
            missing, members = found.offset < 0, self.members[extension]
            for column in ("offset", "size", "crc32"):
                getattr(found, column)[missing] = getattr(members, column)[missing]
        if (found.offset < 0).any():
            key = self.keys[int(np.argmax(found.offset < 0))]
            raise ValueError(f"sample {key!r} of {self.name} has no image member")
        return found

    def image_place(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (offset, size) of each sample's image."""
        images = self.images()
        return images.offset, images.size

    def span(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (start, end) of the bytes that hold all members of each sample."""
        start = np.full(len(self.keys), self.bytes, np.int64)
        end = np.zeros(len(self.keys), np.int64)
        for members in self.members.values():
            there = members.offset >= 0
            start[there] = np.minimum(start, members.offset)[there]
            end[there] = np.maximum(end, members.offset + members.size)[there]
        return start, end


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a set, in order."""

    shards: tuple[Shard, ...]
    image_shape: Shape | None
    """(C, H, W) of the images, C the largest of any; None if heights or widths differ."""
    provenance: dict[str, Any] = field(default_factory=dict[str, Any])
    """Origin of the images: source, fingerprint, licence, credit."""
    base: str | None = None
    """URI to which the shards' names are relative; None for the folder of the index."""

    @property
    def id(self) -> str:
        """Hash of the content: equal bytes in equal shards give equal ids."""
        content = [
            [
                shard.name,
                shard.sha256,
                len(shard.keys),
                *([shard.left_out] if shard.left_out else []),
            ]
            for shard in self.shards
        ]
        return hashlib.sha256(json.dumps([VERSION, content]).encode()).hexdigest()[:16]

    @property
    def has_sizes(self) -> bool:
        """Whether it has every image's size; indexes of release 0.1 lack those that differ."""
        return self.image_shape is not None or all(
            shard.sizes is not None or not shard.keys for shard in self.shards
        )

    def image_sizes(self) -> np.ndarray:
        """Return height and width of every image, int64 (n, 2); only if it `has_sizes`."""
        assert self.has_sizes
        if self.image_shape is not None:
            count = sum(len(shard.keys) for shard in self.shards)
            return np.tile(np.array(self.image_shape[1:], np.int64), (count, 1))
        sizes = [shard.sizes for shard in self.shards if shard.sizes is not None]
        return np.concatenate([np.zeros((0, 2), np.int64), *sizes])


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _MembersFile(_StrictModel):
    offset: list[int]
    size: list[int]
    crc32: list[int]


class _SizesFile(_StrictModel):
    height: list[int]
    width: list[int]


class _ShardFile(_StrictModel):
    name: str
    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]  # it names a folder of the cache
    keys: list[str]
    members: dict[str, _MembersFile]
    left_out: list[str] = Field(default_factory=list[str])
    image_sizes: _SizesFile | None = None


class _IndexFile(_StrictModel):
    format: Literal["efae-shards"]
    version: int
    id: str
    image_shape: list[int] | None
    provenance: dict[str, Any]
    base: str | None = None
    shards: list[_ShardFile]


def load_index(uri: LocationLike) -> ShardIndex:
    """Read and check ``index.json`` of the shard set at `uri`.

    Raises:
        ValueError: There is no index, or this version cannot read it.
    """
    folder = Location.parse(uri)
    location = folder / INDEX_NAME
    try:
        data = storage.read_bytes(location)
    except FileNotFoundError as error:
        raise ValueError(_explain_missing(folder)) from error
    return parse_index(data, location)


def parse_index(data: bytes, where: LocationLike) -> ShardIndex:
    """Parse what `dump_index` wrote; `where` names the file in errors."""
    try:
        tree = json.loads(data)
        version = cast(dict[str, Any], tree).get("version") if isinstance(tree, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise ValueError(
                f"{where} has format version {version}; this package reads {VERSION}: install the"
                " package that wrote it, or build the shards again"
            )
        file = _IndexFile.model_validate(tree)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, ValidationError) as error:
        detail = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            detail = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(f"{where} is not a shard index ({detail}): build it again") from error
    shards = tuple(_read_shard(shard, where) for shard in file.shards)
    shape = file.image_shape
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise ValueError(f"{where}: image_shape {shape} is not (C, H, W)")
    if shape is not None and shape[1] * shape[2] > MAX_PIXELS:
        raise ValueError(f"{where}: image_shape {shape} has more than {MAX_PIXELS} pixels")
    if file.base is not None:
        _check_base(file.base, where)
    image_shape = (shape[0], shape[1], shape[2]) if shape else None
    index = ShardIndex(shards, image_shape, file.provenance, file.base)
    if index.id != file.id:
        raise ValueError(f"{where}: id {file.id} does not match its shards ({index.id}): damaged")
    return index


def dump_index(index: ShardIndex) -> bytes:
    """Return ``index.json``; equal indexes give equal bytes."""
    shards = [
        {
            "name": shard.name,
            "bytes": shard.bytes,
            "sha256": shard.sha256,
            "keys": shard.keys,
            "members": {
                extension: {
                    "offset": members.offset.tolist(),
                    "size": members.size.tolist(),
                    "crc32": members.crc32.tolist(),
                }
                for extension, members in sorted(shard.members.items())
            },
            **({"left_out": shard.left_out} if shard.left_out else {}),
            **({} if index.image_shape else _dump_sizes(shard)),
        }
        for shard in index.shards
    ]
    tree = {
        "format": "efae-shards",
        "version": VERSION,
        "id": index.id,
        "image_shape": list(index.image_shape) if index.image_shape else None,
        "provenance": index.provenance,
        **({"base": index.base} if index.base else {}),
        "shards": shards,
    }
    return json.dumps(tree, separators=(",", ":")).encode()


def index_tar(path: Path, name: str) -> Shard:
    """Read the structure and checksums of a tar that this package wrote.

    Raises:
        ValueError: The tar is compressed, cut off or has an invalid member; lists all faults.
    """
    content = read_members(path, name, name, None)
    if content.faults:
        raise ValueError(shorten([fault.text for fault in content.faults], "; "))
    return make_shard(name, content)


def make_shard(name: str, content: TarContent) -> Shard:
    """Convert the content of a tar to its entry in the index."""
    rows = content.rows.values()
    members: dict[str, Members] = {}
    for extension in sorted({extension for row in rows for extension in row}):
        columns = np.array([row.get(extension, (-1, -1, -1)) for row in rows], np.int64)
        members[extension] = Members(*columns.T)
    return Shard(name, content.bytes, content.sha256, list(content.rows), members)


def write_index(uri: LocationLike, index: ShardIndex) -> None:
    """Write ``index.json``, which makes the set complete."""
    storage.write_bytes(Location.parse(uri) / INDEX_NAME, dump_index(index))


def index_images(shard: Shard, shapes: Sequence[Shape], provenance: dict[str, Any]) -> ShardIndex:
    """Return the index of one shard whose images have these shapes (C, H, W), in its order."""
    sizes = np.array([shape[1:] for shape in shapes], np.int64).reshape(-1, 2)
    return ShardIndex((replace(shard, sizes=sizes),), _common_shape(set(shapes)), provenance)


def join_indexes(
    indexes: Sequence[ShardIndex], provenance: dict[str, Any], base: str | None = None
) -> ShardIndex:
    """Join indexes of one shard each."""
    shapes = {index.image_shape for index in indexes if index.shards[0].keys}
    known = {shape for shape in shapes if shape is not None}
    return ShardIndex(
        tuple(replace(index.shards[0], sizes=index.image_sizes()) for index in indexes),
        _common_shape(known) if known == shapes else None,
        provenance,
        base,
    )


def _common_shape(shapes: set[Shape]) -> Shape | None:
    """Return (C, H, W) of images of these shapes, C the largest of any; None if H or W differ."""
    if len({shape[1:] for shape in shapes}) != 1:
        return None
    return max(shapes)


def _dump_sizes(shard: Shard) -> dict[str, Any]:
    if shard.sizes is None:
        return {}
    height, width = shard.sizes.T.tolist()
    return {"image_sizes": {"height": height, "width": width}}


def _read_sizes(file: _ShardFile, where: LocationLike) -> np.ndarray | None:
    if file.image_sizes is None:
        return None
    height, width = file.image_sizes.height, file.image_sizes.width
    if not len(height) == len(width) == len(file.keys):
        raise ValueError(f"{where}: {file.name}, image_sizes: columns of unequal length")
    if min([1, *height, *width]) < 1 or max([1, *height, *width]) > MAX_PIXELS:
        raise ValueError(f"{where}: {file.name}, image_sizes: not from 1 to {MAX_PIXELS}")
    sizes = np.array([height, width], np.int64).T
    if (sizes.prod(axis=1) > MAX_PIXELS).any():
        raise ValueError(f"{where}: {file.name}, image_sizes: more than {MAX_PIXELS} pixels")
    return sizes


def _read_shard(file: _ShardFile, where: LocationLike) -> Shard:
    members: dict[str, Members] = {}
    for extension, columns in file.members.items():
        try:
            arrays = [np.array(column, np.int64) for column in columns.model_dump().values()]
        except OverflowError as error:
            raise ValueError(f"{where}: {file.name}, {extension}: {error}") from error
        if any(len(array) != len(file.keys) for array in arrays):
            raise ValueError(f"{where}: {file.name}, {extension}: columns of unequal length")
        offset, size, _ = arrays
        if ((offset < -1) | (size < -1) | ((offset < 0) != (size < 0))).any():
            raise ValueError(f"{where}: {file.name}, {extension}: members before the shard's start")
        if (offset > file.bytes - size).any():
            raise ValueError(f"{where}: {file.name}, {extension}: members beyond the shard's end")
        members[extension] = Members(*arrays)
    if file.name.startswith("/") or ".." in file.name.split("/"):
        raise ValueError(f"{where}: shard name {file.name!r} leaves the folder")
    sizes = _read_sizes(file, where)
    return Shard(file.name, file.bytes, file.sha256, file.keys, members, file.left_out, sizes)


def _check_base(base: str, where: LocationLike) -> None:
    """Check that a remote index does not make this machine read local files."""
    if Location.parse(base).path is not None and Location.parse(where).path is None:
        raise ValueError(f"{where}: base {base!r} is a local path, but the index is remote")


def _explain_missing(folder: Location) -> str:
    parts = [folder / part for part in ("train", "held_out")]
    if all(storage.exists(part / INDEX_NAME) for part in parts):
        return f"{folder} holds two shard sets: open {parts[0]} or {parts[1]}"
    return (
        f"{folder} holds no {INDEX_NAME}: check the URI, or build shards there with"
        f" `python -m data_pipelines.build_shards --source SOURCE --output {folder}`, or index"
        f" tars that are there with `python -m data_pipelines.index_shards {folder}`"
    )
