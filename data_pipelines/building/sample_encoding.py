"""Samples of a source: entries, which are listed first, and images encoded as shard members."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
from PIL import Image, ImageOps

from data_pipelines.images.codec import count_frames, decode_image, encode_png, read_shape
from data_pipelines.images.headers import is_upright_jpeg

ENCODINGS = ("png", "jpeg")
LABELS = SOURCE, FOLDERS = ("source", "folders")
_LONGEST_KEY = 90  # bytes; a ustar header holds 100


@dataclass(frozen=True)
class Entry:
    """One image of a source, before it is read."""

    key: str
    family: str
    place: Any
    """Location of the image, for the source."""
    folder: str = ""
    """Top-level folder of the source that holds the image; "" for none."""
    label: int | None = None
    """Class to write; None keeps what the source has."""


@dataclass(frozen=True)
class EncodedImage:
    """The members of one sample."""

    extension: str
    data: bytes
    shape: tuple[int, int, int]
    """(C, H, W)."""
    others: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """Label and other members of the source, by extension."""
    further_frames: int = 0
    """Number of frames or pages after the first, which are left out."""


@dataclass(frozen=True)
class Encoding:
    """Encoding of images that do not keep their own bytes, and origin of labels."""

    name: str = "png"
    quality: int = 95
    """JPEG quality; colours keep their full resolution (4:4:4)."""
    labels: str = SOURCE
    """One of `LABELS`."""

    def __post_init__(self) -> None:
        if self.name not in ENCODINGS:
            raise ValueError(f"--encoding {self.name}: use one of {', '.join(ENCODINGS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: must be from 1 to 100")
        if self.labels not in LABELS:
            raise ValueError(f"--labels {self.labels}: use one of {', '.join(LABELS)}")

    def describe(self) -> dict[str, Any]:
        """Return the options that differ from the default, for the fingerprint."""
        return {
            **({} if self.name == "png" else {"encoding": self.name, "quality": self.quality}),
            **({} if self.labels == SOURCE else {"labels": self.labels}),
        }

    def encode(self, pixels: np.ndarray, others: Mapping[str, bytes] | None = None) -> EncodedImage:
        """Encode uint8 (H, W) or (H, W, 3); equal pixels give equal bytes."""
        shape = (1 if pixels.ndim == 2 else 3, pixels.shape[0], pixels.shape[1])
        if self.name == "png":
            return EncodedImage("png", encode_png(pixels), shape, others or {})
        grey = pixels.ndim == 2
        data = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels[..., None] if grey else pixels),
            self.quality,
            colorspace="GRAY" if grey else "RGB",
            colorsubsampling="Gray" if grey else "444",
        )
        return EncodedImage("jpg", data, shape, others or {})

    def encode_file(
        self,
        data: bytes,
        resolution: int | None,
        where: str,
        others: Mapping[str, bytes] | None = None,
    ) -> EncodedImage:
        """Encode an image file; a JPEG that needs no change keeps its bytes.

        Raises:
            ValueError: The file is damaged; `where` names it.
        """
        try:
            # Use the readers' decoder: a file that it refuses must not enter a shard.
            shape = read_shape(data)
            pixels = decode_image(data, shape[0])
        except ValueError as error:
            raise ValueError(f"{where}: {error}; remove or replace it") from error
        further_frames = count_frames(data) - 1
        if resolution is None and is_upright_jpeg(data):
            return EncodedImage("jpg", data, shape, others or {}, further_frames)
        pixels = pixels[0] if shape[0] == 1 else pixels.transpose(1, 2, 0)
        image = self.encode(pixels if resolution is None else fit(pixels, resolution), others)
        return replace(image, further_frames=further_frames)


def decode_png(data: bytes) -> np.ndarray:
    """Decode a PNG of our own to uint8 (H, W, 3)."""
    return decode_image(data, 3).transpose(1, 2, 0)


def fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resample the centre square to `side`."""
    fitted = ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def make_key(name: str) -> str:
    """Make a WebDataset key: without dots, which end a key, relative, short enough for a header."""
    key = name.lstrip("/\\").replace(".", "_")
    if len(key.encode()) > _LONGEST_KEY:
        key = hashlib.sha256(name.encode()).hexdigest()[:32]
    return key


def find_folder(name: str) -> str:
    """Return the top-level folder of a path with slashes; "" for none."""
    folder, slash, _ = name.removeprefix("./").partition("/")
    return sys.intern(folder) if slash else ""
