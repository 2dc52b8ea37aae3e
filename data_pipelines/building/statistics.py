"""Statistics of a shard set, from its index and from a seeded sample of its images.

Equal sets give equal statistics: the seed determines the sample, and integer histograms count
pixels.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from data_pipelines import storage
from data_pipelines.images.codec import decode_image, read_shape
from data_pipelines.images.headers import JPEG, NPY, PNG
from data_pipelines.shards.index import LABEL, ShardIndex
from data_pipelines.shards.intake import LEFT_OUT, SourceFaults
from data_pipelines.storage import Location, LocationLike

Result = TypeVar("Result")

SAMPLED_IMAGES = 2000
_SEED = 0
_COMMONEST = 5
_MOST_LABELS = 1000
_LONGEST_LABEL_BYTES = 64
_READING_THREADS = 8
_LARGEST_GAP_BYTES = 64 * 2**10
_LARGEST_READ_BYTES = 8 * 2**20
_FORMATS = {
    JPEG: "JPEG",
    PNG: "PNG",
    NPY: "NPY",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II": "TIFF",
    b"MM": "TIFF",
    **{b"P%d" % kind: "PPM" for kind in range(1, 7)},
}


def measure_set(uri: LocationLike, index: ShardIndex) -> dict[str, Any]:
    """Measure the set; return the statistics as JSON types.

    Args:
        uri: Folder of the index, which need not exist yet; the shards are read.
        index: Index of the set.

    Raises:
        SourceFaults: Images of the sample are damaged; lists all of them.
    """
    images = [shard.images() for shard in index.shards]
    contents = np.concatenate([np.stack([m.crc32, m.size], axis=1) for m in images])
    members = Counter[str]()
    for shard in index.shards:
        for extension, columns in shard.members.items():
            members[extension] += int((columns.offset >= 0).sum())
    figures: dict[str, Any] = {
        "images": len(contents),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "members": dict(sorted(members.items())),
        "repeated_images": len(contents) - len(np.unique(contents, axis=0)),
        "sample": _measure_sample(uri, index),
    }
    if left_out := index.provenance.get(LEFT_OUT):
        figures[LEFT_OUT] = left_out
    labels = _count_labels(uri, index)
    return {**figures, "labels": labels} if labels else figures


def draw_sample(index: ShardIndex, count: int) -> list[tuple[int, int]]:
    """Draw at most `count` samples as sorted (shard, row), the same in every call."""
    sizes = [len(shard.keys) for shard in index.shards]
    total = sum(sizes)
    drawn = np.random.default_rng(_SEED).choice(total, min(count, total), replace=False)
    first = np.cumsum([0, *sizes])
    drawn.sort()
    shards = np.searchsorted(first, drawn, side="right") - 1
    return list(zip(shards.tolist(), (drawn - first[shards]).tolist(), strict=True))


def map_images(
    function: Callable[[bytes], Result],
    uri: LocationLike,
    index: ShardIndex,
    samples: list[tuple[int, int]],
) -> list[Result]:
    """Apply `function` to each sample's image file, in the order of `samples`, in few reads.

    Raises:
        SourceFaults: `function` raised ValueError; lists every such error with its sample.
    """
    base = Location.parse(index.base or uri)
    faults: dict[tuple[int, int], str] = {}
    images = {number: index.shards[number].images() for number, _ in samples}

    def read(run: list[tuple[int, int]]) -> dict[tuple[int, int], Result]:
        shard = index.shards[run[0][0]]
        results: dict[tuple[int, int], Result] = {}
        places = [
            (int(images[number].offset[row]), int(images[number].size[row])) for number, row in run
        ]
        start, end = places[0][0], max(offset + size for offset, size in places)
        location = base / shard.name
        block = storage.read_range(location, start, end)
        for (offset, size), sample in zip(places, run, strict=True):
            try:
                results[sample] = function(block[offset - start : offset - start + size])
            except ValueError as error:
                faults[sample] = f"{location}, sample {shard.keys[sample[1]]!r}: {error}"
        return results

    ordered = sorted(samples, key=lambda sample: (sample[0], images[sample[0]].offset[sample[1]]))
    runs: list[list[tuple[int, int]]] = []
    start = end = 0
    for number, row in ordered:
        offset, size = int(images[number].offset[row]), int(images[number].size[row])
        near = offset - end <= _LARGEST_GAP_BYTES and offset + size - start <= _LARGEST_READ_BYTES
        if runs and runs[-1][0][0] == number and near:
            runs[-1].append((number, row))
            end = max(end, offset + size)
        else:
            runs.append([(number, row)])
            start, end = offset, offset + size
    with ThreadPoolExecutor(_READING_THREADS) as threads:
        found = {
            sample: result for part in threads.map(read, runs) for sample, result in part.items()
        }
    if faults:
        raise SourceFaults(str(base), [faults[sample] for sample in sorted(faults)])
    return [found[sample] for sample in samples]


def _measure_sample(uri: LocationLike, index: ShardIndex) -> dict[str, Any]:
    samples = draw_sample(index, SAMPLED_IMAGES)
    measured = map_images(_measure_image, uri, index, samples)
    channels = [len(histogram) for _, _, histogram in measured]
    total = np.zeros((max(channels), 256), np.int64)
    for _, _, histogram in measured:
        total += histogram  # a grey image counts in every channel
    values = np.arange(256) / 255
    mean = total @ values / total.sum(axis=1)
    std = np.sqrt(np.maximum(total @ values**2 / total.sum(axis=1) - mean**2, 0))
    heights, widths = np.array([shape for _, shape, _ in measured]).T
    sizes = Counter(f"{width} x {height}" for _, (height, width), _ in measured)
    return {
        "images": len(samples),
        "seed": _SEED,
        "formats": dict(Counter(name for name, _, _ in measured).most_common()),
        "channels": {str(count): number for count, number in Counter(channels).most_common()},
        "width": _spread(widths),
        "height": _spread(heights),
        "commonest_sizes": dict(sizes.most_common(_COMMONEST)),
        "mean": [round(float(value), 6) for value in mean],
        "std": [round(float(value), 6) for value in std],
    }


def _measure_image(data: bytes) -> tuple[str, tuple[int, int], np.ndarray]:
    """Return the format, (H, W), and the histogram of each channel."""
    channels, height, width = read_shape(data)
    pixels = decode_image(data, channels)
    histogram = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in pixels])
    return _name_format(data), (height, width), histogram


def _name_format(data: bytes) -> str:
    """Name the format by the first bytes; the decoder checks the rest."""
    if data[4:8] == b"ftyp":
        return "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIF"
    if data[:4] == b"RIFF":
        return "WEBP"
    return next((name for start, name in _FORMATS.items() if data.startswith(start)), "unknown")


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "max": int(values.max()),
    }


def _count_labels(uri: LocationLike, index: ShardIndex) -> dict[str, Any]:
    """Count each content of ``.cls``; equal checksums and sizes count as equal labels."""
    counts, places = Counter[tuple[int, int]](), dict[tuple[int, int], tuple[str, int]]()
    for shard in index.shards:
        members = shard.members.get(LABEL)
        if members is None:
            continue
        there = members.offset >= 0
        content = np.stack([members.crc32[there], members.size[there]], axis=1)
        kinds, first, numbers = np.unique(content, axis=0, return_index=True, return_counts=True)
        for (crc32, size), row, number in zip(
            kinds.tolist(), first.tolist(), numbers.tolist(), strict=True
        ):
            counts[crc32, size] += number
            places.setdefault((crc32, size), (shard.name, int(members.offset[there][row])))
    common = [kind for kind, _ in counts.most_common(_MOST_LABELS)]
    if not common or max(size for _, size in common) > _LONGEST_LABEL_BYTES:
        return {}

    base = Location.parse(index.base or uri)

    def read(kind: tuple[int, int]) -> str:
        name, offset = places[kind]
        data = storage.read_range(base / name, offset, offset + kind[1])
        return data.decode(errors="replace").strip()

    with ThreadPoolExecutor(_READING_THREADS) as threads:
        names = list(threads.map(read, common))
    commonest = Counter[str]()
    for name, kind in zip(names, common, strict=True):
        commonest[name] += counts[kind]
    order = sorted(commonest, key=lambda name: (not name.isdecimal(), len(name), name))
    return {"different": len(counts), "counts": {name: commonest[name] for name in order}}
