"""Image file bytes <-> uint8 pixels, one channel for grey and three for RGB.

The pixels equal those of Pillow's ``ImageOps.exif_transpose(image).convert("RGB")``, with an alpha
channel composited on white: palettes and CMYK become RGB, the orientation is applied (see
`headers`), colour profiles are not. Only the first of several frames or pages is read. More than 8
bits per channel are refused. Every fault raises ValueError, so no decoder is used that only warns
and fills the rest with grey. One warning is tolerated: bytes between the pixels of a JPEG and its
end, which some cameras leave.

simplejpeg decodes JPEG: 1.5 times as fast as Pillow, with equal pixels, and strict about damage.
imagecodecs (libpng) decodes PNG: several times as fast as `Image.open` on small images, and as
strict. imagecodecs also decodes JPEG XL, and Pillow the rest. All of them release the GIL.
"""

import contextlib
import io
import math
import re
from collections.abc import Iterable

import imagecodecs
import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines.images.headers import (
    JPEG,
    NPY,
    ORIENTATION,
    PNG,
    Buffer,
    check_size,
    find_scan,
    has_further_jpegs,
    is_jpeg_of_size,
    read_jpeg_header,
    read_png_header,
    view_npy,
)
from data_pipelines.images.resampling import cover

_USUAL = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
IMAGE_EXTENSIONS = (
    *_USUAL,
    *("apng", "jpe", "jfif", "dib", "pbm", "pnm", "pfm", "avif", "avifs", "jxl", "mpo", "qoi"),
    *("jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "tga", "icb", "vda", "vst", "psd", "dds", "pcx"),
    *("ico", "icns", "cur", "sgi", "rgb", "rgba", "bw", "ras", "im", "msp", "blp", "xbm", "xpm"),
)
"""Extensions of the image files that are read, in lower case."""
UNREAD_EXTENSIONS = (
    *("heic", "heif", "hif", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "pef", "srw"),
    *("jxr", "wdp", "hdp", "jls", "exr", "hdr", "fits", "fit"),
)
"""Extensions of the image files that no decoder here reads, or reads to 8 bits per channel."""
ARRAY_EXTENSION = "npy"
_COLOURS = {1: "GRAY", 3: "RGB"}
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# No format that runs another program, as EPS does.
_PILLOW_FORMATS = (
    *("WEBP", "JPEG", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "DIB", "QOI", "ICO", "ICNS"),
    *("CUR", "PSD", "DDS", "PCX", "SGI", "SUN", "IM", "MSP", "BLP", "XBM", "XPM"),
)
_JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL ")
_HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1"))
_FILLING = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_JPEG_END = b"\xff\xd9"


def is_image(extension: str) -> bool:
    """Return whether an extension (``png``, ``seg.jpg``) names an image file; ``npy`` does not."""
    return extension.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS


def image_extensions(members: Iterable[str]) -> list[str]:
    """Return the members of a sample that may be its image, in order of preference.

    ``jpg`` precedes ``seg.png``, and common formats precede rare ones; then names decide. A member
    ``npy`` may be anything, so it comes last; ``latent.npy`` is never an image.
    """

    def rank(name: str) -> tuple[int, bool, str]:
        return name.count("."), name.rsplit(".", 1)[-1].lower() not in _USUAL, name

    files = sorted(filter(is_image, members), key=rank)
    return [*files, *(name for name in members if name == ARRAY_EXTENSION)]


def read_shape(data: Buffer) -> tuple[int, int, int]:
    """Return (C, H, W) of the upright image; only JPEG XL is decoded for it.

    Raises:
        ValueError: The data is not an image of a supported format.
    """
    if data[:2] == JPEG and (header := read_jpeg_header(data)):
        return header.shape
    if data[:8] == PNG:
        return read_png_header(data).shape
    if data[:6] == NPY:
        height, width, channels = view_npy(data).shape
        return channels, height, width
    if data[:2] == _JPEG_XL[0] or data[:8] == _JPEG_XL[1]:
        height, width, found = _decode_jpeg_xl(data).shape
        return 1 if found == 1 else 3, height, width
    try:
        with _open_with_pillow(data) as image:
            # Pillow rotates a TIFF while loading it, and reports its upright size before.
            orientation = _read_orientation(image) if image.format != "TIFF" else 1
            transposed = orientation in (5, 6, 7, 8)
            height, width = image.size if transposed else (image.height, image.width)
            _refuse_deep(image)
            return 1 if image.mode in ("1", "L") else 3, height, width
    except Exception as error:
        raise _explain(error) from error


def count_frames(data: Buffer) -> int:
    """Count the frames of an animation or the pages of a document; 1 if the count is unknown."""
    if data[:2] == JPEG and not has_further_jpegs(data):
        return 1
    if data[:8] == PNG and bytes(data[37:41]) != b"acTL":
        return 1
    try:
        with _open_with_pillow(data) as image:
            # In other formats, "frames" are layers or sizes of one image.
            animated = image.format in ("GIF", "TIFF", "WEBP", "AVIF", "PNG", "MPO")
            return int(getattr(image, "n_frames", 1)) if animated else 1
    except Exception:  # the first frame was read
        return 1


def decode_image(data: Buffer, channels: int) -> np.ndarray:
    """Decode to uint8 (channels, H, W), converted to grey (1) or RGB (3).

    Raises:
        ValueError: The data is damaged, or not an image of a supported format.
    """
    return _decode(data, channels).transpose(2, 0, 1)


def decode_into(
    row: np.ndarray,
    data: Buffer,
    crop_at: tuple[float, float] = (0.5, 0.5),
) -> None:
    """Fill `row` with the image in `data`.

    An image of another size is cropped to the largest part with the row's aspect ratio, on whole
    pixels, and resampled. A JPEG of at least twice the row's size is scaled during decoding.

    Args:
        row: Row of a batch, uint8 (H, W, C), C-contiguous, C = 1 or 3; undefined after an error.
        data: Image file.
        crop_at: Place of the crop, (vertical, horizontal): 0 for top or left, 1 for the other end.

    Raises:
        ValueError: The data is damaged, or not an image of a supported format.
    """
    if data[:2] == JPEG and _fill_from_jpeg(row, data):
        return
    height, width, channels = row.shape
    pixels = _decode(data, channels, row)
    if pixels.shape != row.shape:
        pixels = cover(pixels, height, width, crop_at)
    row[:] = pixels


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W) or (H, W, 3) as PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _decode(data: Buffer, channels: int, row: np.ndarray | None = None) -> np.ndarray:
    """Decode to uint8 (H, W, channels); `row` is for `_decode_jpeg`."""
    if data[:2] == JPEG:
        return _decode_jpeg(data, channels, row)
    if data[:8] == PNG:
        return _decode_png(data, channels)
    if data[:6] == NPY:
        pixels = view_npy(data)
        return pixels if pixels.shape[2] == channels else _convert(pixels, channels)
    if data[:2] == _JPEG_XL[0] or data[:8] == _JPEG_XL[1]:
        pixels = _decode_jpeg_xl(data)
        return pixels if pixels.shape[2] == channels else _convert(pixels, channels)
    return _decode_with_pillow(data, channels)


def _fill_from_jpeg(row: np.ndarray, data: Buffer) -> bool:
    """Decode into `row` if the JPEG needs nothing else: the fast path of the usual case.

    Return False if it needs more, or is faulty; `_decode_jpeg` then handles it.
    """
    if not is_jpeg_of_size(data, row.shape[:2]):
        return False
    try:
        simplejpeg.decode_jpeg(data, _COLOURS[row.shape[2]], buffer=row)
    except ValueError:
        return False
    return True


def _decode_jpeg(data: Buffer, channels: int, row: np.ndarray | None) -> np.ndarray:
    """Decode to uint8 (H, W, channels), scaled down towards the size of `row` if it is given."""
    header = read_jpeg_header(data)
    if header is None:
        return _decode_with_pillow(data, channels)
    colours = "CMYK" if header.channels == 4 else _COLOURS[channels]
    height, width = header.height, header.width
    try:
        if row is None:
            pixels = simplejpeg.decode_jpeg(data, colours)
        else:
            rows, columns = row.shape[:2] if header.orientation < 5 else row.shape[1::-1]
            largest = min(height // rows, width // columns)
            divisor = next((n for n in (8, 4, 2) if n <= largest), 1)  # n/8 is slower than resizing
            pixels = simplejpeg.decode_jpeg(
                data,
                colours,
                min_height=math.ceil(height / divisor),
                min_width=math.ceil(width / divisor),
            )
            # The last pixels of a scaled JPEG may lie partly outside the image.
            pixels = pixels[: height // divisor, : width // divisor]
    except ValueError as error:
        if (repaired := _drop_filling(data, str(error))) is not None:
            return _decode_jpeg(repaired, channels, row)
        raise ValueError(f"damaged or unusual JPEG ({error})") from error
    if header.channels == 4:
        size = (pixels.shape[1], pixels.shape[0])
        image = Image.frombytes("CMYK", size, pixels.tobytes(), "raw", "CMYK;I")
        pixels = _as_grey_or_rgb(image, channels)
    return _turn(pixels, header.orientation)


def _drop_filling(data: Buffer, warning: str) -> bytes | None:
    """Remove the bytes before the JPEG's end that `warning` reports; None for other warnings."""
    found = _FILLING.search(warning)
    if found is None:
        return None
    data = bytes(data)
    scan = find_scan(data)
    end = data.find(_JPEG_END, scan)  # pixel data never contains 0xff 0xd9
    start = end - int(found[1])
    return data[:start] + data[end:] if 0 < scan < start else None


def _decode_png(data: Buffer, channels: int) -> np.ndarray:
    data = bytes(data)  # the decoder reads no views
    header = read_png_header(data)
    try:
        pixels = imagecodecs.png_decode(data)
    except (imagecodecs.PngError, UnicodeDecodeError):
        # imagecodecs reads libpng's message from memory that libpng has freed: it may say anything.
        raise ValueError("damaged PNG (a chunk, or the compressed pixels)") from None
    except ValueError as error:
        raise ValueError(f"damaged PNG ({error})") from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    found = pixels.shape[2]
    if found in (1, 3) and header.has_key:
        raise ValueError("damaged PNG (its transparency)")  # libpng only warns about it
    if found != channels:
        pixels = _convert(pixels, channels)
    return _turn(pixels, header.orientation)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return an upright view of (H, W, C)."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _decode_jpeg_xl(data: Buffer) -> np.ndarray:
    """Decode to uint8 (H, W, 1 to 4); libjxl applies the orientation."""
    try:
        pixels = imagecodecs.jpegxl_decode(bytes(data), index=0)
    except (imagecodecs.JpegxlError, RuntimeError, ValueError) as error:
        raise ValueError(f"damaged JPEG XL ({error})") from error
    check_size(*pixels.shape[:2])  # no library at hand reads the header alone
    if pixels.dtype != np.uint8:
        raise ValueError(f"JPEG XL of {pixels.dtype}: convert it to 8 bits per channel first")
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _decode_with_pillow(data: Buffer, channels: int) -> np.ndarray:
    try:
        with _open_with_pillow(data) as image:
            image.load()
            upright = image
            with contextlib.suppress(Exception):  # damaged metadata does not make a damaged image
                upright = ImageOps.exif_transpose(image)
            return _as_grey_or_rgb(upright, channels)
    except Exception as error:
        raise _explain(error) from error


def _open_with_pillow(data: Buffer) -> Image.Image:
    # TGA has no signature: check its fields for "palette or none" and for one of six types.
    is_tga = len(data) > 18 and data[1] in (0, 1) and data[2] in (1, 2, 3, 9, 10, 11)
    try:
        image = Image.open(
            io.BytesIO(data), formats=[*_PILLOW_FORMATS, *(["TGA"] if is_tga else [])]
        )
    except UnidentifiedImageError as error:
        raise ValueError(_describe_unknown(data)) from error
    check_size(image.height, image.width)
    return image


def _describe_unknown(data: Buffer) -> str:
    """Explain why Pillow does not recognise the data."""
    if not data:
        return "the file is empty"
    if bytes(data[4:12]) in _HEIC:
        return "HEIC is not supported: convert it, for example to JPEG"
    if bytes(data[:40]).startswith(b"version https://git-lfs."):
        return "a pointer of Git LFS: fetch the file with `git lfs pull`"
    return "not an image, or its header is damaged"


def _read_orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged metadata does not make a damaged image
        return None


def _convert(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert grey or RGB, with or without alpha, to uint8 (H, W, channels)."""
    grey = pixels.shape[2] == 1
    return _as_grey_or_rgb(Image.fromarray(pixels[..., 0] if grey else pixels), channels)


def _as_grey_or_rgb(image: Image.Image, channels: int) -> np.ndarray:
    """Convert to uint8 (H, W, channels); transparency becomes white."""
    _refuse_deep(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(image.height, image.width, channels)


def _refuse_deep(image: Image.Image) -> None:
    if image.mode in _DEEP_MODES:
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel: convert it first")


def _explain(error: Exception) -> ValueError:
    """Convert any error that Pillow's plugins raise on a damaged file to ValueError."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ValueError(f"refused: {error}")
    if isinstance(error, ValueError):
        return error
    return ValueError(f"damaged image ({type(error).__name__}: {error})")
