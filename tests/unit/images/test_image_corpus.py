"""Every kind of image file that Pillow writes, and metadata in odd places: read as Pillow does."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from webdataset.writer import TarWriter

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from data_pipelines.building.sample_encoding import make_key
from data_pipelines.images.codec import decode_image, decode_into, read_shape
from data_pipelines.index_shards import index_shards
from data_pipelines.shards.intake import MOST_BAD_IMAGES, Tolerance

FORMATS = {
    "AVIF": "avif",
    "BLP": "blp",
    "BMP": "bmp",
    "DDS": "dds",
    "DIB": "dib",
    "GIF": "gif",
    "ICNS": "icns",
    "ICO": "ico",
    "IM": "im",
    "JPEG": "jfif",
    "JPEG2000": "jp2",
    "MPO": "mpo",
    "MSP": "msp",
    "PCX": "pcx",
    "PNG": "png",
    "PPM": "pnm",
    "QOI": "qoi",
    "SGI": "sgi",
    "TGA": "tga",
    "TIFF": "tif",
    "WEBP": "webp",
    "XBM": "xbm",
}
UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "PALM", "PDF", "SPIDER", "WMF"}
"""Drawings, stubs, and formats without first bytes of their own."""
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
SIZES = ((1, 1), (16, 16), (13, 29), (5, 200))
DEEP_MODES = ("I", "F")
XMP = b"http://ns.adobe.com/xap/1.0/\0"
PNG_XMP = b"XML:com.adobe.xmp\0"

File = tuple[str, bytes]


def draw(height: int, width: int, mode: str) -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 4), np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels.astype(np.uint16)[..., 0] * 256 + pixels[..., 1])
    if mode == "LAB":
        return Image.frombytes("LAB", (width, height), pixels[..., :3].tobytes())
    image = Image.fromarray(pixels)
    if mode == "PA":
        return image.convert("P").convert("PA")
    return image.convert("RGB" if mode not in ("RGBA", "LA") else "RGBA").convert(mode)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def list_plain_files() -> Iterator[File]:
    for form, extension in FORMATS.items():
        for mode in MODES:
            # Icons are written in sizes of their own, slowly.
            for height, width in SIZES[1:2] if form in ("ICNS", "ICO") else SIZES:
                try:
                    data = encode(draw(height, width, mode), form)
                except (OSError, ValueError, KeyError, SystemError):
                    continue  # Pillow does not write this one
                yield f"{form}/{mode}/{height}x{width}.{extension}".replace(";", "-"), data
    for height, width in ((1, 5000), (5000, 1), (2, 3), (255, 257)):
        for form in ("JPEG", "PNG", "TIFF", "WEBP", "BMP"):
            data = encode(draw(height, width, "RGB"), form)
            yield f"sizes/{form}-{height}x{width}.{FORMATS[form]}", data


def make_exif(orientation: int, filling: int = 0) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if filling:
        exif[0x010E] = "x" * filling
    return exif.tobytes()


def make_segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def make_chunk(name: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def list_turned_files() -> Iterator[File]:
    image = draw(24, 40, "RGB")
    jpeg, png = encode(image, "JPEG"), encode(image, "PNG")

    def insert(*segments: bytes) -> bytes:
        return jpeg[:2] + b"".join(segments) + jpeg[2:]

    def app1(content: bytes) -> bytes:
        return make_segment(0xE1, content)

    for orientation in (0, 1, 3, 5, 6, 8, 9):
        exif, other = make_exif(orientation), make_exif(6)
        xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
        element = f"<tiff:Orientation>{orientation}</tiff:Orientation>".encode()
        long = make_exif(orientation, 100_000)
        no_tags = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
        as_text = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
        plain_xmp = make_chunk(b"iTXt", PNG_XMP + b"\0\0\0\0" + xmp)
        frame = jpeg.index(b"\xff\xc4")
        files = {
            "plain.jpg": insert(app1(exif)),
            "behind photoshop.jpg": insert(
                make_segment(0xED, b"Photoshop 3.0\0" + b"\xff\xda\0" * 999), app1(exif)
            ),
            "behind two profiles.jpg": insert(*[make_segment(0xE2, bytes(65533))] * 2, app1(exif)),
            "in a comment.jpg": insert(make_segment(0xFE, exif)),
            "in another segment.jpg": insert(make_segment(0xE5, exif)),
            "in two segments.jpg": insert(app1(long[:65000]), app1(b"Exif\0\0" + long[65000:])),
            "behind filling.jpg": insert(b"\xff\xff", app1(exif), b"\xff\xff\xff"),
            "behind the frame.jpg": jpeg[:frame] + app1(exif) + jpeg[frame:],
            "xmp.jpg": insert(app1(XMP + xmp)),
            "xmp element.jpg": insert(app1(XMP + element)),
            "xmp and exif.jpg": insert(app1(XMP + b'tiff:Orientation="6"'), app1(exif)),
            "xmp and exif without.jpg": insert(app1(no_tags), app1(XMP + xmp)),
            "chunk.png": png[:33] + make_chunk(b"eXIf", exif[6:]) + png[33:],
            "late chunk.png": png[:-12] + make_chunk(b"eXIf", exif[6:]) + png[-12:],
            "comment.png": png[:33] + make_chunk(b"tEXt", b"Comment\0eXIf" + exif[6:]) + png[33:],
            "text.png": png[:33]
            + make_chunk(b"tEXt", b"Raw profile type exif\0" + as_text)
            + png[33:],
            "packed text.png": png[:33]
            + make_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(as_text))
            + png[33:],
            "text and chunk.png": png[:33]
            + make_chunk(b"tEXt", b"Raw profile type exif\0" + as_text)
            + make_chunk(b"eXIf", other[6:])
            + png[33:],
            "xmp.png": png[:33] + plain_xmp + png[33:],
            "late xmp.png": png[:-12] + plain_xmp + png[-12:],
            "packed xmp.png": png[:33]
            + make_chunk(b"iTXt", PNG_XMP + b"\1\0\0\0" + zlib.compress(xmp))
            + png[33:],
            "exif.webp": encode(image, "WEBP", lossless=True, exif=exif),
            "xmp.webp": encode(image, "WEBP", lossless=True, xmp=xmp),
            "exif.avif": encode(image, "AVIF", exif=exif),
            "exif.tif": encode(image, "TIFF", exif=exif),
        }
        for name, data in files.items():
            stem, extension = name.split(".")
            yield f"turned/{orientation}/{extension}, {stem}.{extension}", data


def list_transparent_files() -> Iterator[File]:
    clear = Image.new("P", (4, 4), 3)
    clear.putpalette(bytes(range(30)))
    for name, image, options in (
        ("palette", clear, {"transparency": 3}),
        ("palette of alphas", clear, {"transparency": bytes([255, 0, 9, 77])}),
        ("colour", Image.new("RGB", (4, 4), (9, 8, 7)), {"transparency": (9, 8, 7)}),
        ("grey", Image.new("L", (4, 4), 7), {"transparency": 7}),
    ):
        yield f"transparent/{name}.png", encode(image, "PNG", **options)
    yield "transparent/index.gif", encode(clear, "GIF", transparency=3)
    yield "with profile.jpg", encode(draw(9, 9, "RGB"), "JPEG", icc_profile=bytes(5000))
    jpeg = encode(draw(9, 9, "RGB"), "JPEG")
    yield "filled before its end.jpg", jpeg[:-2] + b"\0" * 16 + jpeg[-2:]


def open_with_pillow(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3); None of one with more than 8 bits per channel."""
    with Image.open(io.BytesIO(data)) as stored:
        image = ImageOps.exif_transpose(stored)
    if image.mode.startswith(DEEP_MODES):
        return None
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class Corpus:
    files: dict[str, bytes]
    keys: dict[str, str]
    """{key: name of its file}."""
    expected: dict[str, np.ndarray | None]
    """Pillow's pixels of each file."""


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    with warnings.catch_warnings(action="ignore"):  # Pillow's, about metadata and old formats
        files = dict([*list_plain_files(), *list_turned_files(), *list_transparent_files()])
        keys = {make_key(name.rpartition(".")[0]): name for name in files}
        return Corpus(files, keys, {name: open_with_pillow(data) for name, data in files.items()})


def read_all(uri: str) -> dict[str, np.ndarray]:
    """(H, W, 3) of every image of a set, by key."""
    dataset = ShardDataset.open(uri)
    found: dict[str, np.ndarray] = {}
    for shard in dataset.index.shards:
        content = (Path(dataset.index.base or uri) / shard.name).read_bytes()
        for key, offset, size in zip(shard.keys, *shard.image_place(), strict=True):
            data = content[offset : offset + size]
            found[key] = decode_image(data, 3).transpose(1, 2, 0)
            assert read_shape(data)[1:] == found[key].shape[:2]
            row = np.zeros_like(found[key])
            decode_into(row, data)
            np.testing.assert_array_equal(row, found[key])
    return found


def find_differences(found: dict[str, np.ndarray], corpus: Corpus) -> list[str]:
    """The files that are read otherwise than by Pillow."""
    wanted = {key: corpus.expected[name] for key, name in corpus.keys.items()}
    read = {key for key, pixels in wanted.items() if pixels is not None}
    other = {key for key in read & found.keys() if not np.array_equal(found[key], wanted[key])}  # pyright: ignore[reportArgumentType]
    return sorted(corpus.keys[key] for key in (read ^ found.keys()) | other)


def test_the_corpus_is_all_that_pillow_writes(corpus: Corpus):
    Image.init()
    assert {*FORMATS, *UNREAD} == {*Image.SAVE}
    assert {name.partition("/")[0] for name in corpus.files} >= {*FORMATS}
    assert len(corpus.keys) == len(corpus.files) > 700


@pytest.mark.filterwarnings("ignore")
def test_a_build_has_pillows_pixels(tmp_path: Path, corpus: Corpus):
    for name, data in corpus.files.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(data)
    output = str(tmp_path / "set")
    said = build_shards(f"folder:{tmp_path}/source", output, tolerance=Tolerance(MOST_BAD_IMAGES))
    assert find_differences(read_all(output), corpus) == []
    faults = (tmp_path / "set/faults.txt").read_text().splitlines()
    deep = [name for name, pixels in corpus.expected.items() if pixels is None]
    assert {fault.split(": ")[0] for fault in faults} == {f"{tmp_path}/source/{n}" for n in deep}
    assert all("bits per channel" in fault for fault in faults)
    assert f"{len(deep)} x bad image" in said
    loader = ShardDataset.open(output).loader(global_batch_size=64, resolution=16)
    assert sum(len(batch.key) for batch in loader) == len(corpus.files) - len(deep)


@pytest.mark.filterwarnings("ignore")
def test_an_index_has_pillows_pixels(tmp_path: Path, corpus: Corpus):
    (tmp_path / "set").mkdir()
    with (tmp_path / "set/a.tar").open("wb") as file, TarWriter(file, encoder=False) as writer:
        for key, name in corpus.keys.items():
            writer.write({"__key__": key, name.rpartition(".")[2]: corpus.files[name]})
    index_shards(f"{tmp_path}/set", tolerance=Tolerance(MOST_BAD_IMAGES))
    assert find_differences(read_all(f"{tmp_path}/set"), corpus) == []


@pytest.mark.parametrize("form", ["EPS", "PDF", "SPIDER"])
def test_other_formats_are_refused(form: str):
    data = encode(draw(16, 16, "L"), form)
    for read in (read_shape, lambda data: decode_image(data, 3)):
        with pytest.raises(ValueError, match="not an image"):
            read(data)
