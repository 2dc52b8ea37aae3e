"""Chunks of shards on this node's disk, memory-mapped; shared by the processes of one user.

A file holds what one request fetched, a run of chunks: creating a file takes longer than writing a
small chunk. Its name is its byte range in the shard, in a folder named by the shard's sha256, so
shard sets never mix. Samples are checked when they are read; `refetch` replaces a file whose
samples do not match the index. Shards that are local files are mapped in place, each as a whole.
Each mapping keeps a file open, so a process drops the oldest where there are many.

Concurrency between processes:

- An exclusive flock per stretch of a shard is held while chunks are looked up and downloaded, so
  each is downloaded once per node. Another flock, evict.lock, guards the count of bytes written.
- A file is renamed into place when it is complete, so a name never leads to a partial file.
- Any process may delete any file (`_evict`, `refetch`) without the stretch's lock: a mapping stays
  valid after its file is deleted, and a reader that finds no file downloads again.
- A process that dies loses its locks, since the kernel drops them. It leaves at most a .part file,
  which a later eviction deletes after an hour, and a byte count that lacks its last file.
"""

import contextlib
import fcntl
import mmap
import os
import re
import resource
import threading
import time
import zlib
from collections import Counter
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
_FEWEST_MAPS, _MOST_MAPS = 16, 16_384
"""Bounds of a cache's mappings; the kernel allows a process 65,530."""
_SHARD_FOLDER = re.compile(r"[0-9a-f]{32}")
_CHUNK_FILE = re.compile(r"(\d+)-(\d+)\.chunk")
_Mapped = tuple[Path, memoryview]
"""A file, and the bytes in it of a chunk or of a whole local shard."""


class ShardError(OSError):
    """A shard, or a sample in it, cannot be read; has `uri`, `key` (or None) and `reason`."""

    def __init__(self, uri: str, key: str | None, reason: str):
        self.uri, self.key, self.reason = uri, key, reason
        super().__init__(f"{uri}{f', sample {key!r}' if key is not None else ''}: {reason}")

    def __reduce__(self):
        return type(self), (self.uri, self.key, self.reason)


class ShardCache:
    """At most `capacity_bytes` of files in `folder`; the least recently opened are evicted first.

    Each fetching thread may exceed this by one download.

    Raises:
        ShardError: On use, the folder belongs to another user, or the disk is full.
    """

    def __init__(
        self, base: Location, index: ShardIndex, chunks: Chunks, folder: Path, capacity_bytes: int
    ):
        self._index, self.chunks = index, chunks
        self._locations = [base / shard.name for shard in index.shards]
        self.local = base.path is not None
        """Whether the shards are local files, which need no download."""
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._maps: dict[int, _Mapped] = {}
        """Mapped bytes by chunk, or by shard if they are local; those mapped first come first."""
        self._most_maps = _count_maps()
        self._lock = threading.Lock()
        self._evictions = -1
        """The folder's count of evictions when this process last wrote there."""

    def open(self, chunk: int) -> memoryview:
        """Return the chunk's bytes, fetching them if need be; thread-safe.

        Raises:
            ShardError: The shard is missing, unreachable or too short.
        """
        number = self._number(chunk)
        mapped = self._maps.get(number)
        if mapped is None:
            return self.fetch([chunk])[0]
        return self._slice(chunk, mapped)

    def fetch(self, chunks: Sequence[int]) -> list[memoryview]:
        """Return the bytes of neighbouring chunks of one shard, fetching missing ones together.

        Raises:
            ShardError: As in `open`.
        """
        try:
            found = self._map_local(chunks[0]) if self.local else self._map_remote(chunks)
        except FileNotFoundError as error:
            reason = "the shard is missing: write it again, or an index of the shards there are"
            raise ShardError(self.uri(chunks[0]), None, reason) from error
        except (OSError, ValueError) as error:
            location = self._location(chunks[0])
            reason = str(error).removeprefix(f"{location.display}: ")
            raise ShardError(location.uri, None, reason) from error
        with self._lock:
            self._maps.update(found)
            if len(self._maps) > self._most_maps:
                self._drop_oldest()
        return [self._slice(chunk, found[self._number(chunk)]) for chunk in chunks]

    def _drop_oldest(self) -> None:
        """Drop mappings until few files are open; chunks that were fetched together share one."""
        held = Counter(path for path, _ in self._maps.values())
        while len(held) > self._most_maps:
            path, _ = self._maps.pop(next(iter(self._maps)))
            held[path] -= 1
            if not held[path]:
                del held[path]

    def refetch(self, chunk: int) -> memoryview:
        """Fetch the chunk, and others in its file, again; a local shard is only mapped again."""
        if self.local:
            return self.fetch([chunk])[0]
        with self._lock:
            path, _ = self._maps.get(chunk, (None, None))
            lost = sorted({chunk, *(other for other, at in self._maps.items() if at[0] == path)})
        if path is not None:
            path.unlink(missing_ok=True)
        return self.fetch(lost)[lost.index(chunk)]

    def holds(self, chunk: int) -> bool:
        """Return whether this process has the chunk mapped."""
        return self._number(chunk) in self._maps

    def uri(self, chunk: int) -> str:
        """Return the URI of the chunk's shard."""
        return self._location(chunk).uri

    def _number(self, chunk: int) -> int:
        """Return the key of the chunk's bytes in `_maps`."""
        return int(self.chunks.shard[chunk]) if self.local else chunk

    def _slice(self, chunk: int, mapped: _Mapped) -> memoryview:
        """Return the chunk's bytes from those that `_maps` holds for it."""
        data = mapped[1]
        return data[self.chunks.start[chunk] : self.chunks.end[chunk]] if self.local else data

    def _map_local(self, chunk: int) -> dict[int, _Mapped]:
        path = self._location(chunk).path
        assert path is not None
        expected, found = self._shard(chunk).bytes, path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{found} bytes, the index says {expected}: damaged, or the index belongs to other"
                " shards; write it again"
            )
        return {self._number(chunk): (path, _map(path))}

    def _map_remote(self, chunks: Sequence[int]) -> dict[int, _Mapped]:
        make_cache_folder(self._folder)
        mapped: dict[int, _Mapped] = {}
        with contextlib.ExitStack() as locks:
            # Ranks of a node want the same chunks at the same time: the first to lock them
            # downloads, the others wait here and then find its file.
            for lock in self._lock_files(chunks):
                locks.enter_context(_locked(lock))
            for path, start, end in self._list_files(chunks[0]):
                inside = [
                    chunk
                    for chunk in chunks
                    if start <= self.chunks.start[chunk] and self.chunks.end[chunk] <= end
                ]
                # None: evicted since it was listed, or of another size; missing below either way.
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
        """Cut the chunks' bytes from `data`, which begins at `start` in the shard."""
        places = ((chunk, *self._span([chunk])) for chunk in chunks)
        return {chunk: (path, data[first - start : end - start]) for chunk, first, end in places}

    def _list_files(self, chunk: int) -> list[tuple[Path, int, int]]:
        """List the cached files of the chunk's shard, with their [start, end) in it."""
        folder = self._shard_folder(chunk)
        try:
            names = [_CHUNK_FILE.fullmatch(file.name) for file in os.scandir(folder)]
        except FileNotFoundError:
            return []
        return [(folder / at[0], int(at[1]), int(at[2])) for at in names if at]

    def _lock_files(self, chunks: Sequence[int]) -> list[Path]:
        """Return the files to lock, in ascending order, so that processes cannot deadlock.

        A lock guards the chunks of one stretch of a shard, and a run rarely spans more than two.
        Stretches share `_LOCK_FILES` files by hash, which bounds their number in a large cache.
        """
        stretches = np.unique(self.chunks.start[list(chunks)] // LARGEST_BYTES).tolist()
        names = (f"{self._shard_folder(chunks[0]).name}-{stretch}" for stretch in stretches)
        numbers = sorted({zlib.crc32(name.encode()) % _LOCK_FILES for name in names})
        return [self._folder / f"{number:03d}.lock" for number in numbers]

    def _count_fetched(self, size: int) -> None:
        """Add to the count of bytes that all processes wrote, and evict if it is too high."""
        with self._lock, _locked(self._folder / "evict.lock") as file:
            written = re.match(rb"(\d{20}) (\d{20})", file.read(41))  # no match in a new file
            used, evictions = map(int, written.groups()) if written else (self._capacity_bytes, 0)
            used += size
            # A process's first fetch evicts too: that recounts files, whatever the count says.
            if used > self._capacity_bytes or self._evictions < 0:
                used = _evict(self._folder, self._capacity_bytes)
                evictions += 1
            file.seek(0)  # overwrite in place: ext4 flushes a file that was truncated
            file.write(b"%020d %020d" % (used, evictions))
            if evictions != self._evictions:
                # An evicted file keeps its disk space until all its mappings are dropped.
                there = {path: path.exists() for path in {path for path, _ in self._maps.values()}}
                self._maps = {k: m for k, m in self._maps.items() if there[m[0]]}
            self._evictions = evictions

    def _location(self, chunk: int) -> Location:
        return self._locations[int(self.chunks.shard[chunk])]

    def _shard(self, chunk: int) -> Shard:
        return self._index.shards[int(self.chunks.shard[chunk])]

    def _shard_folder(self, chunk: int) -> Path:
        """Return the folder of its shard: one per shard, since each fetch lists it."""
        return self._folder / self._shard(chunk).sha256[:32]

    def _span(self, chunks: Sequence[int]) -> tuple[int, int]:
        """Return their byte range in the shard, [start, end)."""
        rows = list(chunks)
        return int(self.chunks.start[rows].min()), int(self.chunks.end[rows].max())


def _count_maps() -> int:
    """Return how many mappings a cache may keep: a process has several caches, and other files."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return _MOST_MAPS
    return min(max(most // 4, _FEWEST_MAPS), _MOST_MAPS)


def measure_cache(folder: Path) -> int:
    """Return the bytes that the cache in this folder holds; 0 if there is none."""
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
    """Delete the least recently opened files, and partial downloads of killed processes.

    A cache above its capacity shrinks to 15/16 of it, so that evictions stay rare.

    Returns:
        Bytes of the remaining files.
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
    """Write and map the file before it gets its name: from then on a process may evict it."""
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


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _map_whole(path: Path, size: int) -> memoryview | None:
    """Map the file and mark it as just used; None if it is missing or of another size."""
    try:
        if path.stat().st_size != size:
            return None
        os.utime(path)
        return _map(path)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Generator[BinaryIO]:
    """Hold a lock against other processes; the kernel drops it when its holder dies."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
