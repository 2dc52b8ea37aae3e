"""One loader per file, all of which read the same images from S3 behind `open_epochs`.

`open_epochs(task, **options)` opens the set and returns a function; each call of it reads one more
epoch and yields batches, uint8 (b, H, W, C) or (b, C, H, W). Opening is not timed.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """The set that one process reads; passed to it as JSON."""

    tars: str
    """URI of the WebDataset tars and their index, with the other formats beside it."""
    extension: str
    """Extension of the images: jpg or png."""
    side: int
    """Side of an image in pixels."""
    samples: int
    cache: str
    """Folder for this pipeline's cache, shared by its ranks."""
    batch_size: int
    """Images per batch of one rank."""
    warm: bool = False
    """Whether to read one epoch first, which fills the caches."""
    rank: int = 0
    world_size: int = 1

    def beside(self, name: str) -> str:
        """Return the URI of the same samples in another format."""
        return f"{self.tars.rsplit('/', 1)[0]}/{name}"


@dataclass(frozen=True)
class Pipeline:
    """A row of the table."""

    module: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    needs: tuple[str, ...] = ()
    """Import names of the packages that it needs."""
    jpeg_only: bool = False
    cold: bool = True
    """Whether to measure the first epoch, with an empty cache."""
    warm: bool = True
    """Whether to measure a later epoch; only for pipelines with a cache."""
    ranks: tuple[int, ...] = (1, 2)


_STOCK = ("webdataset", "s3fs")

PIPELINES = {
    "bare decode": Pipeline("bare", cold=False, ranks=(1,)),
    "ours": Pipeline("ours"),
    "ours, labels": Pipeline("ours", {"labels": True}),
    "ours, pixels kept": Pipeline("ours", {"keep_pixels": True}),
    "webdataset, rgb8": Pipeline("stock", {"decode": "rgb8"}, _STOCK),
    "webdataset, rgb8, default tars": Pipeline(
        "stock", {"decode": "rgb8", "default_tars": True}, _STOCK, ranks=(1,)
    ),
    "webdataset, pil": Pipeline("stock", {"decode": "pil"}, _STOCK, ranks=(1,)),
    "webdataset, torchrgb8": Pipeline("stock", {"decode": "torchrgb8"}, _STOCK, ranks=(1,)),
    "webdataset, simplejpeg": Pipeline(
        "stock", {"decode": "simplejpeg"}, _STOCK, jpeg_only=True, ranks=(1,)
    ),
    "webdataset, rgb8, 1 worker": Pipeline(
        "stock", {"decode": "rgb8", "workers": 1}, _STOCK, ranks=(1,)
    ),
    "webdataset, rgb8, 2 workers": Pipeline(
        "stock", {"decode": "rgb8", "workers": 2}, _STOCK, ranks=(1,)
    ),
    "Streaming, PIL": Pipeline("mosaic", {"decode": "pil"}, ("streaming",)),
    "Streaming, simplejpeg": Pipeline(
        "mosaic", {"decode": "simplejpeg"}, ("streaming",), jpeg_only=True
    ),
    "litdata, PIL": Pipeline("lit", {"decode": "pil"}, ("litdata",)),
    "litdata, simplejpeg": Pipeline("lit", {"decode": "simplejpeg"}, ("litdata",), jpeg_only=True),
    "Ray Data": Pipeline("ray_data", needs=("ray", "webdataset", "s3fs"), warm=False, ranks=(1,)),
}
PACKAGES = {
    "streaming": "mosaicml-streaming",
    "litdata": "litdata",
    "webdataset": "webdataset",
    "s3fs": "s3fs",
    "ray": "ray[data]",
}
DEFAULT_TARS = "default_tars"
"""Folder of the tars that webdataset's writer makes by default: each member has an extended header
for its time, which takes as long to parse as the member's own."""
FORMATS = {"mosaic": "mds", "lit": "litdata"}
"""Folder of each module that reads its own format."""
