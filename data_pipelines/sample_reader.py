"""Sample numbers -> checked bytes -> rows of a uint8 batch.

Every member is compared with the index's crc32 when it is read: what differs is fetched once more
(a flipped bit on the way or on this node's disk), and then is a bad sample, like an image that does
not decode. A bad sample fails, or is replaced by the next good one of its chunk.
"""

import logging
import sys
import threading
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from data_pipelines.epoch_plan import PlannedBatch
from data_pipelines.image_codec import decode_into
from data_pipelines.shard_cache import ShardCache, ShardError
from data_pipelines.shard_index import Members, ShardIndex

Crop = Literal["center", "random"]
_MOST_ARRAYS = 16
_UNUSED = 3
"""References to an array that only the list of arrays knows: that, a variable, an argument."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch."""

    image: torch.Tensor
    """uint8 (b, C, H, W), a view of (b, H, W, C) memory; b = 0 in some ragged last batches."""
    key: list[str]
    members: dict[str, list[bytes]]
    """The members that the loader was asked for, by extension."""


class Place(NamedTuple):
    """Bytes [start, end) of a chunk."""

    chunk: int
    start: int
    end: int
    crc32: int


class SampleReader:
    """Reads batches of one set; thread-safe."""

    def __init__(
        self,
        index: ShardIndex,
        cache: ShardCache,
        columns: Mapping[str | None, Members],  # None, first, is the image
        shape: tuple[int, int, int],
        crop: Crop,
        seed: int,
        replace: bool,
        most_bad: int,
        pin_memory: bool,
    ):
        self.cache = cache
        self.chunks = cache.chunks
        self.bad_samples: dict[str, str] = {}
        """Key and fault of every bad sample that was replaced."""
        self._index, self._columns = index, columns
        self._shard_ends = np.cumsum([len(shard.keys) for shard in index.shards])
        self._shape, self._crop, self._seed = shape, crop, seed
        self._replace, self._most_bad = replace, most_bad
        self._pin_memory = pin_memory
        self._lock = threading.Lock()
        self._beyond_help: set[int] = set()
        """Chunks that were no better when they were fetched again: it is the storage's damage."""
        self._arrays: deque[np.ndarray] = deque(maxlen=_MOST_ARRAYS)

    def count_bytes(self, sample: np.ndarray) -> int:
        """Bytes of these samples' images."""
        return int(self._columns[None].size[sample].sum())

    def read(self, planned: PlannedBatch) -> Batch:
        """The images and members of one planned batch.

        Raises:
            ShardError: a shard that cannot be read, a bad sample, or too many of them.
        """
        image = self._allocate(len(planned.sample))
        rows = image.numpy()
        wanted = planned.sample.tolist()
        crops = [(0.5, 0.5)] * len(wanted)
        if self._crop == "random":
            crops = [self._draw_crop(*at) for at in zip(planned.epoch, wanted, strict=True)]
        places = zip(*(self._places(planned.sample, name) for name in self._columns), strict=True)
        keys: list[str] = []
        members: dict[str, list[bytes]] = {name: [] for name in self._columns if name is not None}
        named = zip(wanted, self._keys(planned.sample), strict=True)
        for row, (sample, key), place, crop in zip(rows, named, places, crops, strict=True):
            taken, found = self._load(row, sample, place, crop)
            keys.append(self._key(taken) if taken != sample else key)
            for name, data in zip(members, found, strict=True):
                members[name].append(data)
        return Batch(image.permute(0, 3, 1, 2), keys, members)

    def _allocate(self, size: int) -> torch.Tensor:
        """Room for a batch: memory of an earlier one that nobody holds any more, or new.

        The kernel clears new memory page by page, which would cost a tenth of decoding.
        """
        shape = (size, *self._shape)
        if self._pin_memory:  # torch keeps page-locked memory for reuse itself
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        with self._lock:
            for array in self._arrays:
                # A tensor, and every view of one, holds a reference to the array that it is of.
                if sys.getrefcount(array) == _UNUSED and len(array) == size:
                    return torch.from_numpy(array)
            array = np.empty(shape, np.uint8)
            self._arrays.append(array)
            return torch.from_numpy(array)

    def _places(self, samples: np.ndarray, extension: str | None) -> list[Place]:
        """Where the members with this extension lie, and their crc32."""
        columns, chunk = self._columns[extension], self.chunks.of(samples)
        start = columns.offset[samples] - self.chunks.start[chunk]
        end = start + columns.size[samples]
        lists = (column.tolist() for column in (chunk, start, end, columns.crc32[samples]))
        return [Place(*place) for place in zip(*lists, strict=True)]

    def _load(
        self, row: np.ndarray, sample: int, places: tuple[Place, ...], crop: tuple[float, float]
    ) -> tuple[int, list[bytes]]:
        """Decode the sample, or what replaces it, into `row`: its number and other members."""
        try:
            return sample, self._decode(row, places, crop)
        except ValueError as error:
            fault = error
        self._note_bad(sample, fault)
        chunk = places[0].chunk
        first, count = int(self.chunks.first[chunk]), int(self.chunks.count[chunk])
        for step in range(1, count):
            other = first + (sample - first + step) % count
            places = tuple(self._places(np.array([other]), name)[0] for name in self._columns)
            try:
                return other, self._decode(row, places, crop)
            except ValueError as error:
                self._note_bad(other, error)
        raise ShardError(self._uri(sample), self._key(sample), f"no good sample near it: {fault}")

    def _decode(
        self, row: np.ndarray, places: tuple[Place, ...], crop: tuple[float, float]
    ) -> list[bytes]:
        members = [bytes(self._read(place)) for place in places[1:]]
        decode_into(row, self._read(places[0]), crop)
        return members

    def _read(self, place: Place) -> memoryview:
        data = self.cache.open(place.chunk)[place.start : place.end]
        if zlib.crc32(data) == place.crc32:
            return data
        if place.chunk not in self._beyond_help:
            data = self.cache.refetch(place.chunk)[place.start : place.end]
            if zlib.crc32(data) == place.crc32:
                return data
            self._beyond_help.add(place.chunk)
        raise ValueError(
            "its bytes are not those that the index was made from: damaged, or the index belongs"
            " to other shards"
        )

    def _note_bad(self, sample: int, fault: ValueError) -> None:
        key, uri = self._key(sample), self._uri(sample)
        if not self._replace:
            raise ShardError(uri, key, str(fault)) from fault
        with self._lock:
            if key in self.bad_samples:
                return
            self.bad_samples[key] = str(fault)
            if len(self.bad_samples) > self._most_bad:
                raise ShardError(
                    uri,
                    key,
                    f"{fault}; and {self._most_bad} more bad samples, the most that may be"
                    " replaced: run python -m data_pipelines.verify_shards",
                )
        _logger.warning("replaced a bad sample: %s, sample %r: %s", uri, key, fault)

    def _draw_crop(self, epoch: int, sample: int) -> tuple[float, float]:
        """Where in an image to cut: (down, right), each in [0, 1)."""
        key = np.array([self._seed, epoch], np.uint64)
        counter = np.array([sample, 0, 0, 2**64 - 1], np.uint64)  # not one of the order's
        draws = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(2)
        return float(draws[0]), float(draws[1])

    def _key(self, sample: int) -> str:
        return self._keys(np.array([sample]))[0]

    def _keys(self, samples: np.ndarray) -> list[str]:
        shard = np.searchsorted(self._shard_ends, samples, side="right")
        place = (samples - self._shard_ends[shard]).tolist()  # from the end of the shard, below 0
        return [
            self._index.shards[number].keys[at]
            for number, at in zip(shard.tolist(), place, strict=True)
        ]

    def _uri(self, sample: int) -> str:
        chunk = int(self.chunks.of(np.array([sample]))[0])
        return self.cache.uri(chunk)
