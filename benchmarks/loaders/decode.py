"""Decoders that a user of the other loaders would call: image file -> uint8 (H, W, 3)."""

import io

import numpy as np
import simplejpeg
from PIL import Image


def decode_pil(data: bytes) -> np.ndarray:
    """Decode any image with Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decode_simplejpeg(data: bytes) -> np.ndarray:
    """Decode JPEG with simplejpeg, the decoder of our own loader."""
    return simplejpeg.decode_jpeg(data)


DECODERS = {"pil": decode_pil, "simplejpeg": decode_simplejpeg}
