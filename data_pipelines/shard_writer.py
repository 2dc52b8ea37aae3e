"""One shard: read its images, write the tar, upload it, leave its record. Runs on any node."""

import os
import tempfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np

from data_pipelines import storage, unfinished, uris
from data_pipelines.encoded_images import EncodedImage, Entry
from data_pipelines.image_sources import SampleSource
from data_pipelines.shard_index import Shape, ShardIndex, common_shape, index_tar


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written."""

    uri: str
    """Of the set."""
    name: str
    entries: list[Entry]
    resolution: int | None


def write_shard(source: SampleSource, job: ShardJob) -> ShardIndex:
    """Write and upload one shard and its record; the same bytes wherever it runs.

    Returns:
        An index of this shard alone.

    Raises:
        ValueError: a damaged image, or members that cannot lie in one sample; names the key.
        FileNotFoundError: this node does not see the source.
        StorageError: the output cannot be written.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        path = Path(folder) / job.name
        record = _write_tar(
            path, job.entries, threads.map(source.load, job.entries, repeat(job.resolution))
        )
        storage.upload(path, uris.join(job.uri, job.name))
    unfinished.keep_record(job.uri, job.name, record)
    return record


def _write_tar(path: Path, entries: list[Entry], images: Iterable[EncodedImage]) -> ShardIndex:
    from webdataset.writer import TarWriter

    shapes: set[Shape] = set()
    crc32: list[int] = []
    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for entry, image in zip(entries, images, strict=True):
            if image.extension in image.others:
                raise ValueError(f"{entry.place}: has two members .{image.extension}; drop one")
            members = {**image.others, image.extension: image.data}
            writer.write({"__key__": entry.key, **members})
            shapes.add(image.shape)
            crc32.append(zlib.crc32(image.data))
    shard = index_tar(path, path.name)
    others = np.flatnonzero(shard.images().crc32 != np.array(crc32))
    if len(others):  # as PNG, the image of jpg and mask.png would come after the mask
        raise ValueError(
            f"{entries[others[0]].place}: another member would be taken for its image; rename it,"
            " or choose another --encoding"
        )
    return ShardIndex((shard,), common_shape(shapes))
