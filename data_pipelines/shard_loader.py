"""Shards -> batches of uint8 images, in the order of `epoch_plan`, from any position on.

Threads decode whole batches ahead of the consumer (the decoders release the GIL), each into one
array; normalising is the device's work. The position counts the batches handed out, not those
decoded ahead, and holds nothing per worker, so it resumes at another world size.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data_pipelines import uris
from data_pipelines.epoch_plan import Position, Tail, plan_batches
from data_pipelines.image_codec import decode_image
from data_pipelines.shard_cache import ShardCache, ShardError
from data_pipelines.shard_index import ShardIndex, load_index

_BATCHES_AHEAD = 2
"""Decoded batches that may wait for the consumer, beside one in each decoder thread."""
_FETCH_THREADS = 4


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch."""

    image: torch.Tensor
    """uint8 (b, C, H, W), contiguous; b = 0 is possible in a ragged last batch."""
    key: list[str]


class ShardDataset:
    """A shard set on storage; it reads nothing but the index until a loader is iterated."""

    def __init__(self, uri: str, index: ShardIndex):
        self.uri = uri
        self.index = index
        places = [shard.image_place() for shard in index.shards]
        self.counts = [len(shard.keys) for shard in index.shards]
        self._ends = np.cumsum(self.counts)
        self._offset = np.concatenate([offset for offset, _ in places] or [np.zeros(0, np.int64)])
        self._size = np.concatenate([size for _, size in places] or [np.zeros(0, np.int64)])

    @classmethod
    def open(cls, uri: str) -> "ShardDataset":
        """Open the shard set at `uri` (a path, s3://, gs://, http://).

        Raises:
            ValueError: no index there, or a damaged one; the message says what to do.
        """
        return cls(uri, load_index(uri))

    def __len__(self) -> int:
        return len(self._offset)

    @property
    def id(self) -> str:
        """A hash of the content."""
        return self.index.id

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of every image, or None when heights or widths differ."""
        return self.index.image_shape

    @property
    def keys(self) -> list[str]:
        """The key of every sample, in the order of the shards."""
        return [key for shard in self.index.shards for key in shard.keys]

    def place(self, sample: int) -> tuple[int, int]:
        """(shard, row within it) of a sample number."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - (int(self._ends[shard]) - self.counts[shard])

    def read(self, sample: int, cache: ShardCache) -> tuple[str, bytes]:
        """(key, image file's bytes) of a sample number."""
        shard_number, row = self.place(sample)
        shard = self.index.shards[shard_number]
        offset, size = int(self._offset[sample]), int(self._size[sample])
        return shard.keys[row], cache.open(shard)[offset : offset + size]

    def loader(
        self,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        tail: Tail = "ragged",
        channels: Literal[1, 3] | None = None,
        decode_threads: int = 2,
        cache_bytes: int = 20 * 2**30,
        cache_dir: str | Path | None = None,
    ) -> "ShardLoader":
        """Batches for rank `rank` of `world_size`.

        Args:
            global_batch_size: samples per batch over all ranks; `world_size` divides it.
            rank: this process, 0 <= rank < world_size.
            world_size: processes that share the set.
            seed: of the order; the same on all ranks.
            shuffle: False keeps the order of the shards.
            tail: "ragged": an iteration is an epoch and its last batch may be smaller; "carry":
                endless, every batch full, those at a border mix two epochs.
            channels: 1 or 3 converts between grey and RGB; None keeps the set's own.
            decode_threads: decoder threads of this rank.
            cache_bytes: bound of the node's shard cache, for sets that are not local files.
            cache_dir: where that cache is; None is a folder of the user's in the temporary folder.

        Raises:
            ValueError: sizes that do not fit together, images of differing size, an empty set.
        """
        return ShardLoader(
            self,
            ShardCache(self.uri, Path(cache_dir) if cache_dir else None, cache_bytes),
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            tail=tail,
            shape=self._batch_shape(channels, cache_bytes),
            decode_threads=decode_threads,
        )

    def _batch_shape(self, channels: int | None, cache_bytes: int) -> tuple[int, int, int]:
        if not len(self):
            raise ValueError(f"{self.uri} holds no samples")
        if self.image_shape is None:
            raise ValueError(
                f"the images of {self.uri} differ in size and make no batch: build the shards with"
                " --resolution N"
            )
        if channels not in (None, 1, 3):
            raise ValueError(f"channels={channels}: use 1 (grey), 3 (RGB) or None")
        largest = max(shard.bytes for shard in self.index.shards)
        if uris.local_path(self.uri) is None and cache_bytes < largest:
            raise ValueError(
                f"cache_bytes={cache_bytes} is less than the largest shard of {self.uri}"
                f" ({largest}): raise it, or build smaller shards"
            )
        return (channels or self.image_shape[0], *self.image_shape[1:])


class ShardLoader:
    """An iterable over batches that knows its position; made by `ShardDataset.loader`."""

    def __init__(
        self,
        dataset: ShardDataset,
        cache: ShardCache,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        tail: Tail,
        shape: tuple[int, int, int],
        decode_threads: int,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be in [0, world_size={world_size})")
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size}: must be a positive multiple of"
                f" world_size={world_size}"
            )
        if tail not in ("ragged", "carry"):
            raise ValueError(f"tail={tail!r}: use 'ragged' or 'carry'")
        if decode_threads < 1 or seed < 0:
            raise ValueError(f"{decode_threads=}, {seed=}: at least one thread, no negative seed")
        self.dataset = dataset
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.wait_seconds = 0.0
        """Time that the consumer has waited for batches, in all."""
        self._cache = cache
        self._shape = shape
        self._decode_threads = decode_threads
        self._seed, self._shuffle = seed, shuffle
        self._tail: Tail = tail
        self._position = Position()
        self._iteration = 0

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the position on; a newer iterator ends the older ones."""
        self._iteration += 1
        return self._iterate(self._iteration)

    def _iterate(self, iteration: int) -> Iterator[Batch]:
        plan = plan_batches(
            self.dataset.counts,
            self._seed,
            self._position,
            self.global_batch_size,
            self.rank,
            self.world_size,
            self._shuffle,
            self._tail,
        )
        decoders = ThreadPoolExecutor(self._decode_threads, thread_name_prefix="decode")
        fetchers = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="fetch")
        fetched: set[int] = set()
        ahead: deque[tuple[Future[Batch], Position]] = deque()
        try:
            while True:
                started = time.perf_counter()
                while len(ahead) < self._decode_threads + _BATCHES_AHEAD:
                    samples, position = next(plan, (None, None))
                    if samples is None or position is None:
                        break
                    shards = {self.dataset.place(sample)[0] for sample in samples.tolist()}
                    for shard in sorted(shards - fetched):  # an error surfaces in the decoder
                        fetchers.submit(self._cache.open, self.dataset.index.shards[shard])
                    fetched |= shards
                    ahead.append((decoders.submit(self._decode, samples), position))
                if not ahead:
                    return
                future, position = ahead.popleft()
                batch = future.result()
                self.wait_seconds += time.perf_counter() - started
                if iteration != self._iteration:
                    raise RuntimeError("this loader was moved on: its older iterator has ended")
                self._position = position
                yield batch
        finally:
            fetchers.shutdown(wait=False, cancel_futures=True)
            decoders.shutdown(wait=True, cancel_futures=True)
            fetchers.shutdown(wait=True)

    def _decode(self, samples: np.ndarray) -> Batch:
        images = np.empty((len(samples), *self._shape), np.uint8)
        keys: list[str] = []
        for row, sample in enumerate(samples.tolist()):
            key, data = self.dataset.read(sample, self._cache)
            try:
                _decode_into(images[row], data)
            except ValueError as error:
                shard = self.dataset.index.shards[self.dataset.place(sample)[0]]
                uri = uris.join(self.dataset.uri, shard.name)
                raise ShardError(uri, key, str(error)) from error
            keys.append(key)
        return Batch(torch.from_numpy(images), keys)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out; JSON types, the same on every rank."""
        return {**self._identity(), **asdict(self._position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that the saved loader handed out, at any world size.

        Raises:
            ValueError: the state belongs to other data or another order.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"the saved position has {name}={state.get(name)!r}, this loader {mine!r}:"
                    " resume with the same data, seed and batch size, or start a new run"
                )
        position = Position(int(state["epoch"]), int(state["consumed"]))
        if position.epoch < 0 or not 0 <= position.consumed < len(self.dataset):
            raise ValueError(f"the saved position {position} is outside the data: it is damaged")
        self._iteration += 1
        self._position = position

    def _identity(self) -> dict[str, Any]:
        return {
            "dataset_id": self.dataset.id,
            "seed": self._seed,
            "global_batch_size": self.global_batch_size,
            "shuffle": self._shuffle,
            "tail": self._tail,
        }


def _decode_into(row: np.ndarray, data: bytes) -> None:
    pixels = decode_image(data, row.shape[0])
    if pixels.shape != row.shape:
        raise ValueError(f"shape {pixels.shape}, the index says {row.shape}")
    row[:] = pixels
