"""Which samples make up which batch: a pure function of the seed, the same at any world size.

The epoch's order: shards are permuted, then samples within windows of `WINDOW_SHARDS` neighbouring
shards, and the result is cut into `LANES` contiguous runs, the lanes. Reading one sample from each
lane in turn gives the order; global batch s is the positions [s·B, (s+1)·B) of it, sorted by lane,
and rank r of W takes the r-th of W equal runs of the batch. So every rank reads its own stretch of
the lanes, hence mostly its own shards, while batches do not depend on the world size. The turn
goes through the lanes in bit-reversed order, which spreads a batch smaller than LANES evenly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LANES = 64
WINDOW_SHARDS = 2
Tail = Literal["ragged", "carry"]


@dataclass(frozen=True)
class Position:
    """How much of the stream has been handed out to all ranks together."""

    epoch: int = 0
    consumed: int = 0
    """Samples of `epoch`, over all ranks."""


def order_epoch(
    counts: Sequence[int], seed: int, epoch: int, shuffle: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Every sample once: (sample (N,), lane (N,)), both int64, in the epoch's order.

    Samples are numbered through the shards, which hold `counts` samples each.
    """
    sizes = np.asarray(counts, np.int64)
    total = int(sizes.sum())
    if not shuffle:
        return np.arange(total), np.zeros(total, np.int64)
    random = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    shards = random.permutation(len(sizes))
    starts = np.cumsum(sizes) - sizes
    ends = np.cumsum(sizes[shards])
    within = np.arange(total) - np.repeat(ends - sizes[shards], sizes[shards])
    samples = np.repeat(starts[shards], sizes[shards]) + within
    first = 0
    for last in [*ends[WINDOW_SHARDS - 1 :: WINDOW_SHARDS], total]:
        samples[first:last] = random.permutation(samples[first:last])
        first = last
    lane = np.arange(total) * LANES // max(total, 1)
    row = np.arange(total) - np.searchsorted(lane, lane)
    turn = np.lexsort((_reverse_bits(lane), row))
    return samples[turn], lane[turn]


def plan_batches(
    counts: Sequence[int],
    seed: int,
    position: Position,
    global_batch_size: int,
    rank: int,
    world_size: int,
    shuffle: bool = True,
    tail: Tail = "ragged",
) -> Iterator[tuple[np.ndarray, Position]]:
    """This rank's part of each global batch from `position` on, and the position after it.

    With ``tail="ragged"`` the iteration ends with the epoch, whose last batch may be smaller; a
    rank's part of it is empty only where fewer samples than ranks are left. With ``"carry"`` it
    never ends: every batch is full, those at a border hold the end of one epoch and the start of
    the next.
    """
    total = int(np.sum(counts))
    samples, lane = order_epoch(counts, seed, position.epoch, shuffle)
    while total and (tail == "carry" or position.consumed < total):
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        missing = global_batch_size
        while missing:
            taken = slice(position.consumed, min(position.consumed + missing, total))
            parts.append((samples[taken], lane[taken]))
            missing -= taken.stop - taken.start
            position = Position(position.epoch, taken.stop)
            if position.consumed == total:
                position = Position(position.epoch + 1, 0)
                if tail == "ragged":
                    break
                samples, lane = order_epoch(counts, seed, position.epoch, shuffle)
        batch, batch_lane = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        batch = batch[np.argsort(batch_lane, kind="stable")]
        size = len(batch)
        yield batch[size * rank // world_size : size * (rank + 1) // world_size], position
        if tail == "ragged" and position.consumed == 0:
            return


def _reverse_bits(lane: np.ndarray) -> np.ndarray:
    reversed_lane = np.zeros_like(lane)
    for bit in range(LANES.bit_length() - 1):
        reversed_lane = (reversed_lane << 1) | ((lane >> bit) & 1)
    return reversed_lane
