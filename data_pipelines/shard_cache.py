"""Chunks of shards on this node's disk, memory-mapped; shared by the processes of one user.

A file is named by its shard's sha256 and its place in the shard, so two shard sets never mix, and
gets its name when it is whole. What is in it is checked sample by sample when it is read; `refetch`
replaces a file whose samples are not as the index says. Shards that already are local files are
mapped where they lie.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import tempfile
import threading
import time
import zlib
from collections.abc import Generator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from data_pipelines import storage, uris
from data_pipelines.chunks import Chunks
from data_pipelines.shard_index import Shard, ShardIndex

_ABANDONED_SECONDS = 3600.0
_LOCK_FILES = 256


class ShardError(OSError):
    """A shard or an image in it that cannot be read; `uri`, `key` (or None) and `reason`."""

    def __init__(self, uri: str, key: str | None, reason: str):
        self.uri, self.key, self.reason = uri, key, reason
        super().__init__(f"{uri}{f', sample {key!r}' if key is not None else ''}: {reason}")

    def __reduce__(self):
        return type(self), (self.uri, self.key, self.reason)


def default_cache_dir() -> Path:
    """A folder of this user's in the temporary folder."""
    return Path(tempfile.gettempdir()) / f"efae-shards-{os.getuid()}"


class ShardCache:
    """At most `capacity_bytes` of chunks in `folder`; the least recently opened go first.

    One download for each fetching thread may come on top.

    Raises:
        ValueError: when it is used: the folder belongs to another user, or the disk is full.
    """

    def __init__(
        self, uri: str, index: ShardIndex, chunks: Chunks, folder: Path | None, capacity_bytes: int
    ):
        self._index, self.chunks = index, chunks
        self._uris = [uris.join(uri, shard.name) for shard in index.shards]
        self.local = uris.local_path(uri) is not None
        """Whether the shards are files of this machine, which need no fetching."""
        self._folder = folder or default_cache_dir()
        self._capacity_bytes = capacity_bytes
        self._maps: dict[int, tuple[Path, memoryview]] = {}
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
            uri = self.uri(chunks[0])
            reason = str(error).removeprefix(f"{uris.display(uri)}: ")
            raise ShardError(uri, None, reason) from error
        with self._lock:
            self._maps.update(zip(chunks, found, strict=True))
        return [mapped for _, mapped in found]

    def refetch(self, chunk: int) -> memoryview:
        """Fetch the chunk again; a local shard is only read again."""
        with self._lock:
            path, _ = self._maps.pop(chunk, (None, None))
        if path is not None and not self.local:
            path.unlink(missing_ok=True)
        return self.open(chunk)

    def holds(self, chunk: int) -> bool:
        """Whether this process has the chunk mapped."""
        return chunk in self._maps

    def uri(self, chunk: int) -> str:
        """The shard that the chunk is of."""
        return self._uris[int(self.chunks.shard[chunk])]

    def _map_local(self, chunks: Sequence[int]) -> list[tuple[Path, memoryview]]:
        path = uris.local_path(self.uri(chunks[0]))
        assert path is not None
        expected, found = self._shard(chunks[0]).bytes, path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{found} bytes, the index says {expected}: damaged, or the index belongs to other"
                " shards; write it again"
            )
        mapped: list[tuple[Path, memoryview]] = []
        for chunk in chunks:
            start, end = self._place(chunk)
            skipped = start - start % mmap.ALLOCATIONGRANULARITY
            mapped.append((path, _map(path, skipped, end - skipped)[start - skipped :]))
        return mapped

    def _map_remote(self, chunks: Sequence[int]) -> list[tuple[Path, memoryview]]:
        self._make_folder()
        places = [self._place(chunk) for chunk in chunks]
        sha256 = self._shard(chunks[0]).sha256[:32]
        paths = [self._folder / f"{sha256}-{start}-{end}.chunk" for start, end in places]
        with contextlib.ExitStack() as locks:  # one download a node, not one a rank
            for lock in sorted({_lock_file(path) for path in paths}):
                locks.enter_context(_locked(lock))
            found = [
                _map_whole(path, end - start)
                for path, (start, end) in zip(paths, places, strict=True)
            ]
            for missing, group in groupby(range(len(chunks)), lambda row: found[row] is None):
                if not missing:
                    continue
                rows = list(group)
                first, last = places[rows[0]][0], places[rows[-1]][1]
                data = memoryview(storage.read_range(self.uri(chunks[0]), first, last))
                for row in rows:
                    start, end = places[row]
                    found[row] = _write(paths[row], data[start - first : end - first])
                self._count_fetched(len(data))
        return [(path, mapped) for path, mapped in zip(paths, found, strict=True) if mapped]

    def _count_fetched(self, size: int) -> None:
        """Add to the bytes that all processes wrote here, and make room where they are too many."""
        with self._lock, _locked(self._folder / "evict.lock") as file:
            file.seek(0)
            written = re.fullmatch(rb"(\d+) (\d+)", file.read())  # none where a process died here
            used, evictions = map(int, written.groups()) if written else (self._capacity_bytes, 0)
            used += size
            if used > self._capacity_bytes or self._evictions < 0:
                used = _evict(self._folder, self._capacity_bytes)
                evictions += 1
            file.truncate(0)
            file.write(b"%d %d" % (used, evictions))
            if evictions != self._evictions:
                # A file that was evicted keeps its disk space until its map is dropped.
                self._maps = {k: m for k, m in self._maps.items() if m[0].exists()}
            self._evictions = evictions

    def _shard(self, chunk: int) -> Shard:
        return self._index.shards[int(self.chunks.shard[chunk])]

    def _place(self, chunk: int) -> tuple[int, int]:
        return int(self.chunks.start[chunk]), int(self.chunks.end[chunk])

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.stat().st_uid != os.getuid():
            raise ValueError(f"cache folder {self._folder} belongs to another user: pass cache_dir")


def _evict(folder: Path, capacity_bytes: int) -> int:
    """Delete the least recently opened chunks, and downloads that a killed process left.

    Where there is too much, a little more than that goes, so that it is not soon too much again.

    Returns:
        Bytes of the chunks that are left.
    """
    abandoned = time.time() - _ABANDONED_SECONDS
    files: list[tuple[float, int, str]] = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            state = entry.stat()
            if entry.name.endswith(".chunk"):
                files.append((state.st_mtime, state.st_size, entry.path))
            elif entry.name.endswith(".part") and state.st_mtime < abandoned:
                Path(entry.path).unlink()
    total = sum(size for _, size, _ in files)
    enough = capacity_bytes if total <= capacity_bytes else capacity_bytes * 15 // 16
    for _, size, path in sorted(files):
        if total <= enough:
            break
        Path(path).unlink(missing_ok=True)
        total -= size
    return total


def _write(path: Path, data: memoryview) -> memoryview:
    """Write the file and map it before it has its name: then another process may evict it."""
    part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
    try:
        with part.open("w+b", buffering=0) as file:
            written = file.write(data)
            while written < len(data):
                written += file.write(data[written:])
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(
                f"no space for {len(data)} bytes in the cache folder {path.parent}: make space,"
                " choose another (data.cache_dir), or lower data.cache_bytes"
            ) from error
        raise
    return mapped


def _lock_file(chunk: Path) -> Path:
    """One of a few, so that a large cache does not leave one for each chunk."""
    return chunk.with_name(f"{zlib.crc32(chunk.name.encode()) % _LOCK_FILES:03d}.lock")


def _map(path: Path, start: int = 0, size: int = 0) -> memoryview:
    """`size` bytes from `start` on, a multiple of the page size; 0 for all."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=start))


def _map_whole(path: Path, size: int) -> memoryview | None:
    """The file, marked as used now; None where it is not there, or not of this size."""
    try:
        os.utime(path)
        return _map(path) if path.stat().st_size == size else None
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Generator[BinaryIO]:
    """Hold a lock between processes; the kernel drops it when its holder dies."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
