"""Every way an image file can come."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines.images import codec
from data_pipelines.images.codec import decode_image, image_extensions, read_shape
from data_pipelines.images.headers import is_jpeg_of_size
from data_pipelines.images.logs import ignore_metadata
from tests.unit.images.image_files import (
    FILES,
    GREY,
    RGB,
    encode,
    encode_npy,
    make_chunk,
    make_png,
    open_with_pillow,
    picture,
    psnr,
    read,
)

PLAIN_JPEGS = ("jpeg", "jpeg, progressive", "jpeg, 4:4:4", "jpeg, grey")


@pytest.mark.parametrize("mode", [GREY, RGB])
@pytest.mark.parametrize("name", FILES)
def test_pixels_are_pillows(name: str, mode: str):
    data = FILES[name]
    expected = open_with_pillow(data, mode)
    if mode == GREY and name.startswith("jpeg") and "cmyk" not in name:
        # The file's own luminance; Pillow's detour over RGB rounds twice.
        with Image.open(io.BytesIO(data)) as image:
            image.draft("L", image.size)
            expected = np.asarray(image.convert("L"))[..., None]
    row = read(data, expected.shape)
    np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(read(memoryview(data), expected.shape), expected)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(decode_image(data, expected.shape[2]).transpose(1, 2, 0), row)
    stored_grey = "grey" in name or name in ("png, 1 bit", "pgm")
    assert read_shape(data) == (1 if stored_grey else 3, 37, 53)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_alpha_is_laid_on_white(form: str):
    image = picture(8, 8).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 128, 255, 0]] * 8), 2, axis=1)))
    row = read(encode(image, form, **({"lossless": True} if form == "WEBP" else {})), (8, 8, 3))
    opaque = np.asarray(picture(8, 8))
    assert (row[:, :2] == 255).all()
    np.testing.assert_array_equal(row[:, 4:6], opaque[:, 4:6])
    expected = (255 + opaque[:, 2:4].astype(float)) / 2
    assert np.abs(row[:, 2:4] - expected).max() <= 1


@pytest.mark.parametrize("colour", [(255, 0, 0), 7])
def test_a_png_with_one_transparent_colour_is_laid_on_white(colour: object):
    image = Image.new(GREY if colour == 7 else RGB, (4, 4), colour)  # pyright: ignore[reportArgumentType]
    image.putpixel((1, 2), 9 if colour == 7 else (9, 9, 9))
    row = read(encode(image, "PNG", transparency=colour), (4, 4, 3))
    assert row[2, 1].tolist() == [9, 9, 9]
    assert (row == 255).sum() == 15 * 3


def test_a_damaged_transparency_is_an_error():
    image = Image.new(RGB, (4, 4), (255, 0, 0))
    data = bytearray(encode(image, "PNG", transparency=(255, 0, 0)))
    data[data.index(b"tRNS") + 5] ^= 4  # libpng drops such a chunk and goes on
    with pytest.raises(ValueError, match="its transparency"):
        read(bytes(data), (4, 4, 3))


def test_grey_with_alpha_is_laid_on_white():
    image = Image.new("LA", (4, 4), (80, 0))
    image.putpixel((1, 2), (80, 255))
    row = read(encode(image, "PNG"), (4, 4, 1))
    assert row[2, 1].tolist() == [80]
    assert (row == 255).sum() == 15


def test_an_interlaced_png_is_read():
    pixels = np.asarray(picture(9, 7))
    steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    passes = (pixels[y::down, x::right] for y, x, down, right in (*steps, (1, 0, 2, 1)))
    rows = b"".join(b"\0" + row.tobytes() for part in passes for row in part)
    data = make_png(7, 9, 8, 2, zlib.compress(rows), interlaced=1)
    np.testing.assert_array_equal(read(data, (9, 7, 3)), pixels)


def test_a_program_can_keep_odd_metadata_of_a_png_out_of_its_log(caplog: pytest.LogCaptureFixture):
    profile = make_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"junk"))
    data = FILES["png"][:33] + profile + FILES["png"][33:]
    with caplog.at_level(logging.WARNING, "imagecodecs"):  # which gives back the level, too
        np.testing.assert_array_equal(read(data, (37, 53, 3)), np.asarray(picture(37, 53)))
        assert caplog.records
        caplog.clear()
        ignore_metadata()
        read(data, (37, 53, 3))
        assert not caplog.records


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int, form: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(24, 40), form, exif=exif)
    expected = open_with_pillow(data, RGB)
    assert read_shape(data) == (3, *expected.shape[:2])
    assert expected.shape[0] == (24 if orientation < 5 else 40)
    np.testing.assert_array_equal(read(data, expected.shape), expected)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_turned_jpeg_is_scaled_and_cropped_upright(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(128, 320), exif=exif, quality=95)
    upright = Image.fromarray(open_with_pillow(data, RGB))
    corner = (0, 0, 128, 128)
    expected = np.asarray(upright.crop(corner).resize((32, 32), Image.Resampling.BICUBIC))
    assert psnr(read(data, (32, 32, 3), crop_at=(0, 0)), expected) > 35


@pytest.mark.parametrize("name", PLAIN_JPEGS)
def test_filling_before_the_end_is_dropped_whatever_the_metadata_holds(name: str):
    data = FILES[name]
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + encode(picture(12, 16))  # a thumbnail
    app1 = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    shape = (37, 53, 3)
    for before in (b"", app1, b"\xff\xff" + app1):
        filled = data[:2] + before + data[2:-2] + bytes(300) + data[-2:]
        np.testing.assert_array_equal(read(filled, shape), read(data, shape))


def test_damaged_exif_is_no_damaged_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(24, 40), exif=exif)
    broken = data.replace(b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0MM\0*\xff\xff\xff\x08")
    assert broken != data
    assert read_shape(broken) == (3, 24, 40)


def test_orientation_of_xmp_beside_a_damaged_exif_is_ignored_as_by_pillow():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="8"/>'
    for exif, shape in ((b"garbage", (3, 24, 40)), (b"", (3, 40, 24))):
        data = encode(picture(24, 40))
        for content in (b"Exif\0\0" + exif, xmp):
            data = data[:2] + struct.pack(">HH", 0xFFE1, len(content) + 2) + content + data[2:]
        with Image.open(io.BytesIO(data)) as image:
            size = ImageOps.exif_transpose(image).size
        assert read_shape(data) == (3, size[1], size[0]) == shape


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.*convert it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<html>", "not an image"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, said: str):
    for reader in (read_shape, lambda data: decode_image(data, 3)):
        with pytest.raises(ValueError, match=said):
            reader(data)


def test_an_unknown_chunk_of_a_png_is_refused_in_our_words():
    data = encode(picture(4, 4), "PNG")
    chunk = b"ABCD" + b"1"
    chunk = struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ValueError, match=r"^damaged PNG \(a chunk, or the compressed pixels\)$"):
        decode_image(data[:33] + chunk + data[33:], 3)


def test_a_jpeg_of_the_rows_size_is_known_by_its_markers():
    size = (37, 53)
    for name, data in FILES.items():
        assert is_jpeg_of_size(data, size) == (name in PLAIN_JPEGS), name
        assert not any(is_jpeg_of_size(data, other) for other in ((53, 37), (37, 52))), name
    data = FILES["jpeg"]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = encode(picture(*size), exif=exif)
        assert is_jpeg_of_size(turned, size) == (orientation == 1)
    # A thumbnail of that size in the header of a larger picture is not the picture.
    larger = encode(picture(80, 80), comment=data)
    assert data in larger
    assert not is_jpeg_of_size(larger, size)
    for end in range(data.index(b"\xff\xda")):
        assert not is_jpeg_of_size(data[:end], size)


# --- size ---


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_crops_along_the_long_side_are_exact(at: float):
    ramp = np.arange(100, dtype=np.uint8)[:, None].repeat(40, axis=1)
    start = round(60 * at)
    for data, expected in (
        (encode(Image.fromarray(ramp), "PNG"), ramp[start : start + 40]),
        (encode(Image.fromarray(ramp.T), "PNG"), ramp.T[:, start : start + 40]),
    ):
        row = read(data, (40, 40, 1), crop_at=(at, at))
        np.testing.assert_array_equal(row[..., 0], expected)


def test_vertical_and_horizontal_place_are_independent():
    wide = np.arange(80, dtype=np.uint8).reshape(4, 20)
    for pixels, expected in ((wide, wide[:, :4]), (wide.T, wide.T[16:])):
        row = read(encode_npy(np.ascontiguousarray(pixels)), (4, 4, 1), crop_at=(1.0, 0.0))
        np.testing.assert_array_equal(row[..., 0], expected)


@pytest.mark.parametrize("mode", [GREY, RGB])
@pytest.mark.parametrize(("size", "target"), [((60, 90), 32), ((33, 47), 32), ((10, 14), 32)])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_resampling_is_pillows_bicubic_of_the_covering_part(
    size: tuple[int, int], target: int, mode: str, at: float
):
    image = picture(*size, mode)
    side = min(size)
    left = round((size[1] - side) * at)
    expected = image.crop((left, 0, left + side, side)).resize(
        (target, target), Image.Resampling.BICUBIC
    )
    row = read(encode(image, "PNG"), (target, target, len(image.getbands())), crop_at=(0.5, at))
    difference = row.squeeze().astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).max() <= 1


def test_a_row_need_not_be_square():
    image = picture(60, 90)
    expected = image.crop((0, 8, 90, 8 + 45)).resize((32, 16), Image.Resampling.BICUBIC)
    row = read(encode(image, "PNG"), (16, 32, 3))
    assert psnr(row, np.asarray(expected)) > 45


@pytest.mark.parametrize("size", [(512, 512), (300, 470), (257, 256), (1000, 130), (130, 1000)])
@pytest.mark.parametrize("channels", [1, 3])
def test_scaling_in_the_jpeg_decoder_is_close_to_resampling(size: tuple[int, int], channels: int):
    image = picture(*size)
    data = encode(image, quality=95)
    full = read(data, (*size, channels))
    as_png = codec.encode_png(full.squeeze())
    for at in (0.0, 0.5, 1.0):
        one = read(data, (64, 64, channels), crop_at=(at, at))
        other = read(as_png, (64, 64, channels), crop_at=(at, at))
        assert psnr(one, other) > 35


def test_an_image_smaller_than_the_row_is_scaled_up():
    data = encode(picture(20, 40), "PNG")
    assert read(data, (32, 32, 3)).std() > 10


# --- npy ---


def test_npy_layouts():
    rng = np.random.default_rng(0)
    for stored, expected in (
        ((5, 7), (5, 7, 1)),
        ((5, 7, 1), (5, 7, 1)),
        ((5, 7, 3), (5, 7, 3)),
        ((1, 5, 7), (5, 7, 1)),
        ((3, 5, 7), (5, 7, 3)),
        ((3, 5, 3), (3, 5, 3)),  # either way possible: channels last
        ((1, 28, 1), (1, 28, 1)),
    ):
        pixels = rng.integers(0, 256, stored, np.uint8)
        last = pixels.reshape(expected)
        if expected[2] == 3 and stored[2] != 3:
            last = pixels.transpose(1, 2, 0)
        for array in (pixels, np.asfortranarray(pixels)):
            data = encode_npy(array)
            height, width, channels = expected
            assert read_shape(data) == (channels, height, width)
            np.testing.assert_array_equal(read(data, expected), last)
    grey = rng.integers(0, 256, (5, 7), np.uint8)
    assert (read(encode_npy(grey), (5, 7, 3)) == grey[..., None]).all()
    colour = np.asarray(picture(5, 7))
    expected_grey = np.asarray(picture(5, 7).convert(GREY))
    np.testing.assert_array_equal(read(encode_npy(colour), (5, 7, 1))[..., 0], expected_grey)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode_npy(np.zeros((4, 4), np.float32)), "'<f4': an image is uint8"),
        (encode_npy(np.zeros((4, 4), np.uint16)), "'<u2': an image is uint8"),
        (encode_npy(np.array([{}]), allow_pickle=True), "'|O': an image is uint8"),
        (encode_npy(np.zeros(16, np.uint8)), r"shape \(16,\)"),
        (encode_npy(np.zeros((2, 4, 4), np.uint8)), r"shape \(2, 4, 4\)"),
        (encode_npy(np.zeros((0, 4), np.uint8)), "0 x 4 pixels"),
        (encode_npy(np.zeros((4, 4), np.uint8))[:-1], "15 bytes of pixels"),
        (encode_npy(np.zeros((4, 4), np.uint8)) + b"\0", "17 bytes of pixels"),
        (encode_npy(np.zeros((4, 4), np.uint8))[:30], "header is cut off"),
        (encode_npy(np.zeros((4, 4), np.uint8)).replace(b"'shape'", b"'shade'"), "not numpy's"),
        (encode_npy(np.zeros((4, 4), np.uint8)).replace(b"(4, 4)", b"open()"), "not numpy's"),
    ],
)
def test_faulty_npy(data: bytes, message: str):
    for use in (read_shape, lambda data: read(data, (4, 4, 1))):
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            use(data)


def test_npy_is_a_samples_image_only_where_there_is_no_file():
    assert image_extensions(["json", "npy"]) == ["npy"]
    assert image_extensions(["npy", "png", "cls", "jpg"]) == ["jpg", "png", "npy"]
    assert image_extensions(["depth.png", "png", "latent.npy"]) == ["png", "depth.png"]
    assert not codec.is_image("npy")
