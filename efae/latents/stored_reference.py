"""References of guided-diffusion: a .npz file of real images (arr_0), moments of theirs, or both.

The published ones hold moments over a whole training set, for FID and sFID, and 10,000 of its
images for precision and recall. Nothing in a file is unpickled, and its images, which can take
gigabytes, are read batch by batch.
"""

import hashlib
import math
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from efae.evaluation.set_distances import Moments

_IMAGES = "arr_0"
_NAMES = ("mu", "sigma", "mu_s", "sigma_s")
_POOLED, _SPATIAL = 2048, 2023
_FORM = np.lib.format
_FAULTS = (
    *(ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What NumPy and zipfile raise of files that are damaged, or something else."""


@dataclass(frozen=True)
class StoredReference:
    """Content of a file, except for the images themselves.

    Attributes:
        path: Path of the file.
        sha256: Hash of the file.
        moments: Moments of pooled and of spatial features; None if it holds images alone.
        shape: Colours, height and width of its images; None if it holds moments alone.
        count: Number of its images.
    """

    path: Path
    sha256: str
    moments: tuple[Moments, Moments] | None
    shape: tuple[int, int, int] | None
    count: int

    def read(self, batch_size: int) -> Iterator[UInt8[Tensor, "b c h w"]]:
        """Yield the images in batches.

        Raises:
            ValueError: The file is damaged.
        """
        assert self.shape is not None
        colours, height, width = self.shape
        with _open(self.path) as archive, archive.open(f"{_IMAGES}.npy") as file:
            _read_header(file)
            for start in range(0, self.count, batch_size):
                shape = min(batch_size, self.count - start), height, width, colours
                data = bytearray(file.read(math.prod(shape)))
                if len(data) < math.prod(shape):
                    raise ValueError("its images are cut short")
                images = torch.frombuffer(data, dtype=torch.uint8).view(shape)
                yield images.permute(0, 3, 1, 2).contiguous()


def read_stored(path: Path) -> StoredReference:
    """Read a reference of guided-diffusion, but not its images.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with _open(path) as archive:
        there = set(archive.namelist())
        has_images = f"{_IMAGES}.npy" in there
        has_moments = any(f"{name}.npy" in there for name in _NAMES)
        if not (has_images or has_moments):
            raise ValueError("none of these arrays is there")
        shape = (0, 0, 0, 0)
        if has_images:
            with archive.open(f"{_IMAGES}.npy") as file:
                shape = _read_header(file)
    count, height, width, colours = shape
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredReference(
        path,
        digest,
        _read_moments(path) if has_moments else None,
        (colours, height, width) if has_images else None,
        count,
    )


def _read_moments(path: Path) -> tuple[Moments, Moments]:
    with _open(path), np.load(path, allow_pickle=False) as found:
        arrays = {name: torch.tensor(found[name], dtype=torch.float64) for name in _NAMES}
        pooled, spatial = (
            Moments(arrays[mean], arrays[covariance])
            for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
        )
        for moments, d in ((pooled, _POOLED), (spatial, _SPATIAL)):
            if moments.mean.shape != (d,) or moments.covariance.shape != (d, d):
                raise ValueError("moments of other features")
    if not all(bool(array.isfinite().all()) for array in arrays.values()):
        raise ValueError(f"{path}: holds numbers that are not finite")
    return pooled, spatial


def _read_header(file: IO[bytes]) -> tuple[int, int, int, int]:
    """Read the header of an array of images, and return its shape."""
    old = _FORM.read_magic(file) == (1, 0)
    read: Any = _FORM.read_array_header_1_0 if old else _FORM.read_array_header_2_0
    shape, by_columns, kind = read(file)
    if kind != np.uint8 or by_columns or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{_IMAGES} has type {kind} and shape {shape}")
    return shape


@contextmanager
def _open(path: Path) -> Generator[zipfile.ZipFile]:
    """Open the file; whatever is wrong with it becomes one message that says what it should be."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _FAULTS as error:
        raise ValueError(
            f"{path}: not a reference of guided-diffusion, which has the array {_IMAGES} of images"
            f" (n, height, width, 3) as uint8, the arrays {', '.join(_NAMES)} of {_POOLED} pooled"
            f" and {_SPATIAL} spatial features, or all of these ({error})"
        ) from error
