"""Image file bytes <-> uint8 pixels, one channel for grey and three for RGB.

An alpha channel is laid on white, palettes and CMYK become RGB, Exif orientation is applied (as
`build_shards` does), more than 8 bits a channel is refused. Any fault is a ValueError: a decoder
that only warns and fills the rest with grey is never trusted with a file.

JPEG goes through simplejpeg: 1.5 times as fast as Pillow, equal in its pixels, and strict about
damage. Plain PNG (8 bits, grey or RGB) goes straight to Pillow's inflating decoder, twice as fast
as `Image.open` on small images; the rest is Pillow's. All of them release the GIL.
"""

import ast
import io
import math
import struct
import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
ARRAY_EXTENSION = "npy"
GREY_MODES = ("1", "L")
MAX_PIXELS = 178_956_970
"""A larger image is refused as a decompression bomb; Pillow's own limit."""
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L")
_PILLOW_FORMATS = ("PNG", "WEBP", "JPEG", "BMP", "GIF", "TIFF", "PPM")
_JPEG, _PNG, _NPY = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_JPEG_FRAMES = frozenset(range(0xFFC0, 0xFFD0)) - {0xFFC4, 0xFFC8, 0xFFCC}
_PNG_EXTRAS = (b"tRNS", b"eXIf", b"acTL", b"tEXt", b"zTXt", b"iTXt")
"""Chunks that may mean transparency, orientation (some write it as text) or animation."""
_ORIENTATION = 0x0112
_LONGEST_NPY_HEADER = 1024

Buffer = bytes | memoryview


def is_image(extension: str) -> bool:
    """Whether an extension (``png``, ``seg.jpg``) names an image file; ``npy`` does not."""
    return extension.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS


def image_extensions(members: Iterable[str]) -> list[str]:
    """Those of a sample's members that may be its image, first choice first.

    ``jpg`` before ``seg.png``, then by name. A member ``npy`` may be anything, so it counts only
    where there is no image file, and ``latent.npy`` never.
    """
    files = sorted(filter(is_image, members), key=lambda name: (name.count("."), name))
    return [*files, *(name for name in members if name == ARRAY_EXTENSION)]


def read_shape(data: Buffer) -> tuple[int, int, int]:
    """(C, H, W) of the upright image, from the header alone.

    Raises:
        ValueError: not an image that we read.
    """
    if data[:2] == _JPEG:
        header = _read_jpeg_header(data)
        return (1 if header.components == 1 else 3, *header.upright_size)
    if data[:6] == _NPY:
        height, width, channels = _read_npy(data).shape
        return channels, height, width
    if data[:8] == _PNG:
        png = _read_png(data)
        if png.mode is not None:
            return len(png.mode), png.height, png.width
    try:
        with open_image(data) as image:
            # Pillow turns a TIFF while it loads it and gives the upright size before.
            orientation = image.getexif().get(_ORIENTATION) if image.format != "TIFF" else 1
            turned = orientation in (5, 6, 7, 8)
            height, width = image.size if turned else (image.height, image.width)
            return 1 if image.mode in GREY_MODES else 3, height, width
    except Exception as error:
        raise _explain(error) from error


def decode_image(data: Buffer, channels: int) -> np.ndarray:
    """uint8 (channels, H, W), converted between grey and RGB as `channels` (1 or 3) asks.

    Raises:
        ValueError: damaged, or not an image that we read.
    """
    return _decode(data, channels, None).transpose(2, 0, 1)


def decode_into(
    row: np.ndarray,
    data: Buffer,
    crop_at: tuple[float, float] = (0.5, 0.5),
    resize: bool = True,
) -> None:
    """Fill `row` with the image in `data`.

    An image of another size is scaled until it just covers the row and then cropped: the crop is
    the largest part of the row's aspect, on whole pixels. A JPEG of at least twice the row's size
    is scaled while it is decoded.

    Args:
        row: uint8 (H, W, C), C-contiguous, C = 1 or 3; on an error its content is undefined.
        data: an image file.
        crop_at: (vertical, horizontal) place of the crop, 0 for top or left, 1 for the other end.
        resize: False crops at the image's own scale.

    Raises:
        ValueError: damaged, not an image that we read, or smaller than `row` without `resize`.
    """
    height, width, channels = row.shape
    if data[:2] == _JPEG:
        header = _read_jpeg_header(data)
        if header == (height, width, 1, 1) or header == (height, width, 3, 1):
            try:
                simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", buffer=row)
            except ValueError:  # rare, and sorted out below
                row[:] = _decode_jpeg(data, header, channels, None)
            return
    pixels = _decode(data, channels, (height, width) if resize else None)
    if pixels.shape != row.shape:
        pixels = _cover(pixels, height, width, crop_at, resize)
    row[:] = pixels


def as_grey_or_rgb(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 (H, W) for one channel, (H, W, 3) for three; transparency becomes white."""
    if image.mode in _DEEP_MODES:
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel: convert it first")
    try:
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"damaged image ({error})") from error


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG of uint8 (H, W) or (H, W, 3); the same bytes for the same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def open_image(data: Buffer) -> Image.Image:
    """The image, header read; raises ValueError where it is not one, or is a bomb."""
    if data[:6] == _NPY:
        pixels = _read_npy(data)
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if data[:8] == _PNG:
        _read_png(data)  # Pillow itself reads 16 bits of colour as 8, and does without an end
    try:
        return Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or its header is damaged") from error
    except Exception as error:
        raise _explain(error) from error


def _explain(error: Exception) -> ValueError:
    """Pillow's plugins fail in a dozen ways on a damaged file: one kind of error for all."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ValueError(f"refused: {error}")
    if isinstance(error, ValueError):
        return error
    return ValueError(f"damaged image ({type(error).__name__}: {error})")


def _decode(data: Buffer, channels: int, least: tuple[int, int] | None) -> np.ndarray:
    """uint8 (h, w, channels); a JPEG may come scaled, but not below `least` = (height, width)."""
    if data[:2] == _JPEG:
        return _decode_jpeg(data, _read_jpeg_header(data), channels, least)
    if data[:8] == _PNG:
        png = _read_png(data)
        if png.mode is not None:
            return _decode_plain_png(png, png.mode, channels)
        _check_rows(png)
    elif data[:6] == _NPY:
        pixels = _read_npy(data)
        if pixels.shape[2] == channels:
            return pixels
    return _decode_with_pillow(data, channels)


def _decode_with_pillow(data: Buffer, channels: int) -> np.ndarray:
    try:
        with open_image(data) as image:
            ImageOps.exif_transpose(image, in_place=True)
            pixels = as_grey_or_rgb(image, channels)
    except Exception as error:
        raise _explain(error) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _to_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 (H, W, channels) of an image without transparency."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    pixels = np.frombuffer(image.tobytes(), np.uint8)
    return pixels.reshape(image.height, image.width, channels)


def _cover(
    pixels: np.ndarray, height: int, width: int, crop_at: tuple[float, float], resize: bool
) -> np.ndarray:
    """The part of `pixels` at `crop_at` that fills (height, width)."""
    rows, columns = pixels.shape[:2]
    if not resize and (rows < height or columns < width):
        raise ValueError(
            f"the image has {rows} x {columns} pixels, less than {height} x {width}: allow"
            " resizing, or ask for a smaller size"
        )
    scale = max(height / rows, width / columns) if resize else 1.0
    box_rows = min(rows, max(1, round(height / scale)))
    box_columns = min(columns, max(1, round(width / scale)))
    top, left = round((rows - box_rows) * crop_at[0]), round((columns - box_columns) * crop_at[1])
    part = pixels[top : top + box_rows, left : left + box_columns]
    return part if part.shape[:2] == (height, width) else _resample(part, height, width)


def _resample(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic, within 1 of Pillow's and, in torch, several times as fast."""
    import torch  # here, because building and indexing do without

    image = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    image = image.view(1, *pixels.shape).permute(0, 3, 1, 2)  # keeps its strides: no copy below
    resized = torch.nn.functional.interpolate(
        image, (height, width), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


class _JpegHeader(NamedTuple):
    height: int
    width: int
    components: int
    orientation: int
    """Exif's, 1 for upright to 8."""

    @property
    def upright_size(self) -> tuple[int, int]:
        turned = self.orientation >= 5
        return (self.width, self.height) if turned else (self.height, self.width)


def _read_jpeg_header(data: Buffer) -> _JpegHeader:
    place, orientation = 2, 1
    try:
        while True:
            marker, length = struct.unpack_from(">HH", data, place)
            if marker in _JPEG_FRAMES:
                bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
                break
            if marker == 0xFFFF:  # fill byte
                place += 1
                continue
            if marker < 0xFFC0 or length < 2:
                raise ValueError("damaged JPEG (no marker where one has to be)")
            if marker == 0xFFE1 and data[place + 4 : place + 10] == b"Exif\0\0":
                orientation = _read_orientation(data[place + 10 : place + 2 + length])
            place += 2 + length
    except struct.error as error:
        raise ValueError("damaged JPEG (its header is cut off)") from error
    if bits != 8:
        raise ValueError(f"JPEG with {bits} bits a channel: convert it to 8 first")
    _check_size(height, width)
    return _JpegHeader(height, width, components, orientation)


def _read_orientation(exif: Buffer) -> int:
    """Exif's orientation, 1 to 8; 1 where there is none, or Exif is damaged."""
    order = ">" if exif[:2] == b"MM" else "<"
    try:
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for place in range(first + 2, first + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, place)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # other programs also show such a picture as it is stored
        pass
    return 1


def _decode_jpeg(
    data: Buffer, header: _JpegHeader, channels: int, least: tuple[int, int] | None
) -> np.ndarray:
    scaling: dict[str, Any] = {}
    rows, columns = header.height, header.width
    if least is not None:
        height, width = least if header.orientation < 5 else least[::-1]
        for divisor in (8, 4, 2):  # n/8 in between is slower than to resample
            if header.height // divisor >= height and header.width // divisor >= width:
                rows, columns = header.height // divisor, header.width // divisor
                scaling = {
                    "min_height": math.ceil(header.height / divisor),
                    "min_width": math.ceil(header.width / divisor),
                }
                break
    colours = "CMYK" if header.components == 4 else "GRAY" if channels == 1 else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(data, colours, **scaling)
    except ValueError as error:
        if "subsampling" in str(error):  # TurboJPEG knows the usual ones only
            return _decode_with_pillow(data, channels)
        raise ValueError(f"damaged JPEG ({error})") from error
    pixels = pixels[:rows, :columns]  # the last ones of a scaled JPEG may be only partly image
    if colours == "CMYK":
        size = (pixels.shape[1], pixels.shape[0])
        image = Image.frombytes("CMYK", size, pixels.tobytes(), "raw", "CMYK;I")
        pixels = _to_pixels(image, channels)
    if header.orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if header.orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if header.orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


class _Png(NamedTuple):
    height: int
    width: int
    mode: str | None
    """Pillow's, "L" or "RGB"; None for what is not plain."""
    packed: Buffer
    """The deflated rows."""
    packed_size: int
    """At least so many bytes are the rows before deflating."""


def _read_png(data: Buffer) -> _Png:
    """Walk the chunks; raises ValueError where one is missing, damaged or deeper than 8 bits."""
    place, plain = len(_PNG), True
    header: tuple[int, ...] | None = None
    packed: list[Buffer] = []
    try:
        while True:
            length, kind = struct.unpack_from(">I4s", data, place)
            start, end = place + 8, place + 8 + length
            if not kind[0] & 32:  # a capital: the image depends on it
                (crc,) = struct.unpack_from(">I", data, end)
                if zlib.crc32(data[place + 4 : end]) != crc:
                    raise ValueError("damaged PNG (checksum)")
            if kind == b"IDAT":
                packed.append(data[start:end])
            elif kind == b"IHDR":
                header = struct.unpack_from(">IIBBBBB", data, start)
            elif kind == b"IEND":
                break
            elif kind in _PNG_EXTRAS:
                plain = False
            place = end + 4
    except struct.error as error:
        raise ValueError("damaged PNG (it is cut off)") from error
    if header is None or not packed:
        raise ValueError("damaged PNG (no header, or no image)")
    width, height, bits, colour, *methods = header
    if bits > 8:
        raise ValueError(f"PNG with {bits} bits a channel: convert it to 8 first")
    _check_size(height, width)
    mode = {0: "L", 2: "RGB"}.get(colour) if plain and bits == 8 and not any(methods) else None
    row_bits = width * bits * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    return _Png(
        height,
        width,
        mode,
        packed[0] if len(packed) == 1 else b"".join(packed),
        height * ((row_bits + 7) // 8 + 1) if not any(methods) else height * row_bits // 8,
    )


def _decode_plain_png(png: _Png, mode: str, channels: int) -> np.ndarray:
    unset = b"\1\2\3"[: len(mode)]
    image = Image.new(mode, (png.width, png.height), tuple(unset))
    try:
        image.frombytes(png.packed, "zip", (mode, 0))
    except ValueError as error:
        raise ValueError(f"damaged PNG ({error})") from error
    pixels = image.tobytes()
    if pixels.endswith(unset):  # the last row may never have been written
        _check_rows(png)
    if len(mode) != channels:
        return _to_pixels(image, channels)
    return np.frombuffer(pixels, np.uint8).reshape(png.height, png.width, channels)


def _check_rows(png: _Png) -> None:
    """Pillow takes a PNG whose packed rows end early for a whole one."""
    try:
        size = len(zlib.decompressobj().decompress(png.packed, png.packed_size))
    except zlib.error as error:
        raise ValueError(f"damaged PNG ({error})") from error
    if size < png.packed_size:
        raise ValueError("damaged PNG (it has too few rows)")


def _read_npy(data: Buffer) -> np.ndarray:
    """uint8 (H, W, C) view of `data`.

    An array of three axes whose last is 1 or 3 long is (H, W, C), even if its first is, too.
    """
    wide = data[6:7] != b"\x01"  # format 1 gives its header's length in 2 bytes, 2 and 3 in 4
    start = 12 if wide else 10
    length = int.from_bytes(data[8:start], "little")
    if len(data) < start + length or length > _LONGEST_NPY_HEADER:
        raise ValueError("damaged npy (its header is cut off)")
    shape, order = _parse_npy_header(bytes(data[start : start + length]))
    if len(data) - start - length != math.prod(shape):
        raise ValueError(
            f"damaged npy ({len(data) - start - length} bytes of pixels for the shape {shape})"
        )
    pixels = np.frombuffer(data, np.uint8, offset=start + length).reshape(shape, order=order)
    if pixels.ndim == 2:
        return pixels[..., None]
    return pixels if shape[2] in (1, 3) else pixels.transpose(1, 2, 0)


@lru_cache(maxsize=256)  # the header of equal shapes is the same, and parsing takes longer than all
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], Any]:
    """(shape, "C" or "F")."""
    try:
        fields = ast.literal_eval(header.decode("latin-1").strip())
        kind, shape, fortran = fields["descr"], fields["shape"], fields["fortran_order"]
        shape = tuple(int(length) for length in shape)
    except Exception as error:  # whatever the parser meets in a damaged header
        raise ValueError("damaged npy (its header is not numpy's)") from error
    if kind not in ("|u1", "<u1", "u1"):
        raise ValueError(f"npy of type {kind!r}: an image has uint8, convert it first")
    colours = len(shape) == 3 and (shape[2] in (1, 3) or shape[0] in (1, 3))
    if len(shape) != 2 and not colours:
        raise ValueError(f"npy of shape {shape}: an image is (H, W), (H, W, C) or (C, H, W)")
    _check_size(*(shape if len(shape) == 2 else shape[:2] if shape[2] in (1, 3) else shape[1:]))
    return shape, "F" if fortran else "C"


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"damaged image ({height} x {width} pixels)")
    if height * width > MAX_PIXELS:
        raise ValueError(f"refused: {height} x {width} pixels are more than {MAX_PIXELS}")
