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
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path

from data_pipelines import storage, uris
from data_pipelines.chunks import Chunks
from data_pipelines.shard_index import Shard, ShardIndex

_ABANDONED_SECONDS = 3600.0
_LOCK_FILES = 256
"""Chunks share this many lock files, so that a large cache does not leave one each."""


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
        self._open_locks = [threading.Lock() for _ in range(64)]

    def open(self, chunk: int) -> memoryview:
        """The chunk's bytes, fetched first where they are not here; thread-safe.

        Raises:
            ShardError: missing, unreachable or too short.
        """
        mapped = self._maps.get(chunk)
        if mapped is not None:
            return mapped[1]
        with self._open_locks[chunk % len(self._open_locks)]:
            mapped = self._maps.get(chunk)
            if mapped is not None:
                return mapped[1]
            try:
                path, mapped = self._map_local(chunk) if self.local else self._map_remote(chunk)
            except (OSError, ValueError) as error:
                raise ShardError(self.uri(chunk), None, str(error)) from error
            with self._lock:
                if not self.local:
                    # A file that was evicted keeps its disk space until its map is dropped.
                    self._maps = {k: m for k, m in self._maps.items() if m[0].exists()}
                self._maps[chunk] = path, mapped
            return mapped

    def refetch(self, chunk: int) -> memoryview:
        """Fetch the chunk again; a local shard is only read again."""
        with self._open_locks[chunk % len(self._open_locks)], self._lock:
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

    def _map_local(self, chunk: int) -> tuple[Path, memoryview]:
        path = uris.local_path(self.uri(chunk))
        assert path is not None
        expected, found = self._shard(chunk).bytes, path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{found} bytes, the index says {expected}: damaged, or the index belongs to other"
                " shards; write it again"
            )
        start, end = self._place(chunk)
        skipped = start - start % mmap.ALLOCATIONGRANULARITY
        return path, _map(path, skipped, end - skipped)[start - skipped :]

    def _map_remote(self, chunk: int) -> tuple[Path, memoryview]:
        start, end = self._place(chunk)
        path = self._folder / f"{self._shard(chunk).sha256[:32]}-{start}-{end}.chunk"
        self._make_folder()
        with _locked(self._lock_file(path)):  # one download a node, not one a rank
            mapped = _map_whole(path, end - start)
            if mapped is None:
                mapped = self._fetch(self.uri(chunk), path, start, end)
                self._evict()
        return path, mapped

    def _fetch(self, uri: str, path: Path, start: int, end: int) -> memoryview:
        data = storage.read_range(uri, start, end)
        part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
        try:
            part.write_bytes(data)
            mapped = _map(part)  # before it has its name, since another process may evict it then
            part.replace(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ValueError(
                    f"no space for {len(data)} bytes in the cache folder {self._folder}: make"
                    " space, choose another (data.cache_dir), or lower data.cache_bytes"
                    f" ({self._capacity_bytes})"
                ) from error
            raise
        else:
            return mapped
        finally:
            part.unlink(missing_ok=True)

    def _shard(self, chunk: int) -> Shard:
        return self._index.shards[int(self.chunks.shard[chunk])]

    def _place(self, chunk: int) -> tuple[int, int]:
        return int(self.chunks.start[chunk]), int(self.chunks.end[chunk])

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.stat().st_uid != os.getuid():
            raise ValueError(f"cache folder {self._folder} belongs to another user: pass cache_dir")

    def _lock_file(self, path: Path) -> Path:
        return self._folder / f"{int(path.name[:8], 16) % _LOCK_FILES:03d}.lock"

    def _evict(self) -> None:
        """Delete the least recently opened chunks, and downloads that a killed process left."""
        with _locked(self._folder / "evict.lock"):
            files: list[tuple[float, int, Path]] = []
            for entry in os.scandir(self._folder):
                with contextlib.suppress(FileNotFoundError):
                    state, path = entry.stat(), Path(entry.path)
                    if path.suffix == ".chunk":
                        files.append((state.st_mtime, state.st_size, path))
                    elif (
                        path.suffix == ".part" and time.time() - state.st_mtime > _ABANDONED_SECONDS
                    ):
                        path.unlink()
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= self._capacity_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size


def _map(path: Path, start: int = 0, size: int = 0) -> memoryview:
    """`size` bytes from `start` on, a multiple of the page size; 0 for all."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=start))


def _map_whole(path: Path, size: int) -> memoryview | None:
    """The file, marked as used now; None where it is not there, or not of this size."""
    try:
        os.utime(path)
        mapped = _map(path)
    except FileNotFoundError:
        return None
    return mapped if len(mapped) == size else None


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Hold a lock between processes; the kernel drops it when its holder dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
