"""The two image sets, as WebDataset tars with labels and our index beside them.

jpeg256: crops of photographs, JPEG of quality 90. Without a folder of photographs, OpenMoji
drawings over colour gradients, which compress better than photographs. png32: the drawings at
32 px; as there are only 4,495, they repeat under different names.
"""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from benchmarks.loaders import DEFAULT_TARS
from data_pipelines import storage
from data_pipelines.building.sources import open_source
from data_pipelines.index_shards import make_index
from data_pipelines.shards.index import write_index

QUALITY = 90
SMALLEST_CROP = 256
LABELS = 1000


@dataclass(frozen=True)
class ImageSet:
    """Format and sizes of an image set."""

    extension: str
    side: int
    samples_per_shard: int
    batch_size: int


SHARDS = 6
IMAGE_SETS = {
    "jpeg256": ImageSet("jpg", 256, samples_per_shard=1000, batch_size=64),
    "png32": ImageSet("png", 32, samples_per_shard=4000, batch_size=256),
}


def write_tars(name: str, uri: str, photos: Path | None, share: float = 1.0) -> dict[str, Any]:
    """Write the set `name`, or a `share` of each of its shards; return its description."""
    chosen = IMAGE_SETS[name]
    per_shard = round(chosen.samples_per_shard * share)
    origin, files = _list_images(name, photos, per_shard * SHARDS)
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(SHARDS):
            name = f"shard-{shard:06d}.tar"
            ours, default = Path(folder) / name, Path(folder) / f"default-{name}"
            with (
                TarWriter(str(ours), mtime=0, encoder=False) as writer,
                TarWriter(str(default), encoder=False) as default_writer,
            ):
                for row in range(per_shard):
                    number, data = shard * per_shard + row, next(files)
                    label = str(number % LABELS).encode()
                    sample = {"__key__": f"{number:07d}", chosen.extension: data, "cls": label}
                    writer.write(dict(sample))
                    default_writer.write(sample)
                    total += len(data)
            storage.upload(ours, f"{uri}/{name}")
            storage.upload(default, f"{uri.rsplit('/', 1)[0]}/{DEFAULT_TARS}/{name}")
            ours.unlink()
            default.unlink()
    write_index(uri, make_index(uri, {"source": origin}))
    return {
        "source": origin,
        "samples": per_shard * SHARDS,
        "shards": SHARDS,
        "mean_kilobytes": round(total / (per_shard * SHARDS) / 1000, 2),
    }


def _list_images(name: str, photos: Path | None, count: int) -> tuple[str, Iterator[bytes]]:
    if name == "png32":
        return "OpenMoji drawings, repeated", _repeat_drawings()
    paths = sorted(photos.rglob("*.jpg")) if photos else []
    if paths:
        return f"crops of {len(paths)} photographs", _crop_photos(paths, count)
    return "OpenMoji drawings over gradients", _paint_drawings()


def _repeat_drawings() -> Iterator[bytes]:
    source = open_source("openmoji")
    files = [source.load(entry, 32).data for entry in source.list_entries()]
    while True:
        yield from files


def _crop_photos(paths: list[Path], count: int) -> Iterator[bytes]:
    """Yield crops of random size and position, in random order, each resized to 256 px."""
    random = np.random.default_rng(0)
    files: list[bytes] = []
    for number, path in enumerate(paths):
        with Image.open(path) as photo:
            pixels = photo.convert("RGB")
        largest = min(pixels.size)
        for _ in range(count // len(paths) + (number < count % len(paths))):
            size = largest
            if largest > SMALLEST_CROP:
                size = int(np.exp(random.uniform(np.log(SMALLEST_CROP), np.log(largest))))
            left = random.integers(pixels.width - size + 1)
            top = random.integers(pixels.height - size + 1)
            box = (left, top, left + size, top + size)
            files.append(_encode_jpeg(pixels.resize((256, 256), box=box, reducing_gap=3)))
    yield from (files[at] for at in random.permutation(count))


def _paint_drawings() -> Iterator[bytes]:
    random, source = np.random.default_rng(0), open_source("openmoji")
    entries = source.list_entries()
    ramp = np.linspace(0, 1, 256)[:, None, None]
    while True:
        for entry in entries:
            drawing = np.asarray(Image.open(io.BytesIO(source.load(entry, 256).data)))
            first, last = random.uniform(0.3, 1, (2, 3))
            shaded = drawing[..., :3] * (first * (1 - ramp) + last * ramp)
            noisy = shaded + random.normal(0, 4, shaded.shape)
            yield _encode_jpeg(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))


def _encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
