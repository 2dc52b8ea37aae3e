"""Image files of every format, made here, and readings of them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

from data_pipelines.images.codec import decode_into

GREY, RGB = "L", "RGB"


def picture(height: int, width: int, mode: str = RGB) -> Image.Image:
    """Smooth in places, noisy in others, different in every corner."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    noise = np.random.default_rng(0).normal(0, 8, (height, width)) * (x > 0.5)
    planes = [200 * x + 30, 120 + 100 * np.sin(9 * y), 220 * y * (1 - x)]
    stacked = np.stack([plane + noise for plane in planes], axis=-1)
    return Image.fromarray(stacked.clip(0, 255).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def encode_npy(pixels: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels, **options)
    return buffer.getvalue()


def read(data: bytes, shape: tuple[int, int, int], **options: object) -> np.ndarray:
    row = np.full(shape, 77, np.uint8)
    decode_into(row, data, **options)  # pyright: ignore[reportArgumentType]
    return row


def open_with_pillow(data: bytes, mode: str) -> np.ndarray:
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / (np.square(one.astype(float) - other).mean() + 1e-9))


FILES: dict[str, bytes] = {
    "jpeg": encode(picture(37, 53), quality=90),
    "jpeg, progressive": encode(picture(37, 53), quality=90, progressive=True),
    "jpeg, 4:4:4": encode(picture(37, 53), quality=90, subsampling=0),
    "jpeg, grey": encode(picture(37, 53, GREY)),
    "jpeg, cmyk": encode(picture(37, 53, "CMYK"), quality=95),
    "png": encode(picture(37, 53), "PNG"),
    "png, grey": encode(picture(37, 53, GREY), "PNG"),
    "png, palette": encode(picture(37, 53).quantize(20), "PNG"),
    "png, 1 bit": encode(picture(37, 53, "1"), "PNG"),
    "webp": encode(picture(37, 53), "WEBP", lossless=True),
    "bmp": encode(picture(37, 53), "BMP"),
    "gif": encode(picture(37, 53).quantize(20), "GIF"),
    "tiff": encode(picture(37, 53), "TIFF"),
    "ppm": encode(picture(37, 53), "PPM"),
    "pgm": encode(picture(37, 53, GREY), "PPM"),
}


def make_png(
    width: int, height: int, bits: int, colour: int, packed: bytes, interlaced: int = 0
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(make_chunk(*chunk) for chunk in chunks)


def make_chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc
