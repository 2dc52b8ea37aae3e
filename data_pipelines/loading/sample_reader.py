"""Reading and decoding of samples: numbers -> verified bytes -> rows of a batch.

Every member is checked against the index's crc32 when it is read. On a mismatch it is fetched once
more (a bit may have flipped on the network or on this node's disk); a second mismatch makes a bad
sample, like an image that does not decode. A bad sample stops the run, or is replaced by the next
good one of its chunk.
"""

import logging
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from imagecodecs import deflate_crc32 as compute_crc32  # zlib's value in half its time or less

from data_pipelines.loading.batch import Batch, Sample, SampleForm
from data_pipelines.loading.buckets import Buckets
from data_pipelines.loading.epoch_plan import PlannedBatch
from data_pipelines.loading.options import LoaderOptions
from data_pipelines.loading.pixel_cache import PixelCache
from data_pipelines.loading.shard_cache import ShardCache, ShardError
from data_pipelines.shards.index import Members, ShardIndex

_MOST_ARRAYS = 16
_UNUSED = 3
"""References to an unused array: the list's, the loop variable's, the argument's."""
_logger = logging.getLogger(__name__)


_Place = tuple[int, int, int, int]
"""A member's chunk, its bytes [start, end) in the chunk, and their crc32."""
_Content = list[bytes | None]
"""One entry per column; the image is None when its pixels are already in the batch."""


class MemberReader:
    """Reads the members of samples and checks their bytes; thread-safe.

    Args:
        index: Index of the set.
        cache: Cache of its shards.
        columns: Where the members lie, by extension; the first, None, is the image or latent.
    """

    def __init__(self, index: ShardIndex, cache: ShardCache, columns: Mapping[str | None, Members]):
        self.index, self.cache, self.chunks = index, cache, cache.chunks
        self._columns = columns
        self._shard_ends = np.cumsum([len(shard.keys) for shard in index.shards])
        self._beyond_help: set[int] = set()
        """Chunks still damaged after they were fetched again: the damage is in storage."""

    def count_bytes(self, sample: np.ndarray) -> int:
        """Return the bytes of these samples' images or latents, without other members."""
        return int(self._columns[None].size[sample].sum())

    def read_one(self, sample: int, decode: Callable[[str, bytes], Sample]) -> Sample:
        """Read one image or latent, and decode its key and bytes with `decode`.

        Raises:
            ShardError: The shard cannot be read, or the sample is damaged.
        """
        key, [[place]] = self._key(sample), self._find_members(np.array([sample]))
        try:
            return decode(key, self._read(*place))
        except ValueError as fault:
            raise ShardError(self._uri(sample), key, str(fault)) from fault

    def _find_members(self, samples: np.ndarray) -> list[tuple[_Place, ...]]:
        """Return the places of each sample's members, in the order of the columns."""
        chunk = self.chunks.of(samples)
        before = self.chunks.start[chunk]
        found: list[zip[_Place]] = []
        for columns in self._columns.values():
            start = columns.offset[samples] - before
            end = start + columns.size[samples]
            lists = (column.tolist() for column in (chunk, start, end, columns.crc32[samples]))
            found.append(zip(*lists, strict=True))
        return list(zip(*found, strict=True))

    def _read(self, chunk: int, start: int, end: int, crc32: int) -> bytes:
        """Return a verified copy, since the file may change after the check."""
        data = self.cache.open(chunk)[start:end].tobytes()
        if compute_crc32(data) == crc32:
            return data
        if chunk not in self._beyond_help:
            data = self.cache.refetch(chunk)[start:end].tobytes()
            if compute_crc32(data) == crc32:
                return data
            self._beyond_help.add(chunk)
        raise ValueError(
            "its bytes are not those that the index was made from: damaged, or the index belongs"
            " to other shards"
        )

    def _key(self, sample: int) -> str:
        return self._keys(np.array([sample]))[0]

    def _keys(self, samples: np.ndarray) -> list[str]:
        shard = np.searchsorted(self._shard_ends, samples, side="right")
        place = (
            samples - self._shard_ends[shard]
        ).tolist()  # negative: counted from the shard's end
        return [
            self.index.shards[number].keys[at]
            for number, at in zip(shard.tolist(), place, strict=True)
        ]

    def _uri(self, sample: int) -> str:
        chunk = int(self.chunks.of(np.array([sample]))[0])
        return self.cache.uri(chunk)


class SampleReader(MemberReader):
    """Decodes batches of one set; thread-safe.

    Args:
        index, cache, columns: As in `MemberReader`.
        form: What an image or a latent is decoded to.
        options: What to do with bad samples, and in which memory batches lie.
        pixels: Cache of decoded images.
        buckets: Buckets of the samples; None if all have one shape.
    """

    def __init__(
        self,
        index: ShardIndex,
        cache: ShardCache,
        columns: Mapping[str | None, Members],
        form: SampleForm,
        options: LoaderOptions,
        pixels: PixelCache | None,
        buckets: Buckets | None = None,
    ):
        super().__init__(index, cache, columns)
        self.form, self.buckets = form, buckets
        self.bad_samples: dict[str, str] = {}
        """Key and fault of every bad sample that was replaced."""
        self._options, self._pixels = options, pixels
        self._lock = threading.Lock()
        self._arrays: deque[np.ndarray] = deque(maxlen=_MOST_ARRAYS)

    def open(self) -> None:
        """Open the pixel cache, if any; call before the first batch.

        Raises:
            ValueError: Its folder belongs to another user.
        """
        if self._pixels is not None:
            self._pixels.open()

    def find_chunks(self, sample: np.ndarray) -> list[int]:
        """Return the chunks that are needed to read these samples."""
        if self._pixels is not None and len(self._columns) == 1:
            sample = sample[~self._pixels.holds(sample)]
        return np.unique(self.chunks.of(sample)).tolist()

    def read(self, planned: PlannedBatch) -> Batch:
        """Read and decode one planned batch.

        Raises:
            ShardError: A shard cannot be read, or there is a bad sample or too many of them.
        """
        rows = self._allocate((len(planned.sample), *self.form.shapes[planned.bucket]))
        wanted = planned.sample.tolist()
        epochs = planned.epoch.tolist()
        drawn = [self.form.draw(*at) for at in zip(epochs, wanted, strict=True)]
        keys = self._keys(planned.sample)
        pixels = list(rows.numpy())
        # Read all samples, then decode all: alternating, reading and decoding evict each other's
        # code from the CPU caches.
        contents: list[_Content] = []
        for number, places in enumerate(self._find_members(planned.sample)):
            try:
                content = self._load(pixels[number], wanted[number], places)
            except ValueError as fault:
                at = pixels[number], wanted[number], drawn[number]
                keys[number], content = self._replace_bad(*at, fault)
            contents.append(content)
        for number, (row, content, draw) in enumerate(zip(pixels, contents, drawn, strict=True)):
            if (data := content[0]) is not None:
                try:
                    self.form.decode(row, data, draw)
                except ValueError as fault:
                    at = row, wanted[number], draw
                    keys[number], contents[number] = self._replace_bad(*at, fault)
                else:
                    self._keep(wanted[number], row)
        members: dict[str, list[Any]] = {
            name: [content[column] for content in contents]
            for column, name in enumerate(self._columns)
            if name is not None
        }
        return self.form.make_batch(rows, keys, members, drawn)

    def _allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return memory for a batch: that of an earlier batch no longer referenced, or new.

        The kernel clears new memory page by page, which takes a tenth of the decoding time.
        """
        if self._options.pin_memory:  # torch keeps page-locked memory for reuse itself
            dtype = torch.from_numpy(np.empty(0, self.form.dtype)).dtype
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        values = math.prod(shape)
        with self._lock:
            for array in self._arrays:
                # A tensor and all its views hold a reference to their array.
                if sys.getrefcount(array) == _UNUSED and len(array) >= values:
                    return torch.from_numpy(array[:values].reshape(shape))
            array = np.empty(values, self.form.dtype)
            self._arrays.append(array)
            return torch.from_numpy(array.reshape(shape))

    def _load(self, row: np.ndarray, sample: int, places: Sequence[_Place]) -> _Content:
        """Read the sample's members; if its pixels are cached, fill `row` instead of its first.

        Raises:
            ValueError: One of them is damaged.
        """
        if self._pixels is not None and self._pixels.read(sample, row):
            return [None, *(self._read(*place) for place in places[1:])]
        return [self._read(*place) for place in places]

    def _keep(self, sample: int, row: np.ndarray) -> None:
        if self._pixels is not None:
            self._pixels.write(sample, row)

    def _replace_bad(
        self, row: np.ndarray, sample: int, draw: Any, fault: ValueError
    ) -> tuple[str, _Content]:
        """Decode the chunk's next good sample into `row`; return its key and members.

        It is of the same bucket, if the chunk has such a sample.
        """
        self._note_bad(sample, fault)
        chunk = int(self.chunks.of(np.array([sample]))[0])
        first, count = int(self.chunks.first[chunk]), int(self.chunks.count[chunk])
        others = (np.arange(1, count) + (sample - first)) % count + first
        if self.buckets is not None:
            bucket = self.buckets.of
            others = others[np.argsort(bucket[others] != bucket[sample], kind="stable")]
        for other, places in zip(others.tolist(), self._find_members(others), strict=True):
            try:
                data, *more = self._load(row, other, places)
                if data is not None:
                    self.form.decode(row, data, draw)
                    self._keep(other, row)
                return self._key(other), [None, *more]
            except ValueError as error:
                self._note_bad(other, error)
        raise ShardError(self._uri(sample), self._key(sample), f"no good sample near it: {fault}")

    def _note_bad(self, sample: int, fault: ValueError) -> None:
        key, uri = self._key(sample), self._uri(sample)
        if self._options.bad_samples == "fail":
            raise ShardError(uri, key, str(fault)) from fault
        with self._lock:
            if key in self.bad_samples:
                return
            self.bad_samples[key] = str(fault)
            if len(self.bad_samples) > self._options.most_bad_samples:
                raise ShardError(
                    uri,
                    key,
                    f"{fault}; and {self._options.most_bad_samples} more bad samples, the most that"
                    " may be replaced: run python -m data_pipelines.verify_shards",
                )
        _logger.warning("replaced a bad sample: %s, sample %r: %s", uri, key, fault)
