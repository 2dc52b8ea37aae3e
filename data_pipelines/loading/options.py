"""Every option of a loader: its default, its meaning, and the values that are allowed.

They import nothing else of this project, so that `efae.config.DataConfig`, and with it the command
line, can inherit them.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

Crop = Literal["center", "random"]
Tail = Literal["ragged", "carry"]


@dataclass(frozen=True)
class CacheOptions:
    """How samples of any kind are read."""

    cache_bytes: int = 20 * 2**30
    """Upper bound of the node-local shard cache, bytes; shared by the ranks of a node."""
    cache_dir: str | Path | None = None
    """Folder of that cache, on a fast local disk; None: one in the temporary folder."""
    bad_samples: Literal["fail", "replace"] = "fail"
    """On a training sample that is damaged: stop, or replace it by its neighbour and count it."""
    most_bad_samples: int = 100
    """Stop anyway once a worker has met more than this many distinct bad samples."""
    decode_threads: int | None = None
    """Decoder threads per worker; None: one for images of at most 64 x 64 pixels and for latents,
    which two decode more slowly, or where a worker may use one CPU only, else two."""

    def __post_init__(self):
        _require(self.cache_bytes > 0, f"cache_bytes={self.cache_bytes}: must be positive")
        _require(
            self.bad_samples in ("fail", "replace"),
            f"bad_samples={self.bad_samples!r}: use fail or replace",
        )
        _require(
            self.decode_threads is None or self.decode_threads > 0,
            f"decode_threads={self.decode_threads}: must be positive",
        )


@dataclass(frozen=True)
class ReadOptions(CacheOptions):
    """How images are read; the same for every loader of a run."""

    resolution: int | tuple[int, int] | None = None
    """Side of square images, or their height and width; pixels. Larger ones are scaled until their
    shorter side fits, and cropped. None: the set's own size, which must be the same for all."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Heights and widths that training images are sorted into, by their ratio of height to width,
    instead of resolution; pixels. Every batch has one of these shapes."""
    crop: Crop = "center"
    """Part of a larger training image: its centre, or a random one, drawn anew in every epoch."""
    channels: Literal[1, 3] | None = None
    """Colour channels: 1 (grey) or 3 (RGB); None: as many as the set has, and 3 if its images
    differ in size."""
    pixel_cache_bytes: int = 0
    """Room for decoded training images beside the shard cache, bytes: what fits is decoded in the
    first epoch only. For nodes whose CPUs, not disks, are short; 0 keeps none."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "resolution", _read_resolution(self.resolution))
        object.__setattr__(self, "buckets", _read_buckets(self.buckets))
        size = self.image_size
        _require(size is None or min(size) > 0, f"resolution={self.resolution}: must be positive")
        for number, sides in enumerate(self.buckets):
            where = f"buckets={self.buckets}: {sides[0]} x {sides[1]}"
            _require(min(sides) > 0, f"{where}: must be positive")
            _require(sides not in self.buckets[:number], f"{where} is there twice")
        _require(self.crop in ("center", "random"), f"crop={self.crop!r}: use center or random")
        _require(
            self.channels in (None, 1, 3),
            f"channels={self.channels}: use 1 (grey), 3 (RGB) or None",
        )
        _require(
            self.pixel_cache_bytes >= 0,
            f"pixel_cache_bytes={self.pixel_cache_bytes}: must be >= 0",
        )
        _require(
            self.crop == "center" or not self.pixel_cache_bytes,
            f"pixel_cache_bytes={self.pixel_cache_bytes}: random crops differ in every epoch; set"
            " it to 0, or crop to center",
        )
        _require(
            not self.buckets or not self.pixel_cache_bytes,
            f"pixel_cache_bytes={self.pixel_cache_bytes}: it holds images of one shape; set it to"
            " 0, or use no buckets",
        )

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width; None: the set's own."""
        if isinstance(self.resolution, int):
            return self.resolution, self.resolution
        return self.resolution


@dataclass(frozen=True)
class LoaderOptions(ReadOptions):
    """How samples are read, and which batches one loader makes of them."""

    shuffle: bool = True
    """False keeps the order of the shards."""
    tail: Tail = "ragged"
    """ragged: an iteration is an epoch, and its last batch may be smaller; carry: an endless
    iteration of full batches, those at a border mix two epochs."""
    augment: Literal["group"] | None = None
    """group acts on every latent by an element drawn for it, uniformly and anew in every epoch;
    batches say which. For latents only."""
    members: tuple[str, ...] = ()
    """Extensions of other members of a sample that batches hold as bytes: ("cls", "json")."""
    pin_memory: bool = False
    """Page-locked batches, for copies to a GPU that do not block."""

    def __post_init__(self):
        super().__post_init__()
        _require(self.tail in ("ragged", "carry"), f"tail={self.tail!r}: use ragged or carry")
        _require(self.augment in (None, "group"), f"augment={self.augment!r}: use group or None")


def choose_options(options: CacheOptions, **changes: Any) -> LoaderOptions:
    """Return `options` as a loader's options, with `changes` applied by name."""
    kind = CacheOptions
    for larger in (ReadOptions, LoaderOptions):
        kind = larger if isinstance(options, larger) else kind
    given = {field.name: getattr(options, field.name) for field in fields(kind)}
    return LoaderOptions(**given | changes)


def _read_resolution(resolution: Any) -> int | tuple[int, int] | None:
    """Return sides given as integers of any kind, such as numpy's, as plain ones."""
    if resolution is None:
        return None
    try:
        if isinstance(resolution, Iterable):
            return _read_sides(resolution)
        return operator.index(resolution)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"resolution={resolution!r}: give one side, or a height and a width, as integers"
        ) from error


def _read_buckets(buckets: Any) -> tuple[tuple[int, int], ...]:
    try:
        return tuple(map(_read_sides, buckets))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"buckets={buckets!r}: give a height and a width for each, as integers"
        ) from error


def _read_sides(sides: Any) -> tuple[int, int]:
    height, width = map(operator.index, sides)
    return height, width


def _require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)
