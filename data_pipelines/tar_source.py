"""Tars that others wrote as a source of images."""

import tempfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import storage, uris
from data_pipelines.encoded_images import EncodedImage, Encoding, Entry, make_key
from data_pipelines.shard_index import Shard, index_tar
from data_pipelines.source_names import digest, make_absolute

_LISTING_THREADS = 4
_LARGEST_GAP_BYTES = 64 * 2**10


@dataclass(frozen=True)
class _Sample:
    """Where a sample lies in a foreign tar."""

    tar: str
    key: str
    image: str
    """Extension of the member that is its image."""
    members: dict[str, tuple[int, int, int]]
    """{extension: (offset, size, crc32)}."""

    def __str__(self) -> str:
        return f"sample {self.key!r} of {self.tar}"


class ForeignTars:
    """Every ``*.tar`` below a URI, by WebDataset's convention; all members of a sample are kept.

    A tar is read once, in whole, to list its samples; no copy of it stays. Loading a sample then
    reads its own bytes only.
    """

    def __init__(self, uri: str, encoding: Encoding):
        storage.check_readable(uri)
        self._uri = make_absolute(uri)
        self._encoding = encoding
        self._sizes = {n: s for n, s in storage.list_files(uri).items() if n.endswith(".tar")}
        if not self._sizes:
            raise ValueError(f"wds:{uri}: holds no .tar file")

    def describe(self) -> dict[str, Any]:
        return {"files": digest(self._sizes), "tars": len(self._sizes), "members": "all"}

    def list_entries(self) -> list[Entry]:
        from tqdm import tqdm

        entries: list[Entry] = []
        with ThreadPoolExecutor(_LISTING_THREADS) as threads:
            shards = threads.map(self._index, self._sizes)
            total, text = len(self._sizes), f"listing {self._uri}"
            for shard in tqdm(shards, total=total, unit="tar", desc=text, disable=None):
                for sample in _list_samples(shard):
                    key = make_key(sample.key)
                    entries.append(Entry(key, key, sample))
        return entries

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        sample = entry.place
        data = self._read(sample)
        image = data.pop(sample.image)
        return self._encoding.encode_file(image, resolution, f"{self._uri}: {sample}", data)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}}

    def _index(self, name: str) -> Shard:
        uri = uris.join(self._uri, name)
        path = uris.local_path(uri)
        if path is not None:
            return index_tar(path, name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "copy.tar"
            storage.download(uri, path, self._sizes[name])
            return index_tar(path, name)

    def _read(self, sample: _Sample) -> dict[str, bytes]:
        """{extension: bytes}, by one read where the members lie together, as they usually do."""
        uri = uris.join(self._uri, sample.tar)
        start = min(offset for offset, _, _ in sample.members.values())
        end = max(offset + size for offset, size, _ in sample.members.values())
        total = sum(size for _, size, _ in sample.members.values())
        if end - start - total <= _LARGEST_GAP_BYTES:
            block = storage.read_range(uri, start, end)
            data = {e: block[o - start : o - start + s] for e, (o, s, _) in sample.members.items()}
        else:
            data = {e: storage.read_range(uri, o, o + s) for e, (o, s, _) in sample.members.items()}
        for extension, (_, _, crc32) in sample.members.items():
            if zlib.crc32(data[extension]) != crc32:
                raise ValueError(f"{self._uri}: .{extension} of {sample} changed while it was read")
        return data


def _list_samples(shard: Shard) -> Iterable[_Sample]:
    """The samples of a tar, in its order.

    Raises:
        ValueError: a sample without an image, or a member that TarWriter would leave out.
    """
    image_offsets = shard.images().offset.tolist()
    columns = {
        extension: np.stack([members.offset, members.size, members.crc32], axis=1).tolist()
        for extension, members in shard.members.items()
    }
    for row, key in enumerate(shard.keys):
        members = {
            extension: (rows[row][0], rows[row][1], rows[row][2])
            for extension, rows in columns.items()
            if rows[row][0] >= 0
        }
        for extension in members:
            if not extension or extension.startswith("_"):
                name = f"{key}.{extension}" if extension else key
                raise ValueError(f"{shard.name}: member {name!r} cannot be kept: rename it")
        image = next(e for e, (offset, _, _) in members.items() if offset == image_offsets[row])
        yield _Sample(shard.name, key, image, members)
