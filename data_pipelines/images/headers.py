"""Headers of image files: size, colours and orientation, without decoding pixels.

simplejpeg reads JPEG headers, except in `is_jpeg_of_size`, which the loader calls for each image;
Pillow reads Exif, and numpy reads npy headers. The orientation is that of Pillow's
`ImageOps.exif_transpose`: Exif's, wherever the Exif lies, or XMP's if Exif has none. An image with
damaged metadata is not damaged: it is shown as stored.
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
"""Signatures: the first bytes of a file."""
CMYK_COLOURS = ("CMYK", "YCCK")
"""simplejpeg's names of a JPEG's four-channel colour spaces."""
MAX_PIXELS = 178_956_970
"""Largest number of pixels; more is refused as a decompression bomb. Pillow's own limit."""
ORIENTATION = 0x0112
"""Exif tag of the orientation."""
_JPEG_SEGMENT = struct.Struct(">HH")  # marker, length without the marker
_JPEG_FRAME = struct.Struct(">HHB")  # height, width, colours
_APP1, _APP2, _BASELINE, _PROGRESSIVE, _SCAN = 0xFFE1, 0xFFE2, 0xFFC0, 0xFFC2, 0xFFDA
_EXIF, _XMP, _MPF = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0"
"""First bytes of such a segment."""
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_PNG_HEADER = struct.Struct(">4sIIBB3xI")
_PNG_CHUNK = struct.Struct(">I4s")  # length of the content, type
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_XMP, _PNG_EXIF_AS_TEXT = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"
"""First bytes of such a text chunk."""
_LONGEST_NPY_HEADER = 1024


class Header(NamedTuple):
    height: int
    width: int
    """Height and width as stored, before the orientation is applied."""
    channels: int
    """1 for grey, 4 for CMYK, 3 for all others, with or without alpha."""
    orientation: int
    """Orientation in Exif's code, from 1 (upright) to 8."""
    has_key: bool = False
    """Whether a PNG's tRNS chunk makes a colour, or entries of the palette, transparent."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the upright image as grey or RGB."""
        transposed = self.orientation >= 5
        size = (self.width, self.height) if transposed else (self.height, self.width)
        return (1 if self.channels == 1 else 3, *size)


def read_jpeg_header(data: Buffer) -> Header | None:
    """Read a JPEG header; None if TurboJPEG cannot: a rare subsampling, or a damaged header.

    Raises:
        ValueError: The image is too large.
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
    """Return the orientation in Exif's code; 1 (upright) if it is missing or damaged."""
    places: list[tuple[int, int]] = []
    at = 2
    try:
        while True:
            marker, length = _JPEG_SEGMENT.unpack_from(data, at)
            if marker == _SCAN:
                return _read_app1(data, places) if places else 1
            if not (_BASELINE <= marker < 0xFFD0 or _SCAN < marker < 0xFFFF):
                break  # padding, or a marker that does not belong here
            if marker == _APP1:
                places.append((at + 4, at + 2 + length))
            at += 2 + length
    except struct.error:  # past the end
        pass
    return _ask_pillow(data, "JPEG")


def is_jpeg_of_size(data: Buffer, size: tuple[int, int]) -> bool:
    """Return whether a JPEG of one or three channels is stored upright and has this (H, W).

    It scans the markers, in half the time of simplejpeg's reader, and returns False if the scan
    fails. It does not validate the rest of the file; the decoder does.
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
    """Return whether a JPEG lists further images in the same file, as MPO does."""
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


def find_scan(data: Buffer) -> int:
    """Return where the first scan of a JPEG starts; -1 if the markers do not lead there.

    A thumbnail in the metadata has a scan, too, but lies within a segment.
    """
    at = 2
    try:
        while True:
            marker, length = _JPEG_SEGMENT.unpack_from(data, at)
            if marker == _SCAN:
                return at
            if marker < 0xFF01:
                return -1
            at += 2 + length if marker < 0xFFFF else 1  # 0xFF: padding
    except struct.error:  # past the end
        return -1


def _read_app1(data: Buffer, places: list[tuple[int, int]]) -> int:
    """Read the orientation from the APP1 segments, [start, end) each."""
    exif = xmp = b""
    for start, end in places:
        content = bytes(data[start:end])
        if content.startswith(_EXIF):  # long Exif continues in the next segment
            exif += content[len(_EXIF) if exif else 0 :]
        elif content.startswith(_XMP):
            xmp = content
    return _find_orientation(exif, xmp)


def is_upright_jpeg(data: Buffer) -> bool:
    """Return whether the data is a JPEG that is stored upright."""
    header = read_jpeg_header(data) if data[:2] == JPEG else None
    return header is not None and header.orientation == 1


def read_png_header(data: Buffer) -> Header:
    """Read the header of a PNG, and check that the file is complete.

    Raises:
        ValueError: The PNG is damaged, too large, or has more than 8 bits per channel.
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
                elif data.startswith(_PNG_EXIF_AS_TEXT, at + 8):  # written by older programs
                    is_unusual = True
            at += 12 + length
            if name == b"IEND":
                break
    except struct.error:
        at = len(data) + 1
    if len(data) < at:  # libpng accepts a PNG without an end
        raise ValueError("damaged PNG (it is cut off)")
    kind, width, height, bits, colour, crc = _PNG_HEADER.unpack_from(data, 12)
    if kind != b"IHDR" or zlib.crc32(data[12:29]) != crc:
        raise ValueError("damaged PNG (its header)")
    if bits > 8:
        raise ValueError(f"PNG with {bits} bits per channel: convert it to 8 first")
    check_size(height, width)
    orientation = _ask_pillow(data, "PNG") if is_unusual else _find_orientation(exif, xmp)
    return Header(height, width, 1 if colour == 0 else 3, orientation, has_key)


def view_npy(data: Buffer) -> np.ndarray:
    """Return a uint8 (H, W, C) view of `data`, an npy file.

    An array of three axes is (H, W, C) if the last has length 1 or 3, whatever the first.

    Raises:
        ValueError: The file is damaged, too large, or not an image.
    """
    wide = data[6:7] != b"\x01"  # the header's length has 2 bytes in version 1, 4 in 2 and 3
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


@lru_cache(maxsize=256)  # equal shapes have equal headers, and parsing would take the most time
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], Any]:
    """Return (shape, "C" or "F")."""
    try:
        stream = io.BytesIO(header)
        major, _ = np.lib.format.read_magic(stream)
        read = {1: np.lib.format.read_array_header_1_0}.get(
            major, np.lib.format.read_array_header_2_0
        )
        shape, fortran, kind = read(stream)
    except Exception as error:  # numpy's parser raises many types on a damaged header
        raise ValueError("damaged npy (its header is not numpy's)") from error
    if kind != np.uint8:
        raise ValueError(f"npy of type {kind.str!r}: an image is uint8, convert it first")
    colours = len(shape) == 3 and (shape[2] in (1, 3) or shape[0] in (1, 3))
    if len(shape) != 2 and not colours:
        raise ValueError(f"npy of shape {shape}: an image is (H, W), (H, W, C) or (C, H, W)")
    check_size(*(shape if len(shape) == 2 else shape[:2] if shape[2] in (1, 3) else shape[1:]))
    return shape, "F" if fortran else "C"


def check_size(height: int, width: int) -> None:
    """Raise ValueError for an image without pixels, or with more than `MAX_PIXELS`."""
    if height < 1 or width < 1:
        raise ValueError(f"damaged image ({height} x {width} pixels)")
    if height * width > MAX_PIXELS:
        raise ValueError(f"refused: {height} x {width} pixels are more than {MAX_PIXELS}")


def _find_orientation(exif: bytes, xmp: bytes) -> int:
    """Return Exif's orientation, or XMP's if Exif has none."""
    orientation: Any = None
    if exif:
        tags = Image.Exif()
        try:
            tags.load(exif)
            orientation = tags.get(ORIENTATION)
        except Exception:  # other programs, too, show such an image as stored
            return 1
    if orientation is None and xmp:
        found = _XMP_ORIENTATION.search(xmp)
        orientation = int(found[1]) if found else None
    return _check_orientation(orientation)


def _ask_pillow(data: Buffer, form: str) -> int:
    """Read the orientation with Pillow's own reader, which handles rare encodings."""
    try:
        with Image.open(io.BytesIO(data), formats=[form]) as image:
            return _check_orientation(image.getexif().get(ORIENTATION))
    except Exception:  # the decoder reports what is wrong with the pixels
        return 1


def _check_orientation(found: Any) -> int:
    return found if isinstance(found, int) and 1 <= found <= 8 else 1
