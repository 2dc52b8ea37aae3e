"""Every way an image file can be broken."""

import random
import struct
import zlib
from collections.abc import Callable

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from data_pipelines.images import headers
from data_pipelines.images.codec import decode_image, read_shape
from tests.unit.images.image_files import (
    FILES,
    RGB,
    encode,
    encode_npy,
    make_png,
    open_with_pillow,
    read,
)

READERS: list[Callable[[bytes], object]] = [
    lambda data: read(data, (37, 53, 3)),
    lambda data: read(data, (16, 16, 3)),
    lambda data: read(data, (37, 53, 1)),
    lambda data: decode_image(data, 3),
]


@pytest.mark.filterwarnings("ignore")  # Pillow's, about metadata
@pytest.mark.parametrize("name", FILES)
def test_a_cut_off_file_is_an_error(name: str):
    data = FILES[name]
    cuts = {len(data) * part // 20 for part in range(20)} | {len(data) - 1}
    if name in ("gif", "bmp"):  # the last byte is no part of the picture: an end mark, padding
        cuts.discard(len(data) - 1)
    for cut in sorted(cuts):
        for reader in READERS:
            with pytest.raises(ValueError):  # noqa: PT011
                reader(data[:cut])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_decoded_or_a_value_error(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # or a flip makes a large, slow image
    damage = random.Random(name)
    refused = 0
    for trial in range(200):
        data = bytearray(FILES[name])
        for _ in range(damage.choice([1, 1, 5])):
            data[damage.randrange(min(len(data), 400 if trial % 2 else 10**9))] ^= 1 << (trial % 8)
        try:
            READERS[trial % 4](bytes(data))
            read_shape(bytes(data))
        except ValueError:
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("name", ["png", "png, grey", "png, palette"])
def test_every_flipped_byte_of_a_pngs_pixels_is_found(name: str):
    data = FILES[name]
    start = data.index(b"IDAT")
    for place in range(start, data.index(b"IEND"), 7):
        flipped = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        with pytest.raises(ValueError):  # noqa: PT011
            read(flipped, (37, 53, 3))


def test_every_flipped_byte_of_a_pngs_header_is_found_without_decoding():
    data = FILES["png"]
    for place in range(8 + 4, 8 + 25):
        flipped = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        with pytest.raises(ValueError, match="damaged PNG"):
            read_shape(flipped)


def test_random_bytes_are_value_errors():
    noise = random.Random(0)
    for start in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", b"II*\0"):
        for size in (0, 1, 10, 1000):
            for reader in (*READERS, read_shape):
                with pytest.raises(ValueError):  # noqa: PT011
                    reader(start + noise.randbytes(size))


def test_an_odd_subsampling_is_read_all_the_same():
    data = bytearray(encode(Image.new(RGB, (48, 48), (90, 120, 200)), subsampling=0))
    frame = data.index(b"\xff\xc0")
    data[frame + 11] = 0x31  # luminance 3 times as wide as colour, which TurboJPEG refuses
    row = read(bytes(data), (48, 48, 3))
    np.testing.assert_array_equal(row, open_with_pillow(bytes(data), RGB))


def test_more_than_8_bits_are_refused():
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    grey = encode(Image.fromarray(deep), "PNG")
    rows = b"".join(b"\0" + bytes(24) for _ in range(4))
    colour = make_png(4, 4, 16, 2, zlib.compress(rows))
    twelve = FILES["jpeg"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    tiff = encode(Image.fromarray(deep), "TIFF")
    for data in (grey, colour, twelve, tiff):
        with pytest.raises(ValueError, match=r"bits per channel|data precision 12"):
            read(data, (4, 4, 3))


def test_bombs_are_refused_before_memory_is_taken():
    size = struct.pack(">HH", 60000, 60000)
    frame = FILES["jpeg"].index(b"\xff\xc0")
    jpeg = FILES["jpeg"][: frame + 5] + size + FILES["jpeg"][frame + 9 :]
    png = make_png(60000, 60000, 8, 2, zlib.compress(bytes(1000)))
    npy = encode_npy(np.zeros((4, 4), np.uint8)).replace(b"(4, 4), }     ", b"(60000, 60000)}")
    gif = FILES["gif"][:6] + struct.pack("<HH", 60000, 60000) + FILES["gif"][10:]
    for data in (jpeg, png, npy, gif):
        for reader in (*READERS, read_shape):
            with pytest.raises(ValueError, match="refused"):
                reader(data)


@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 3)])
def test_a_jpeg_xl_that_no_index_may_hold_is_refused(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    data = imagecodecs.jpegxl_encode(np.zeros(shape, np.uint8))
    assert read_shape(data)[1:] == (40, 50)
    monkeypatch.setattr(headers, "MAX_PIXELS", 1999)  # the real limit takes 180 MB
    for reader in (*READERS, read_shape):
        with pytest.raises(ValueError, match="refused: 40 x 50 pixels"):
            reader(data)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_a_png_with_too_few_rows_is_an_error(colour: int, channels: int):
    for rows in range(8):
        packed = zlib.compress(bytes((8 * channels + 1) * rows))
        with pytest.raises(ValueError, match="damaged PNG"):
            read(make_png(8, 8, 8, colour, packed), (8, 8, 3))
    for value in range(3):  # whatever the pixels of a whole one are
        packed = zlib.compress(bytes([0, *[value] * 8 * channels]) * 8)
        read(make_png(8, 8, 8, colour, packed), (8, 8, 3))
