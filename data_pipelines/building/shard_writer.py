"""One shard: read its images, write the tar, upload it, leave its record. Runs on any node."""

import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines import storage
from data_pipelines.building import unfinished
from data_pipelines.building.sample_encoding import EncodedImage, Entry
from data_pipelines.building.sources import SampleSource
from data_pipelines.shards.index import Shape, Shard, ShardIndex, common_shape, index_tar
from data_pipelines.shards.intake import FAULTS, LEFT_OUT, LeftOut
from data_pipelines.storage import uris


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written."""

    uri: str
    """Of the set."""
    name: str
    entries: list[Entry]
    resolution: int | None
    skips_bad_images: bool


def write_shard(source: SampleSource, job: ShardJob) -> ShardIndex:
    """Write and upload one shard and its record; the same bytes wherever it runs.

    Returns:
        An index of this shard alone, whose provenance has `LEFT_OUT` and `FAULTS`; without the
        shard, and nothing is uploaded, where there are faults and the job skips none.

    Raises:
        ValueError: Members that cannot lie in one sample; names the key.
        FileNotFoundError: This node does not see the source.
        StorageError: The output cannot be written.
    """
    left_out, faults = LeftOut(), list[str]()

    def load(entry: Entry) -> EncodedImage | str:
        try:
            return source.load(entry, job.resolution)
        except (ValueError, PermissionError) as error:
            return str(error)

    def take(loaded: Iterable[EncodedImage | str]) -> Iterator[tuple[Entry, EncodedImage]]:
        for entry, image in zip(job.entries, loaded, strict=True):
            if isinstance(image, str):
                faults.append(image)
                continue
            if image.further_frames:
                left_out.add("further frame or page of a file", entry.key, image.further_frames)
            yield entry, image

    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        path = Path(folder) / job.name
        shard, shapes = _write_tar(path, take(threads.map(load, job.entries)))
        provenance = {LEFT_OUT: left_out.to_json(), FAULTS: faults}
        if faults and not job.skips_bad_images:
            return ShardIndex((), None, provenance)
        storage.upload(path, uris.join(job.uri, job.name))
    record = ShardIndex((shard,), common_shape(shapes), provenance)
    unfinished.keep_record(job.uri, job.name, record)
    return record


def _write_tar(
    path: Path, samples: Iterable[tuple[Entry, EncodedImage]]
) -> tuple[Shard, set[Shape]]:
    from webdataset.writer import TarWriter

    shapes: set[Shape] = set()
    written: list[tuple[Entry, int]] = []
    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for entry, image in samples:
            if image.extension in image.others:
                raise ValueError(f"{entry.place}: has two members .{image.extension}; drop one")
            members = {**image.others, image.extension: image.data}
            writer.write({"__key__": entry.key, **members})
            shapes.add(image.shape)
            written.append((entry, zlib.crc32(image.data)))
    shard = index_tar(path, path.name)
    crc32 = np.array([crc for _, crc in written], np.int64)
    others = np.flatnonzero(shard.images().crc32 != crc32)
    if len(others):  # as PNG, the image of jpg and mask.png would come after the mask
        raise ValueError(
            f"{written[others[0]][0].place}: another member would be taken for its image; rename"
            " it, or choose another --encoding"
        )
    return shard, shapes
