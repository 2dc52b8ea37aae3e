"""Whole shards on this node's disk, memory-mapped; shared by the processes of one user.

Files are named by their sha256, so two shard sets never mix and a file that is there is right: it
was checked before it got its name. A shard that already is a local file is mapped where it lies.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path

from data_pipelines import storage, uris
from data_pipelines.shard_index import Shard

_ABANDONED_SECONDS = 3600.0


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
    """At most `capacity_bytes` of shards in `folder`; the least recently opened go first.

    Downloads in flight, at most one a fetching thread, come on top.
    """

    def __init__(self, uri: str, folder: Path | None, capacity_bytes: int):
        self._uri = uri
        self._folder = folder or default_cache_dir()
        self._capacity_bytes = capacity_bytes
        self._maps: dict[str, tuple[Path, mmap.mmap]] = {}
        self._lock = threading.Lock()
        self._shard_locks: dict[str, threading.Lock] = {}

    def open(self, shard: Shard) -> mmap.mmap:
        """The shard's bytes, fetched and checked first where they are not here; thread-safe.

        Raises:
            ShardError: missing, unreachable or damaged.
        """
        with self._lock:
            if shard.sha256 in self._maps:
                return self._maps[shard.sha256][1]
            shard_lock = self._shard_locks.setdefault(shard.sha256, threading.Lock())
        with shard_lock:
            with self._lock:
                if shard.sha256 in self._maps:
                    return self._maps[shard.sha256][1]
            uri = uris.join(self._uri, shard.name)
            try:
                path = uris.local_path(uri)
                mapped = self._map_local(path, shard) if path else self._map_remote(uri, shard)
            except (OSError, ValueError) as error:
                raise ShardError(uri, None, str(error)) from error
            with self._lock:
                # A file that was evicted keeps its disk space until its map is dropped.
                self._maps = {key: kept for key, kept in self._maps.items() if kept[0].exists()}
                self._maps[shard.sha256] = mapped
            return mapped[1]

    def _map_local(self, path: Path, shard: Shard) -> tuple[Path, mmap.mmap]:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise ValueError(
                f"damaged: {path.stat().st_size} of {shard.bytes} bytes, sha256 {found[:12]}…"
                f" instead of {shard.sha256[:12]}…; write it again"
            )
        return path, _map(path)

    def _map_remote(self, uri: str, shard: Shard) -> tuple[Path, mmap.mmap]:
        self._make_folder()
        path = self._folder / f"{shard.sha256}.tar"
        with _locked(path.with_suffix(".lock")):  # one download a node, not one a rank
            if not path.exists() or path.stat().st_size != shard.bytes:
                with _locked(self._folder / "evict.lock"):
                    self._evict(self._capacity_bytes - shard.bytes)
                storage.download(uri, path, expected_bytes=shard.bytes, sha256=shard.sha256)
                with _locked(self._folder / "evict.lock"):
                    self._evict(self._capacity_bytes)  # for what others fetched meanwhile
            os.utime(path)
            return path, _map(path)

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.stat().st_uid != os.getuid():
            raise ValueError(f"cache folder {self._folder} belongs to another user: pass cache_dir")

    def _evict(self, capacity_bytes: int) -> None:
        """Delete the least recently opened shards, and downloads that a killed process left."""
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                if path.suffix == ".tar":
                    files.append((state.st_mtime, state.st_size, path))
                elif path.suffix == ".part" and time.time() - state.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= capacity_bytes:
                return
            with path.with_suffix(".lock").open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # fetched, but not mapped yet
                    continue
                path.unlink(missing_ok=True)
                total -= size


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Hold a lock between processes; the kernel drops it when its holder dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
