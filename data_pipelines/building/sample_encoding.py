"""What a source hands to the builder: entries first, then each image as a member of a shard."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
from PIL import Image, ImageOps

from data_pipelines.images.codec import count_frames, decode_image, encode_png, read_shape
from data_pipelines.images.headers import is_upright_jpeg

ENCODINGS = ("png", "jpeg")
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
    """The members of one sample."""

    extension: str
    data: bytes
    shape: tuple[int, int, int]
    """(C, H, W)."""
    others: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """Label and whatever else the source has, by extension."""
    further_frames: int = 0
    """Frames or pages of the source's file after the first, which alone is taken."""


@dataclass(frozen=True)
class Encoding:
    """How an image is written that does not keep its own bytes."""

    name: str = "png"
    quality: int = 95
    """Of JPEG, which keeps the colours at full resolution (4:4:4)."""

    def __post_init__(self) -> None:
        if self.name not in ENCODINGS:
            raise ValueError(f"--encoding {self.name}: use one of {', '.join(ENCODINGS)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: must be from 1 to 100")

    def describe(self) -> dict[str, Any]:
        """What makes a set's bytes differ from the default's."""
        return {} if self.name == "png" else {"encoding": self.name, "quality": self.quality}

    def encode(self, pixels: np.ndarray, others: Mapping[str, bytes] | None = None) -> EncodedImage:
        """Members of uint8 (H, W) or (H, W, 3); the same bytes for the same pixels."""
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
        """An image file as members: a JPEG keeps its bytes where nothing has to be changed.

        Raises:
            ValueError: damaged; `where` names it.
        """
        try:
            # By the decoder that readers use: what it refuses must not get into a shard.
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
    """uint8 (H, W, 3) of a PNG that we made ourselves."""
    return decode_image(data, 3).transpose(1, 2, 0)


def fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """The centre square, resampled to `side`."""
    fitted = ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def make_key(name: str) -> str:
    """A WebDataset key: no dots, which end a key; never absolute; short enough for a tar header."""
    key = name.lstrip("/\\").replace(".", "_")
    if len(key.encode()) > _LONGEST_KEY:
        key = hashlib.sha256(name.encode()).hexdigest()[:32]
    return key
