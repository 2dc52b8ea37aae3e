"""What an image file says of itself before its pixels: size, colours, which way is up.

simplejpeg reads the header of a JPEG, but for the one question that the loader has of each image;
Pillow reads Exif, numpy the header of an npy. Which way is up is what Pillow's
`ImageOps.exif_transpose` finds: Exif's orientation, wherever the Exif lies, and that of XMP where
Exif has none. Damaged metadata is no damaged image: it is shown as it is stored.
"""

import io
import math
import re
import struct
import zlib
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
from PIL import Image

Buffer = bytes | memoryview

JPEG, PNG, NPY = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
"""The first bytes of such a file."""
CMYK_COLOURS = ("CMYK", "YCCK")
"""What simplejpeg calls a JPEG's colours where there are four of them."""
MAX_PIXELS = 178_956_970
"""A larger image is refused as a decompression bomb; Pillow's own limit."""
ORIENTATION = 0x0112
"""Exif's tag."""
_JPEG_SEGMENT = struct.Struct(">HH")  # marker, length without the marker
_JPEG_FRAME = struct.Struct(">HHB")  # height, width, colours
_APP1, _APP2, _BASELINE, _PROGRESSIVE, _SCAN = 0xFFE1, 0xFFE2, 0xFFC0, 0xFFC2, 0xFFDA
_EXIF, _XMP, _MPF = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0"
"""What such a segment begins with."""
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_PNG_HEADER = struct.Struct(">4sIIBB3xI")
_PNG_CHUNK = struct.Struct(">I4s")  # length of the content, name
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_XMP, _PNG_EXIF_AS_TEXT = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"
"""What such a text begins with."""
_LONGEST_NPY_HEADER = 1024


class Header(NamedTuple):
    height: int
    width: int
    """Both as stored, before the image is turned upright."""
    channels: int
    """1 for grey, 4 for CMYK, 3 for all others, with or without alpha."""
    orientation: int
    """Exif's, 1 for upright to 8."""
    has_key: bool = False
    """Whether a chunk tRNS of a PNG makes a colour, or entries of the palette, transparent."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the upright image as grey or RGB."""
        turned = self.orientation >= 5
        size = (self.width, self.height) if turned else (self.height, self.width)
        return (1 if self.channels == 1 else 3, *size)


def read_jpeg_header(data: Buffer) -> Header | None:
    """None for what TurboJPEG cannot read: a rare subsampling, or a damaged header.

    Raises:
        ValueError: too large.
    """
    try:
        rows, columns, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    height, width = int(rows), int(columns)
    check_size(height, width)
    channels = 1 if colours == "Gray" else 4 if colours in CMYK_COLOURS else 3
    return Header(height, width, channels, read_jpeg_orientation(data))


def read_jpeg_orientation(data: Buffer) -> int:
    """Exif's, 1 for upright to 8; 1 where there is none, or it is damaged."""
    places: list[tuple[int, int]] = []
    at = 2
    try:
        while True:
            marker, length = _JPEG_SEGMENT.unpack_from(data, at)
            if marker == _SCAN:
                return _read_app1(data, places) if places else 1
            if not (_BASELINE <= marker < 0xFFD0 or _SCAN < marker < 0xFFFF):
                break  # filling, or what does not belong here
            if marker == _APP1:
                places.append((at + 4, at + 2 + length))
            at += 2 + length
    except struct.error:  # past the end
        pass
    return _ask_pillow(data, "JPEG")


def is_jpeg_of_size(data: Buffer, size: tuple[int, int]) -> bool:
    """Whether a JPEG in grey or three colours is shown as it is stored and has this (H, W).

    It follows the markers, in half the time of simplejpeg's reader. False where they cannot be
    followed; that all else is whole, the decoder finds out.
    """
    fits, places, at = False, list[tuple[int, int]](), 2
    try:
        while True:
            marker, length = _JPEG_SEGMENT.unpack_from(data, at)
            if marker == _SCAN:
                return fits and not (places and _read_app1(data, places) != 1)
            if _BASELINE <= marker <= _PROGRESSIVE:
                height, width, colours = _JPEG_FRAME.unpack_from(data, at + 5)
                fits = (height, width) == size and colours in (1, 3)
            elif marker == _APP1:
                places.append((at + 4, at + 2 + length))
            elif not 0xFF00 < marker < 0xFFFF:
                return False
            at += 2 + length
    except struct.error:  # past the end
        return False


def has_further_jpegs(data: Buffer) -> bool:
    """Whether a JPEG says where others lie in the same file, as an MPO does."""
    at = 2
    try:
        while True:
            marker, length = _JPEG_SEGMENT.unpack_from(data, at)
            if marker == _SCAN or not 0xFF00 < marker < 0xFFFF:
                return False
            if marker == _APP2 and data[at + 4 : at + 4 + len(_MPF)] == _MPF:
                return True
            at += 2 + length
    except struct.error:  # past the end
        return False


def _read_app1(data: Buffer, places: list[tuple[int, int]]) -> int:
    """Orientation by the segments APP1, which are [start, end)."""
    exif = xmp = b""
    for start, end in places:
        content = bytes(data[start:end])
        if content.startswith(_EXIF):  # a long one goes on in the next segment
            exif += content[len(_EXIF) if exif else 0 :]
        elif content.startswith(_XMP):
            xmp = content
    return _find_orientation(exif, xmp)


def is_upright_jpeg(data: Buffer) -> bool:
    """Whether it is a plain JPEG that is shown as it is stored."""
    header = read_jpeg_header(data) if data[:2] == JPEG else None
    return header is not None and header.orientation == 1


def read_png_header(data: Buffer) -> Header:
    """Of a PNG with 8 bits a channel or less that has an end.

    Raises:
        ValueError: damaged, too large, or deeper than 8 bits.
    """
    data = bytes(data)
    exif, xmp, is_unusual, has_key, pixels, at = b"", b"", False, False, -1, len(PNG)
    try:
        while True:
            length, name = _PNG_CHUNK.unpack_from(data, at)
            if name == b"IDAT":
                pixels = at
            elif name == b"eXIf":
                exif = data[at + 8 : at + 8 + length]
            elif name == b"tRNS":
                has_key = has_key or pixels < 0
            elif name in _PNG_TEXTS:
                if data.startswith(_PNG_XMP, at + 8):
                    xmp = data[at + 8 + len(_PNG_XMP) : at + 8 + length]
                    is_unusual = is_unusual or name != b"iTXt" or xmp[:1] != b"\0"  # compressed
                elif data.startswith(_PNG_EXIF_AS_TEXT, at + 8):  # as older programs wrote it
                    is_unusual = True
            at += 12 + length
            if name == b"IEND":
                break
    except struct.error:
        at = len(data) + 1
    if len(data) < at:  # libpng does without an end
        raise ValueError("damaged PNG (it is cut off)")
    kind, width, height, bits, colour, crc = _PNG_HEADER.unpack_from(data, 12)
    if kind != b"IHDR" or zlib.crc32(data[12:29]) != crc:
        raise ValueError("damaged PNG (its header)")
    if bits > 8:
        raise ValueError(f"PNG with {bits} bits a channel: convert it to 8 first")
    check_size(height, width)
    orientation = _ask_pillow(data, "PNG") if is_unusual else _find_orientation(exif, xmp)
    return Header(height, width, 1 if colour == 0 else 3, orientation, has_key)


def view_npy(data: Buffer) -> np.ndarray:
    """uint8 (H, W, C) view of `data`, an npy file.

    An array of three axes whose last is 1 or 3 long is (H, W, C), even if its first is, too.

    Raises:
        ValueError: damaged, too large, or no image.
    """
    wide = data[6:7] != b"\x01"  # format 1 gives its header's length in 2 bytes, 2 and 3 in 4
    start = 12 if wide else 10
    end = start + int.from_bytes(data[8:start], "little")
    if len(data) < end or end > _LONGEST_NPY_HEADER:
        raise ValueError("damaged npy (its header is cut off)")
    shape, order = _parse_npy_header(bytes(data[:end]))
    if len(data) - end != math.prod(shape):
        raise ValueError(f"damaged npy ({len(data) - end} bytes of pixels for the shape {shape})")
    pixels = np.frombuffer(data, np.uint8, offset=end).reshape(shape, order=order)
    if pixels.ndim == 2:
        return pixels[..., None]
    return pixels if shape[2] in (1, 3) else pixels.transpose(1, 2, 0)


@lru_cache(maxsize=256)  # the header of equal shapes is the same, and parsing takes longer than all
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], Any]:
    """(shape, "C" or "F")."""
    try:
        stream = io.BytesIO(header)
        major, _ = np.lib.format.read_magic(stream)
        read = {1: np.lib.format.read_array_header_1_0}.get(
            major, np.lib.format.read_array_header_2_0
        )
        shape, fortran, kind = read(stream)
    except Exception as error:  # whatever numpy's parser meets in a damaged header
        raise ValueError("damaged npy (its header is not numpy's)") from error
    if kind != np.uint8:
        raise ValueError(f"npy of type {kind.str!r}: an image has uint8, convert it first")
    colours = len(shape) == 3 and (shape[2] in (1, 3) or shape[0] in (1, 3))
    if len(shape) != 2 and not colours:
        raise ValueError(f"npy of shape {shape}: an image is (H, W), (H, W, C) or (C, H, W)")
    check_size(*(shape if len(shape) == 2 else shape[:2] if shape[2] in (1, 3) else shape[1:]))
    return shape, "F" if fortran else "C"


def check_size(height: int, width: int) -> None:
    """Raises ValueError for an image without pixels, or with more than `MAX_PIXELS`."""
    if height < 1 or width < 1:
        raise ValueError(f"damaged image ({height} x {width} pixels)")
    if height * width > MAX_PIXELS:
        raise ValueError(f"refused: {height} x {width} pixels are more than {MAX_PIXELS}")


def _find_orientation(exif: bytes, xmp: bytes) -> int:
    """Exif's; XMP's where Exif has none."""
    orientation: Any = None
    if exif:
        tags = Image.Exif()
        try:
            tags.load(exif)
            orientation = tags.get(ORIENTATION)
        except Exception:  # other programs also show such a picture as it is stored
            return 1
    if orientation is None and xmp:
        found = _XMP_ORIENTATION.search(xmp)
        orientation = int(found[1]) if found else None
    return _check_orientation(orientation)


def _ask_pillow(data: Buffer, form: str) -> int:
    """Orientation by Pillow's own reader, which knows more ways than the usual ones."""
    try:
        with Image.open(io.BytesIO(data), formats=[form]) as image:
            return _check_orientation(image.getexif().get(ORIENTATION))
    except Exception:  # the decoder finds out what is wrong with the pixels
        return 1


def _check_orientation(found: Any) -> int:
    return found if isinstance(found, int) and 1 <= found <= 8 else 1
