"""Decoded images of one set on this node's disk, shared by the ranks of one user.

Decoding dominates a warm epoch. Pixels take ten times the space and disk bandwidth of a JPEG, so
the cache is off by default. One sparse file has a slot for each sample from the first on, for as
many as fit; they are never evicted, since in a random order every image is equally likely to come
next. A slot is valid once its checksum is written, after its pixels: a process killed in between
leaves it empty.
"""

import contextlib
import fcntl
import hashlib
import math
import mmap
import os
import weakref
from collections.abc import Generator
from pathlib import Path

import numpy as np
from imagecodecs import deflate_crc32 as compute_crc32  # zlib's value in a fifth of its time

from data_pipelines.loading.cache_folder import explain_full_disk, make_cache_folder

_SUFFIX = ".pixels"
_FORMAT = 2
"""Version; raise it when decoders return other pixels for the same file."""
_CHECK = np.dtype("<u4")


class PixelCache:
    """Rows for the first samples of a set; thread-safe.

    Files of other sets or shapes are deleted unless a process has them open.

    Args:
        folder: Folder of the node's shard cache.
        dataset_id: Id of the set.
        samples: Number of samples in the set.
        shape: Shape of a row, uint8 (H, W, C).
        capacity_bytes: Upper bound of the file, bytes.

    Raises:
        ValueError: The capacity is less than one row.
    """

    def __init__(
        self,
        folder: Path,
        dataset_id: str,
        samples: int,
        shape: tuple[int, int, int],
        capacity_bytes: int,
    ):
        self._row_bytes = math.prod(shape)
        self._rows = min(samples, capacity_bytes // (self._row_bytes + _CHECK.itemsize))
        if not self._rows:
            raise ValueError(
                f"pixel_cache_bytes={capacity_bytes}: one image takes {self._row_bytes}; raise it,"
                " or set it to 0"
            )
        self._first = self._rows * _CHECK.itemsize
        identity = f"{_FORMAT} {dataset_id} {shape} {self._rows}"
        self._path = folder / (hashlib.sha256(identity.encode()).hexdigest()[:32] + _SUFFIX)
        self._file = -1
        self._checks = np.zeros(0, _CHECK)

    def open(self) -> None:
        """Open the file, creating it if missing; call before the first use, any number of times.

        Raises:
            ValueError: The folder belongs to another user.
            StorageError: The disk has no room for a file of this size.
        """
        if self._file >= 0:
            return
        make_cache_folder(self._path.parent)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        weakref.finalize(self, os.close, file)
        fcntl.flock(file, fcntl.LOCK_SH)  # until it is closed: keeps `_delete_unused` off
        _delete_unused(self._path)
        size = self._first + self._rows * self._row_bytes
        with self._explained(size):
            os.ftruncate(file, size)
        # Use the descriptor: another process may have deleted the name before the lock was taken.
        checks = mmap.mmap(file, self._first, access=mmap.ACCESS_READ)
        self._checks = np.frombuffer(checks, _CHECK)
        self._file = file

    def holds(self, samples: np.ndarray) -> np.ndarray:
        """Return which of these samples have pixels here, as a mask."""
        found = np.zeros(len(samples), bool)
        inside = samples < self._rows
        found[inside] = self._checks[samples[inside]] != 0
        return found

    def read(self, sample: int, row: np.ndarray) -> bool:
        """Fill the C-contiguous `row`; return False if the sample is missing or damaged."""
        if sample >= self._rows or not (expected := self._checks[sample]):
            return False
        assert self._file >= 0
        os.preadv(self._file, [row.data], self._first + sample * self._row_bytes)
        return _check(row) == expected

    def write(self, sample: int, row: np.ndarray) -> None:
        """Store the sample's pixels, if it has a slot.

        Raises:
            StorageError: The disk is full.
        """
        if sample >= self._rows:
            return
        assert self._file >= 0
        with self._explained(row.nbytes):
            _write(self._file, row, self._first + sample * self._row_bytes)
            _write(self._file, np.array([_check(row)], _CHECK), sample * _CHECK.itemsize)

    @contextlib.contextmanager
    def _explained(self, size: int) -> Generator[None]:
        try:
            yield
        except OSError as error:
            setting = "data.pixel_cache_bytes"
            raise explain_full_disk(error, self._path.parent, size, setting) from error


def measure_pixels(folder: Path) -> int:
    """Return the disk space of pixel files in this folder, in bytes; 0 if there are none."""
    found = 0
    for path in folder.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            found += path.stat().st_blocks * 512
    return found


def _check(row: np.ndarray) -> int:
    """Return a checksum that is never 0, which marks an empty slot."""
    return compute_crc32(row.data) or 1  # pyright: ignore[reportArgumentType]  # any buffer will do


def _write(file: int, values: np.ndarray, offset: int) -> None:
    rest = values.data.cast("B")
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def _delete_unused(mine: Path) -> None:
    for path in mine.parent.glob(f"*{_SUFFIX}"):
        if path == mine:
            continue
        with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while a process uses it
            path.unlink()
