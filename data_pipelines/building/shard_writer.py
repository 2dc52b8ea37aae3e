"""One shard: read its images, write the tar, upload it, keep its record. Runs on any node."""

import errno
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import storage
from data_pipelines.building import unfinished
from data_pipelines.building.sample_encoding import EncodedImage, Entry
from data_pipelines.building.sources import SampleSource
from data_pipelines.images.codec import image_extensions
from data_pipelines.shards.index import LABEL, Shape, Shard, ShardIndex, index_images, index_tar
from data_pipelines.shards.intake import FAULTS, LEFT_OUT, LeftOut
from data_pipelines.storage import Location
from data_pipelines.storage.files import FULL_DISK
from data_pipelines.storage.retries import StorageError

_JOB = "job"
_DAMAGED = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ELOOP, errno.EISDIR)
"""Error numbers of one file, not of its disk or server."""


@dataclass(frozen=True)
class ShardJob:
    """A shard to write."""

    folder: Location
    """Folder of the set."""
    name: str
    entries: list[Entry]
    resolution: int | None
    skips_bad_images: bool
    fingerprint: Mapping[str, Any]
    """Source and options of the set."""

    def is_done(self, record: ShardIndex) -> bool:
        """Return whether `record` is of these entries, from files of equal names and sizes."""
        return record.has_sizes and record.provenance.get(_JOB) == self.digest()

    def digest(self) -> str:
        """Hash the fingerprint and, as files of equal size may differ, what is known of each."""
        sha256 = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode())
        for entry in self.entries:
            sha256.update(repr((entry.key, entry.place, entry.label)).encode())
        return sha256.hexdigest()[:16]


def write_shard(source: SampleSource, job: ShardJob) -> ShardIndex:
    """Write and upload one shard and its record; every node writes equal bytes.

    Returns:
        An index of this shard alone, whose provenance has `LEFT_OUT` and `FAULTS`. If there are
        faults and the job skips none, it holds no shard, and nothing is uploaded.

    Raises:
        FileNotFoundError: This node does not see the source.
        StorageError: The output cannot be written.
    """
    left_out, faults = LeftOut(), list[str]()

    def load(entry: Entry) -> EncodedImage | str:
        try:
            image = source.load(entry, job.resolution)
        except PermissionError as error:
            return f"{error.filename or entry.place}: may not be read ({error.strerror or error})"
        except OSError as error:
            if error.errno not in _DAMAGED:
                raise
            return f"{error.filename or entry.place}: cannot be read ({error.strerror or error})"
        except ValueError as error:
            return str(error)
        if clash := _find_clash(entry, image):
            return clash
        if entry.label is None:
            return image
        return replace(image, others={**image.others, LABEL: str(entry.label).encode()})

    def select(loaded: Iterable[EncodedImage | str]) -> Iterator[tuple[Entry, EncodedImage]]:
        for entry, image in zip(job.entries, loaded, strict=True):
            if isinstance(image, str):
                faults.append(image)
                left_out.add("bad image", str(entry.place))
                continue
            if image.further_frames:
                left_out.add("further frame or page of a file", entry.key, image.further_frames)
            yield entry, image

    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        path = Path(folder) / job.name
        try:
            shard, shapes = write_tar(path, select(threads.map(load, job.entries)))
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise StorageError(
                f"{tempfile.gettempdir()}: no space to pack {job.name} ({error.strerror}): free"
                " some there, or set TMPDIR to another folder"
            ) from error
        provenance = {LEFT_OUT: left_out.to_json(), FAULTS: faults, _JOB: job.digest()}
        if faults and not job.skips_bad_images:
            return ShardIndex((), None, provenance)
        storage.upload(path, job.folder / job.name)
    record = index_images(shard, shapes, provenance)
    unfinished.keep_record(job.folder, job.name, record)
    return record


def _find_clash(entry: Entry, image: EncodedImage) -> str | None:
    """Return why the members of a sample conflict; None if they do not."""
    if image.extension in image.others:
        return f"{entry.place}: has two members .{image.extension}: remove one"
    if entry.label is not None and LABEL in image.others:
        return f"{entry.place}: has a label of its own (.{LABEL}): build without --labels"
    # Of a gif and a jpg, readers would prefer the jpg to the gif encoded as PNG.
    if image.others and image_extensions([*image.others, image.extension])[0] != image.extension:
        return (
            f"{entry.place}: readers would mistake another member for its image: rename it, or"
            " choose another --encoding"
        )
    return None


def write_tar(
    path: Path, samples: Iterable[tuple[Entry, EncodedImage]]
) -> tuple[Shard, list[Shape]]:
    """Write a tar of these samples; returns its entry in the index and the shapes of its images."""
    from webdataset.writer import TarWriter

    shapes: list[Shape] = []
    crc32: list[int] = []
    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for entry, image in samples:
            members = {**image.others, image.extension: image.data}
            writer.write({"__key__": entry.key, **members})
            shapes.append(image.shape)
            crc32.append(zlib.crc32(image.data))
    shard = index_tar(path, path.name)
    assert np.array_equal(shard.images().crc32, np.array(crc32, np.int64))
    return shard, shapes
