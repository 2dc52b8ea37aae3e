"""Loading of batches in the order of `epoch_plan`, from any position on.

Chunks are fetched ahead of the decoders, and threads decode whole batches ahead of the consumer
(the decoders release the GIL), each into one array; the device normalises. The position counts the
batches returned, not those decoded ahead, and holds nothing per worker, so it resumes at another
world size.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from data_pipelines.loading.batch import Batch
from data_pipelines.loading.epoch_plan import VERSION, PlannedBatch, Position, plan_batches
from data_pipelines.loading.options import LoaderOptions
from data_pipelines.loading.sample_reader import SampleReader
from data_pipelines.loading.shard_cache import ShardError

_BATCHES_AHEAD = 2
"""Decoded batches that may wait for the consumer, beside one in each decoder thread."""
_FETCH_THREADS = 16
_PREFETCH_BYTES = 512 * 2**20
"""Upper bound of the bytes fetched ahead of the decoders."""
_SMALL_SAMPLE = 3 * 64 * 64
"""Below this many values, decoding takes less time than handing over the GIL."""


class ShardLoader:
    """An iterable over batches that knows its position; made by `ShardDataset.loader`."""

    def __init__(
        self,
        reader: SampleReader,
        options: LoaderOptions,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be in [0, world_size={world_size})")
        if global_batch_size < world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size}: must be at least world_size={world_size}"
            )
        if seed < 0:
            raise ValueError(f"{seed=}: must be >= 0")
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.wait_seconds = 0.0
        """Total time that the consumer has waited for batches."""
        self._reader, self._options, self._seed = reader, options, seed
        self._dataset_id = reader.index.id
        self._decode_threads = options.decode_threads or _choose_threads(reader.form.shapes)
        size = sum(shard.bytes for shard in reader.index.shards)
        self._prefetch_bytes = (
            0 if reader.cache.local else min(_PREFETCH_BYTES, options.cache_bytes // 4, size)
        )
        self._position: Position = Position()
        self._iteration = 0

    @property
    def bad_samples(self) -> dict[str, str]:
        """Key and fault of every bad sample that this loader has replaced."""
        return dict(self._reader.bad_samples)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over batches from the position on; a newer iterator ends the older ones."""
        self._iteration += 1
        return self._iterate(self._iteration)

    def _iterate(self, iteration: int) -> Iterator[Batch]:
        buckets = self._reader.buckets
        plan = buckets.plan if buckets else partial(plan_batches, self._reader.chunks.count)
        planned = plan(
            self._seed,
            self._position,
            self.global_batch_size,
            self.rank,
            self.world_size,
            self._options.shuffle,
            self._options.tail,
        )
        self._reader.open()
        fetched = _FetchedAhead(planned, self._reader, self._prefetch_bytes)
        decoders = ThreadPoolExecutor(self._decode_threads, thread_name_prefix="decode")
        ahead: deque[tuple[Future[Batch], Position]] = deque()
        try:
            while True:
                started = time.perf_counter()
                while len(ahead) < self._decode_threads + _BATCHES_AHEAD:
                    batch = fetched.take()
                    if batch is None:
                        break
                    ahead.append((decoders.submit(fetched.read, batch), batch.position))
                if not ahead:
                    return
                future, position = ahead.popleft()
                decoded = future.result()
                self.wait_seconds += time.perf_counter() - started
                if iteration != self._iteration:
                    raise RuntimeError("this loader was moved on: its older iterator has ended")
                self._position = position
                yield decoded
        finally:
            fetched.close()
            decoders.shutdown(wait=True, cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch returned; JSON, the same on every rank."""
        return {**self._identity(), **asdict(self._position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the last batch that the saved loader returned, at any world size.

        Raises:
            ValueError: The state belongs to other data or another order.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"the saved position has {name}={state.get(name)!r}, this loader {mine!r}:"
                    " resume with the same data, seed, batch size, buckets and version of this"
                    " package, or start a new run"
                )
        position = Position(int(state["epoch"]), int(state["consumed"]))
        if not self._is_in_order(position):
            raise ValueError(f"the saved position {position} is outside the data: it is damaged")
        self._iteration += 1
        self._position = position

    def _is_in_order(self, position: Position) -> bool:
        epoch, consumed = position.epoch, position.consumed
        buckets, options = self._reader.buckets, self._options
        if epoch < 0 or consumed < 0 or buckets is None:
            samples = int(self._reader.chunks.count.sum())
            return epoch >= 0 and 0 <= consumed < samples
        size = self.global_batch_size
        _, ends = buckets.list_batches(self._seed, epoch, size, options.shuffle, options.tail)
        return consumed == 0 or consumed in ends[:-1]

    def _identity(self) -> dict[str, Any]:
        return {
            "dataset_id": self._dataset_id,
            "seed": self._seed,
            "global_batch_size": self.global_batch_size,
            "shuffle": self._options.shuffle,
            "tail": self._options.tail,
            "buckets": [list(sides) for sides in self._options.buckets] or None,
            "order_version": VERSION,
        }


class _FetchedAhead:
    """Planned batches, whose chunks threads fetch before the batches are taken."""

    def __init__(self, planned: Iterator[PlannedBatch], reader: SampleReader, prefetch_bytes: int):
        self._planned, self._reader, self._prefetch_bytes = planned, reader, prefetch_bytes
        self._ahead: deque[tuple[PlannedBatch, int]] = deque()
        self._bytes_ahead = 0
        self._threads = ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="fetch")
        self._fetches: dict[int, Future[Any]] = {}
        self._failure: ShardError | None = None

    def take(self) -> PlannedBatch | None:
        """Return the next batch, or None after the last."""
        wanted: dict[int, None] = {}  # a set in order
        while not self._ahead or self._bytes_ahead < self._prefetch_bytes:
            batch = next(self._planned, None)
            if batch is None:
                break
            size = self._reader.count_bytes(batch.sample)
            self._ahead.append((batch, size))
            self._bytes_ahead += size
            if not self._reader.cache.local:
                wanted |= dict.fromkeys(self._reader.find_chunks(batch.sample))
        self._fetch(wanted)
        if not self._ahead:
            return None
        batch, size = self._ahead.popleft()
        self._bytes_ahead -= size
        return batch

    def read(self, batch: PlannedBatch) -> Batch:
        """Decode the batch once its chunks have arrived; called in a decoder thread."""
        if self._fetches:
            for chunk in self._chunks(batch):
                fetch = self._fetches.get(chunk)
                if fetch is not None:
                    fetch.result()
                    self._fetches.pop(
                        chunk, None
                    )  # from now on it may be evicted and fetched again
        return self._reader.read(batch)

    def close(self) -> None:
        """Cancel fetches that have not started and wait for the others."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, wanted: Iterable[int]) -> None:
        """Start fetches in the order of need, each together with its wanted neighbours."""
        cache = self._reader.cache
        missing = dict.fromkeys(c for c in wanted if c not in self._fetches and not cache.holds(c))
        for chunk in list(missing):
            if chunk in missing:
                run = self._reader.chunks.neighbours(chunk, missing)
                fetch = self._threads.submit(self._fetch_run, run)
                for fetched in run:
                    del missing[fetched]
                    self._fetches[fetched] = fetch

    def _fetch_run(self, chunks: list[int]) -> None:
        """Fetch in a thread; after a failure fail at once, so that `close` need not wait."""
        if self._failure is not None:
            raise self._failure
        try:
            self._reader.cache.fetch(chunks)
        except ShardError as failure:
            self._failure = failure
            raise

    def _chunks(self, batch: PlannedBatch) -> list[int]:
        return np.unique(self._reader.chunks.of(batch.sample)).tolist()


def _choose_threads(shapes: Iterable[tuple[int, ...]]) -> int:
    alone = len(os.sched_getaffinity(0)) == 1
    return 1 if alone or max(map(math.prod, shapes)) <= _SMALL_SAMPLE else 2
