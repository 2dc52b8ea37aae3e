"""The data plane without its bytes: the real plan over real chunks, and the cache's own rules."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.loading.epoch_plan import Position, plan_batches
from data_pipelines.shards.chunks import Chunks, cut_chunks
from data_pipelines.shards.index import Members, Shard, ShardIndex


@dataclass
class Cache:
    """A host's `ShardCache`, counted instead of filled; one file for each chunk.

    A chunk that a rank has mapped is not opened again, so it does not become a recent one.
    """

    capacity_bytes: int
    fetched_bytes: int = 0
    _files: OrderedDict[int, int] = field(default_factory=OrderedDict[int, int])
    _mapped: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    _used: int = 0

    def open(self, chunk: int, size: int, rank: int) -> None:
        """The chunk is read by a rank of this host."""
        if chunk not in self._files:
            self.fetched_bytes += size
            self._used += size
            self._files[chunk], self._mapped[chunk] = size, set()
            if self._used > self.capacity_bytes:
                self._evict()
        elif rank not in self._mapped[chunk]:
            self._files.move_to_end(chunk)
        if chunk in self._mapped:
            self._mapped[chunk].add(rank)

    def _evict(self) -> None:
        while self._used > self.capacity_bytes * 15 // 16:
            chunk, size = self._files.popitem(last=False)
            del self._mapped[chunk]
            self._used -= size


def make_set(images: int, image_bytes: int, shard_images: int = 1000) -> Chunks:
    """Chunks of a set of equal images, cut as any set is."""
    shards: list[Shard] = []
    for first in range(0, images, shard_images):
        count = min(shard_images, images - first)
        columns = Members(
            np.arange(count) * image_bytes, np.full(count, image_bytes), np.zeros(count, np.int64)
        )
        keys = [""] * count
        shards.append(Shard(f"{first}.tar", count * image_bytes, "", keys, {"jpg": columns}))
    return cut_chunks(ShardIndex(tuple(shards), None))


def simulate(
    chunks: Chunks,
    hosts: int,
    cache_bytes: int,
    epochs: int,
    ranks_per_host: int = 1,
    global_batch_size: int = 4096,
    seed: int = 0,
) -> np.ndarray:
    """Bytes that each host fetches in each epoch, int64 (hosts, epochs)."""
    size = chunks.end - chunks.start
    fetched = np.zeros((hosts, epochs), np.int64)
    for host in range(hosts):
        cache = Cache(cache_bytes)
        for epoch in range(epochs):
            before = cache.fetched_bytes
            plans = [
                _read_chunks(
                    chunks, Position(epoch), global_batch_size, rank, hosts * ranks_per_host, seed
                )
                for rank in range(host * ranks_per_host, (host + 1) * ranks_per_host)
            ]
            for batches in zip(*plans, strict=True):
                for rank, batch in enumerate(batches):
                    for chunk in batch:
                        cache.open(chunk, int(size[chunk]), rank)
            fetched[host, epoch] = cache.fetched_bytes - before
    return fetched


def _read_chunks(
    chunks: Chunks, start: Position, batch_size: int, rank: int, world_size: int, seed: int
) -> Iterator[list[int]]:
    """The chunks of each of the rank's batches until the epoch's end."""
    plan = plan_batches(chunks.count, seed, start, batch_size, rank, world_size)
    return (np.unique(chunks.of(batch.sample)).tolist() for batch in plan)


def simulate_uploads(interval_seconds: float, upload_seconds: float, count: int) -> float:
    """Seconds that training stands still for `count` checkpoints, one in flight at a time."""
    now, free, stood = 0.0, 0.0, 0.0
    for _ in range(count):
        now += interval_seconds
        wait = max(free - now, 0.0)
        stood, now = stood + wait, now + wait
        free = now + upload_seconds
    return stood
