"""Chunks of shards on this node's disk, memory-mapped; shared by the processes of one user.

A file holds what one request fetched, a run of chunks: to create a file takes longer than to write
a small chunk. It is named by its place in the shard, in a folder named by the shard's sha256, so
two shard sets never mix, and gets its name when it is whole. What is in it is checked sample by
sample when it is read; `refetch` replaces a file whose samples are not as the index says. Shards
that already are local files are mapped where they lie.
"""

import contextlib
import fcntl
import mmap
import os
import re
import threading
import time
import zlib
from collections.abc import Generator, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines import storage
from data_pipelines.loading.cache_folder import explain_full_disk, make_cache_folder
from data_pipelines.shards.chunks import LARGEST_BYTES, Chunks
from data_pipelines.shards.index import Shard, ShardIndex
from data_pipelines.storage import Location

_ABANDONED_SECONDS = 3600.0
_LOCK_FILES = 256
_SHARD_FOLDER = re.compile(r"[0-9a-f]{32}")
_CHUNK_FILE = re.compile(r"(\d+)-(\d+)\.chunk")
_Mapped = tuple[Path, memoryview]
"""Of a chunk: the file that it is in, and its bytes."""


class ShardError(OSError):
    """A shard or an image in it that cannot be read; `uri`, `key` (or None) and `reason`."""

    def __init__(self, uri: str, key: str | None, reason: str):
        self.uri, self.key, self.reason = uri, key, reason
        super().__init__(f"{uri}{f', sample {key!r}' if key is not None else ''}: {reason}")

    def __reduce__(self):
        return type(self), (self.uri, self.key, self.reason)


class ShardCache:
    """At most `capacity_bytes` of files in `folder`; the least recently opened go first.

    One download for each fetching thread may come on top.

    Raises:
        ValueError: when it is used: the folder belongs to another user, or the disk is full.
    """

    def __init__(
        self, base: Location, index: ShardIndex, chunks: Chunks, folder: Path, capacity_bytes: int
    ):
        self._index, self.chunks = index, chunks
        self._locations = [base / shard.name for shard in index.shards]
        self.local = base.path is not None
        """Whether the shards are files of this machine, which need no fetching."""
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._maps: dict[int, _Mapped] = {}
        self._lock = threading.Lock()
        self._evictions = -1
        """The folder's count of them when this process last wrote there."""

    def open(self, chunk: int) -> memoryview:
        """The chunk's bytes, fetched first where they are not here; thread-safe.

        Raises:
            ShardError: missing, unreachable or too short.
        """
        mapped = self._maps.get(chunk)
        return mapped[1] if mapped is not None else self.fetch([chunk])[0]

    def fetch(self, chunks: Sequence[int]) -> list[memoryview]:
        """The same of neighbouring chunks of one shard, what is missing in one request.

        Raises:
            ShardError: as `open`.
        """
        try:
            found = self._map_local(chunks) if self.local else self._map_remote(chunks)
        except FileNotFoundError as error:
            reason = "the shard is missing: write it again, or an index of the shards there are"
            raise ShardError(self.uri(chunks[0]), None, reason) from error
        except (OSError, ValueError) as error:
            location = self._location(chunks[0])
            reason = str(error).removeprefix(f"{location.display}: ")
            raise ShardError(location.uri, None, reason) from error
        with self._lock:
            self._maps.update(found)
        return [found[chunk][1] for chunk in chunks]

    def refetch(self, chunk: int) -> memoryview:
        """Fetch the chunk again, and what lies in one file with it; a local shard is only read."""
        with self._lock:
            path, _ = self._maps.get(chunk, (None, None))
            lost = sorted({chunk, *(other for other, at in self._maps.items() if at[0] == path)})
        if self.local:
            return self.fetch([chunk])[0]
        if path is not None:
            path.unlink(missing_ok=True)
        return self.fetch(lost)[lost.index(chunk)]

    def holds(self, chunk: int) -> bool:
        """Whether this process has the chunk mapped."""
        return chunk in self._maps

    def uri(self, chunk: int) -> str:
        """The shard that the chunk is of."""
        return self._location(chunk).uri

    def _map_local(self, chunks: Sequence[int]) -> dict[int, _Mapped]:
        path = self._location(chunks[0]).path
        assert path is not None
        expected, found = self._shard(chunks[0]).bytes, path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{found} bytes, the index says {expected}: damaged, or the index belongs to other"
                " shards; write it again"
            )
        start, end = self._span(chunks)
        start -= start % mmap.ALLOCATIONGRANULARITY
        return self._cut(chunks, path, start, _map(path, start, end - start))

    def _map_remote(self, chunks: Sequence[int]) -> dict[int, _Mapped]:
        make_cache_folder(self._folder)
        mapped: dict[int, _Mapped] = {}
        with contextlib.ExitStack() as locks:  # one download a node, not one a rank
            for lock in self._lock_files(chunks):
                locks.enter_context(_locked(lock))
            for path, start, end in self._list_files(chunks[0]):
                inside = [
                    chunk
                    for chunk in chunks
                    if start <= self.chunks.start[chunk] and self.chunks.end[chunk] <= end
                ]
                data = _map_whole(path, end - start) if inside else None
                if data is not None:
                    mapped |= self._cut(inside, path, start, data)
            missing = [chunk for chunk in chunks if chunk not in mapped]
            for _, neighbours in groupby(enumerate(missing), lambda at: at[1] - at[0]):
                run = [chunk for _, chunk in neighbours]
                start, end = self._span(run)
                path = self._shard_folder(run[0]) / f"{start}-{end}.chunk"
                data = _write(path, storage.read_range(self._location(run[0]), start, end))
                mapped |= self._cut(run, path, start, data)
                self._count_fetched(end - start)
        return mapped

    def _cut(
        self, chunks: Sequence[int], path: Path, start: int, data: memoryview
    ) -> dict[int, _Mapped]:
        """The chunks' bytes out of `data`, which begins at `start` in the shard."""
        places = ((chunk, *self._span([chunk])) for chunk in chunks)
        return {chunk: (path, data[first - start : end - start]) for chunk, first, end in places}

    def _list_files(self, chunk: int) -> list[tuple[Path, int, int]]:
        """The files that hold chunks of the same shard, and their places in it."""
        folder = self._shard_folder(chunk)
        try:
            names = [_CHUNK_FILE.fullmatch(file.name) for file in os.scandir(folder)]
        except FileNotFoundError:
            return []
        return [(folder / at[0], int(at[1]), int(at[2])) for at in names if at]

    def _lock_files(self, chunks: Sequence[int]) -> list[Path]:
        """What to lock, in this order; only a few, so that a large cache has not many such files.

        Every chunk belongs to a stretch of its shard, and a run spans hardly more than one.
        """
        stretches = np.unique(self.chunks.start[list(chunks)] // LARGEST_BYTES).tolist()
        names = (f"{self._shard_folder(chunks[0]).name}-{stretch}" for stretch in stretches)
        numbers = sorted({zlib.crc32(name.encode()) % _LOCK_FILES for name in names})
        return [self._folder / f"{number:03d}.lock" for number in numbers]

    def _count_fetched(self, size: int) -> None:
        """Add to the bytes that all processes wrote here, and make room where they are too many."""
        with self._lock, _locked(self._folder / "evict.lock") as file:
            written = re.match(rb"(\d{20}) (\d{20})", file.read(41))  # none in a new file
            used, evictions = map(int, written.groups()) if written else (self._capacity_bytes, 0)
            used += size
            if used > self._capacity_bytes or self._evictions < 0:
                used = _evict(self._folder, self._capacity_bytes)
                evictions += 1
            file.seek(0)  # in its place: after a file is made empty, ext4 waits for the disk
            file.write(b"%020d %020d" % (used, evictions))
            if evictions != self._evictions:
                # A file that was evicted keeps its disk space until its map is dropped.
                there = {path: path.exists() for path in {path for path, _ in self._maps.values()}}
                self._maps = {k: m for k, m in self._maps.items() if there[m[0]]}
            self._evictions = evictions

    def _location(self, chunk: int) -> Location:
        return self._locations[int(self.chunks.shard[chunk])]

    def _shard(self, chunk: int) -> Shard:
        return self._index.shards[int(self.chunks.shard[chunk])]

    def _shard_folder(self, chunk: int) -> Path:
        """Where its shard's files are: apart from others, since each fetch looks through it."""
        return self._folder / self._shard(chunk).sha256[:32]

    def _span(self, chunks: Sequence[int]) -> tuple[int, int]:
        """Their bytes in the shard: [start, end)."""
        rows = list(chunks)
        return int(self.chunks.start[rows].min()), int(self.chunks.end[rows].max())


def measure_cache(folder: Path) -> int:
    """Bytes that the cache in this folder holds; 0 where there is none."""
    held = 0
    for file in _list_shard_folders(folder):
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
            held += file.stat().st_size
    return held


def _list_shard_folders(folder: Path) -> Iterator[os.DirEntry[str]]:
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        if _SHARD_FOLDER.fullmatch(entry.name):
            yield from os.scandir(entry.path)


def _evict(folder: Path, capacity_bytes: int) -> int:
    """Delete the least recently opened files, and downloads that a killed process left.

    Where there is too much, a little more than that goes, so that it is not soon too much again.

    Returns:
        Bytes of the files that are left.
    """
    abandoned = time.time() - _ABANDONED_SECONDS
    files: list[tuple[float, int, str]] = []
    for file in _list_shard_folders(folder):
        with contextlib.suppress(FileNotFoundError):
            state = file.stat()
            if file.name.endswith(".chunk"):
                files.append((state.st_mtime, state.st_size, file.path))
            elif file.name.endswith(".part") and state.st_mtime < abandoned:
                Path(file.path).unlink()
    total = sum(size for _, size, _ in files)
    enough = capacity_bytes if total <= capacity_bytes else capacity_bytes * 15 // 16
    for _, size, path in sorted(files):
        if total <= enough:
            break
        Path(path).unlink(missing_ok=True)
        total -= size
    return total


def _write(path: Path, data: bytes) -> memoryview:
    """Write the file and map it before it has its name: then another process may evict it."""
    part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with part.open("w+b", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        folder = path.parent.parent
        raise explain_full_disk(error, folder, len(data), "data.cache_bytes") from error
    return mapped


def _map(path: Path, start: int = 0, size: int = 0) -> memoryview:
    """`size` bytes from `start` on, a multiple of the page size; 0 for all."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=start))


def _map_whole(path: Path, size: int) -> memoryview | None:
    """The file, marked as used now; None where it is not there, or not of this size."""
    try:
        if path.stat().st_size != size:
            return None
        os.utime(path)
        return _map(path)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Generator[BinaryIO]:
    """Hold a lock between processes; the kernel drops it when its holder dies."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
