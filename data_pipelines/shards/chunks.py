"""Chunks: runs of adjacent samples of one shard that are fetched, cached and shuffled together.

A shard may be too large to fetch before the first sample; a chunk is not. The chunks of a set
depend only on its index, since the epoch's order is an order of chunks.
"""

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from data_pipelines.shards.index import ShardIndex

LARGEST_BYTES = 4 * 2**20
SMALLEST_BYTES = 128 * 2**10
_CHUNKS_OF_A_SMALL_SET = 512
"""Number of chunks with which many nodes can share a set and overlap in few chunks."""


@dataclass(frozen=True)
class Chunks:
    """Columns with one row per chunk, all int64; sample numbers continue across shards."""

    shard: np.ndarray
    first: np.ndarray
    """Number of the first sample."""
    count: np.ndarray
    start: np.ndarray
    """Start of the bytes in the shard, [start, end)."""
    end: np.ndarray

    def of(self, sample: np.ndarray) -> np.ndarray:
        """Return the chunk of each sample."""
        return np.searchsorted(self.first, sample, side="right") - 1

    def neighbours(self, chunk: int, among: Container[int]) -> list[int]:
        """Return the contiguous run of chunks of one shard around `chunk` that are all in `among`.

        It spans at most `LARGEST_BYTES`, or more if the chunk itself does.
        """
        first = last = chunk
        while self._joins(first - 1, first, last, among):
            first -= 1
        while self._joins(last + 1, first, last, among):
            last += 1
        return list(range(first, last + 1))

    def _joins(self, chunk: int, first: int, last: int, among: Container[int]) -> bool:
        if chunk not in among or self.shard[chunk] != self.shard[first]:
            return False
        start, end = min(chunk, first), max(chunk, last)
        return bool(self.end[end] - self.start[start] <= LARGEST_BYTES)


def cut_chunks(index: ShardIndex) -> Chunks:
    """Cut every shard into chunks of about equal bytes, at most about `LARGEST_BYTES`."""
    total = sum(shard.bytes for shard in index.shards)
    target = min(max(total // _CHUNKS_OF_A_SMALL_SET, SMALLEST_BYTES), LARGEST_BYTES)
    rows: list[np.ndarray] = []
    numbered = 0
    for number, shard in enumerate(index.shards):
        if not shard.keys:
            continue
        start, end = shard.span()
        pieces = -(-shard.bytes // target)
        piece = np.minimum(start * pieces // shard.bytes, pieces - 1)
        first = np.flatnonzero(np.diff(piece, prepend=-1))
        columns = (
            np.full(len(first), number),
            numbered + first,
            np.diff(first, append=len(piece)),
            np.minimum.reduceat(start, first),
            np.maximum.reduceat(end, first),
        )
        rows.append(np.stack(columns))
        numbered += len(shard.keys)
    return Chunks(*(np.concatenate(rows, axis=1) if rows else np.zeros((5, 0), np.int64)))
