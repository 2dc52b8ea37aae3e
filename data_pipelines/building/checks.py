"""Checks of foreign tars: their faults, and the members that are left out."""

import mmap
import re
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines import storage
from data_pipelines.building import unfinished
from data_pipelines.images.codec import (
    ARRAY_EXTENSION,
    count_frames,
    decode_image,
    image_extensions,
    read_shape,
)
from data_pipelines.shards.index import (
    INDEX_NAME,
    SHEET_NAME,
    STATISTICS_NAME,
    Shape,
    Shard,
    ShardIndex,
    index_images,
    make_shard,
)
from data_pipelines.shards.intake import (
    FAULTS,
    FAULTS_NAME,
    LEFT_OUT,
    LeftOut,
    SourceFaults,
    find_litter,
)
from data_pipelines.shards.tar_members import Fault, TarContent, list_reasons, read_members
from data_pipelines.storage import Location
from data_pipelines.storage.tree import FOLDER_NOT_UTF8, NOT_UTF8, UNLISTABLE, Tree

_COMPRESSED = "(gz|bz2|xz|zst|lz4|lz|lzma|br|z)"
_COMPRESSED_TAR = re.compile(rf"\.(tar\.{_COMPRESSED}|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_COMPRESSED_MEMBER = re.compile(rf"\.{_COMPRESSED}$")
_HIDES_TARS = (UNLISTABLE, FOLDER_NOT_UTF8)
_UNNAMED = (NOT_UTF8, "")  # may be a tar
_TAR_VERSION = "tar_version"
"""Key of a record's provenance."""
_OUR_FILES = (INDEX_NAME, STATISTICS_NAME, SHEET_NAME, FAULTS_NAME)


@dataclass(frozen=True)
class TarChecks:
    """Checks that apply to every tar."""

    base: Location
    """Folder to which the tars' names are relative."""
    output: Location | None = None
    """Folder for the records of tars without faults; None keeps no records."""
    skips_bad_images: bool = False
    verify: bool = False
    """Whether to decode images instead of reading only their headers."""
    dotted_keys: bool = False
    """Whether a sample may have several images that all have a dot in their extension."""

    def describe(self) -> dict[str, Any]:
        """Return the options that a record depends on, as JSON types."""
        return {
            "skips_bad_images": self.skips_bad_images,
            "verify": self.verify,
            "dotted_keys": self.dotted_keys,
        }

    def accept(self, record: ShardIndex) -> bool:
        """Return whether the record is still valid; an earlier run may have checked less."""
        made = record.provenance.get("checks")
        return made is not None and (
            (made["verify"] or not self.verify)
            and (self.dotted_keys or not made["dotted_keys"])
            and (self.skips_bad_images or not record.shards[0].left_out)
            and record.has_sizes
        )

    def is_of_current_tar(self, record: ShardIndex) -> bool:
        """Return whether the tar is still the one that the record describes."""
        version = record.provenance.get(_TAR_VERSION)
        try:
            return bool(version) and version == storage.read_version(
                self.base / record.shards[0].name
            )
        except FileNotFoundError:
            return False


def select_tars(
    folder: Location, tree: Tree, output: Location | None = None
) -> tuple[dict[str, int], LeftOut]:
    """Return {name: bytes} of the tars below `folder`, and the other files.

    Args:
        folder: Folder that was listed.
        tree: Listing of the folder.
        output: Output folder, whose files are not part of the source.

    Raises:
        SourceFaults: Tars are compressed or cannot be read; lists all of them.
        ValueError: There is no tar.
    """
    own = f"{output}/".removeprefix(f"{folder}/") if output and output != folder else ()
    tars: dict[str, int] = {}
    faults: list[str] = []
    left_out = LeftOut()
    for name in (*tree.files, *tree.others):
        path, reason = PurePosixPath(name), tree.others.get(name)
        suffix = path.suffix.lower()
        if name.startswith(own) or path.name in _OUR_FILES or unfinished.FOLDER in path.parts:
            continue
        if litter := find_litter(name):
            left_out.add(litter, name)
        elif reason and (suffix == ".tar" or reason in _HIDES_TARS or (reason, suffix) == _UNNAMED):
            faults.append(f"{folder.uri_of(name)}: {reason}")
        elif name.startswith("/") and suffix == ".tar":  # in an object store
            faults.append(f"{folder.uri_of(name)}: two slashes lead to it: rename it")
        elif _COMPRESSED_TAR.search(name):
            faults.append(f"{folder.uri_of(name)} is compressed: unpack it to a plain tar")
        elif reason or suffix != ".tar":
            kind = suffix if re.fullmatch("[.][a-z0-9]{1,8}", suffix) else "no extension"
            left_out.add(reason or f"not a tar ({kind})", name)
        else:
            tars[name] = tree.files[name]
    if faults:
        raise SourceFaults(str(folder), faults)
    if not tars:
        remedy = ": name the folder that it lies in" if folder.uri.lower().endswith(".tar") else ""
        raise ValueError(f"{folder} holds no .tar file{remedy}")
    return tars, left_out


def check_tar(checks: TarChecks, name: str) -> tuple[ShardIndex | None, list[str]]:
    """Index one foreign tar and keep its record; runs as a Ray task or in this process.

    Returns:
        An index of this tar alone and no faults, or None and one sentence per fault. The index's
        provenance has `LEFT_OUT`, and the `FAULTS` of skipped samples.

    Raises:
        StorageError: The storage refuses the request or does not answer.
    """
    location = checks.base / name
    try:
        # Before it is read: if the tar changes meanwhile, the record is not used.
        version = "" if checks.output is None else storage.read_version(location)
        with open_copy(location) as path:
            record, faults = _read_tar(path, location.uri, name, checks)
    except FileNotFoundError as error:
        if location.path is not None:
            raise  # it was listed: this is another machine
        return None, [str(error)]
    if record is not None and checks.output is not None:
        record.provenance[_TAR_VERSION] = version
        unfinished.keep_record(checks.output, name, record)
    return record, faults


def _read_tar(
    path: Path, uri: str, name: str, checks: TarChecks
) -> tuple[ShardIndex | None, list[str]]:
    content = read_samples(path, name, uri, checks.dotted_keys)
    shard, faults = make_shard(name, content), content.faults
    for key in shard.keys:
        if leaves_folder(key):
            text = f"{uri}: sample {key!r} leaves the folder: rename its members"
            faults.append(Fault("name that leaves the folder", key, text, skippable=False))
    valid = shard.leave_out(list_reasons(faults)) if faults else shard
    shapes = _check_images(path, uri, valid, content, checks.verify)
    texts = [fault.text for fault in faults]
    if faults and not (checks.skips_bad_images and all(fault.skippable for fault in faults)):
        return None, texts
    provenance: dict[str, Any] = {"checks": checks.describe()}
    if faults:
        reasons = list_reasons(faults)
        shard = shard.leave_out(reasons)
        for key, reason in reasons.items():
            content.left_out.add(reason, f"{name}: {key}")
        provenance[FAULTS] = texts
    if content.left_out.counts:
        provenance[LEFT_OUT] = content.left_out.to_json()
    return index_images(shard, [shapes[key] for key in shard.keys], provenance), []


def read_samples(path: Path, name: str, where: str, dotted_keys: bool) -> TarContent:
    """Read a foreign tar, with the faults of its samples.

    Args:
        path: Local file to read.
        name: Name of the tar in its set.
        where: Name or URI of the tar, for faults.
        dotted_keys: Whether a sample may have several images that have a dot in their extension.
    """
    content = read_members(path, name, where, ())
    faulty = {fault.key for fault in content.faults}
    for key, row in content.rows.items():
        images = _find_image_files(tuple(row))
        if not images and ARRAY_EXTENSION not in row:
            if key not in faulty:
                content.faults.append(_miss_image(key, sorted(row), where))
        elif len(images) > 1:
            if dotted_keys or "." not in images[0]:
                example = f"{name}: {key}.{images[1]}"
                content.left_out.add("further image of a sample", example, len(images) - 1)
            else:
                content.faults.append(_refuse_dotted_key(key, images, where))
    return content


@lru_cache
def _find_image_files(extensions: tuple[str, ...]) -> list[str]:
    return [name for name in image_extensions(extensions) if name != ARRAY_EXTENSION]


def _miss_image(key: str, extensions: list[str], where: str) -> Fault:
    text = f"{where}: sample {key!r} has no image member"
    for extension in extensions:
        if packed := _COMPRESSED_MEMBER.search(f".{extension}"):
            text += f", but .{extension}, which is compressed: unpack it"
            return Fault(f"compressed member ({packed[0]})", key, text)
    return Fault("sample without an image", key, f"{text}, but .{', .'.join(extensions[:3])}")


def _refuse_dotted_key(key: str, images: list[str], where: str) -> Fault:
    more = f" and {len(images) - 2} more" if len(images) > 2 else ""
    text = (
        f"{where}: {key + '.' + images[0]!r} and {key + '.' + images[1]!r}{more} are one sample,"
        f" {key!r}, since a key ends at the first dot: rename them, or use --allow dotted-keys"
    )
    return Fault("dotted key", key, text, skippable=False)


@contextmanager
def open_copy(location: Location, expected_bytes: int | None = None) -> Generator[Path]:
    """Yield a local file itself, or a temporary copy of a remote one."""
    if location.path is not None:
        yield location.path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy.tar"
        storage.download(location, path, expected_bytes)
        yield path


@contextmanager
def map_file(path: Path) -> Generator[mmap.mmap]:
    """Map a non-empty file into memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def leaves_folder(key: str) -> bool:
    """Return whether extracting the sample would write outside the folder."""
    return key.startswith(("/", "\\")) or ".." in key.replace("\\", "/").split("/")


def find_repeated_keys(shards: Iterable[Shard]) -> Iterator[str]:
    """Yield one sentence, with both shards, for each key that two samples have."""
    first: dict[str, str] = {}
    for shard in shards:
        for key, count in Counter(shard.keys).items():
            where = first.setdefault(key, shard.name)
            if where != shard.name or count > 1:
                yield f"key {key!r} is in {where} and in {shard.name}"


def _check_images(
    path: Path, uri: str, shard: Shard, content: TarContent, verify: bool
) -> dict[str, Shape]:
    """Return the images' shapes by key; add damaged images and further frames to `content`."""
    shapes: dict[str, Shape] = {}
    if not shard.keys:
        return shapes
    with map_file(path) as tar:
        for key, offset, size in zip(shard.keys, *shard.image_place(), strict=True):
            data = tar[offset : offset + size]
            try:
                shape = read_shape(data)
                if verify:
                    decode_image(data, shape[0])
            except ValueError as error:
                fault = Fault("damaged image", key, f"{uri}: sample {key!r}: {error}")
                content.faults.append(fault)
                continue
            shapes[key] = shape
            if (frames := count_frames(data)) > 1:
                example = f"{shard.name}: {key}"
                content.left_out.add("further frame or page of a file", example, frames - 1)
    return shapes
