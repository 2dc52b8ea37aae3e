"""Which samples make up which batch: a pure function of the seed, the same at any world size.

1. Shuffle on two levels: permute the chunks (`chunks.py`), then the samples within windows of
   `WINDOW_CHUNKS` neighbouring chunks. Storage is read a chunk at a time, and a full permutation
   of the samples would need every chunk throughout the epoch. The result is the epoch's stream.
2. Cut the stream into lanes of equal length, and take one sample of each lane in turn. A batch thus
   mixes samples from all over the stream, which makes up for the narrow windows.
3. Global batch s is positions [s·B, (s+1)·B) of that order, sorted by lane, and rank r of W takes
   the r-th of W equal runs. The number of lanes divides B, so every batch takes equally from every
   lane, and a rank stays in its own stretch of the stream: each node reads only its share of the
   chunks, while batches do not depend on the world size.

To resume needs only (epoch, samples consumed by all ranks): positions map to samples by arithmetic
and a permutation seeded per window, so no earlier window is computed again. Windows are permuted
when they are reached, so a plan of any length starts at once and holds only the windows of its
lanes and the permutation of the chunks.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from data_pipelines.loading.options import Tail

MOST_LANES = 128
WINDOW_CHUNKS = 2
VERSION = 2
"""Version of the order; a position of another version means other samples."""
_SAMPLES_PLANNED_AT_ONCE = 2**14


@dataclass(frozen=True)
class Position:
    """How much of the order all ranks together have consumed."""

    epoch: int = 0
    consumed: int = 0
    """Samples of `epoch`, over all ranks."""


@dataclass(frozen=True)
class PlannedBatch:
    """One rank's part of a global batch."""

    sample: np.ndarray
    """Sample numbers, int64 (b,)."""
    epoch: np.ndarray
    """Epoch of each sample, int64 (b,): a batch at a border holds samples of two."""
    position: Position
    """Position after this batch."""
    bucket: int = 0
    """Bucket of all samples of the global batch."""


def count_lanes(global_batch_size: int) -> int:
    """Return the largest divisor up to `MOST_LANES`; the batch size if it is small."""
    divisors = (n for n in range(MOST_LANES, 0, -1) if global_batch_size % n == 0)
    lanes = next(divisors)
    return lanes if lanes >= min(global_batch_size, MOST_LANES // 8) else global_batch_size


class EpochOrder:
    """The order of one epoch's samples, numbered through consecutive chunks of `counts` samples."""

    def __init__(
        self, counts: Sequence[int] | np.ndarray, seed: int, epoch: int, lanes: int, shuffle: bool
    ):
        sizes = np.asarray(counts, np.int64)
        self._key = np.array([seed, epoch], np.uint64)
        self._shuffle = shuffle
        self._lanes = lanes if shuffle else 1
        chunks = self._random(0).permutation(len(sizes)) if shuffle else np.arange(len(sizes))
        self._counts = sizes[chunks]
        self._first = (np.cumsum(sizes) - sizes)[chunks]
        self._chunk_ends = np.cumsum(self._counts)
        self.total = int(sizes.sum())
        self._window_ends = np.append(
            self._chunk_ends[WINDOW_CHUNKS - 1 : -1 : WINDOW_CHUNKS], self.total
        )
        self._windows: OrderedDict[int, np.ndarray] = OrderedDict()
        # Lanes differ by at most one sample. The order is `_rows` rows of one sample per lane,
        # then one partial row with the last samples of the longer lanes.
        edges = [lane * self.total // self._lanes for lane in range(self._lanes + 1)]
        self._starts = np.array(edges[:-1], np.int64)
        self._rows = self.total // self._lanes
        self.even_total = self._rows * self._lanes
        """Number of positions in whole rows."""
        self._turn = _spread(self._lanes)
        longer = np.diff(np.array(edges, np.int64)) > self._rows
        self._last_turn = self._turn[longer[self._turn]]

    def read(
        self, start: int, stop: int, share: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (sample, lane) at positions [start, stop), int64 and int32 (stop - start,).

        Samples of lanes outside the fraction `share` of all lanes may be left undefined.
        """
        samples: list[np.ndarray] = []
        lanes: list[np.ndarray] = []
        whole = self.even_total
        if start < whole:
            end = min(stop, whole)
            first, last = start // self._lanes, -(-end // self._lanes)
            rows = np.empty((last - first, self._lanes), np.int64)
            least, most = (edge * self._lanes for edge in share)
            for turn, lane in enumerate(self._turn.tolist()):
                if least - 1 < lane < most:
                    lane_start = int(self._starts[lane])
                    rows[:, turn] = self._stream(lane_start + first, lane_start + last)
            taken = slice(start - first * self._lanes, end - first * self._lanes)
            samples.append(rows.reshape(-1)[taken])
            lanes.append(np.tile(self._turn, last - first)[taken])
        if stop > whole:
            tail = self._last_turn[max(start - whole, 0) : stop - whole]
            last_of = (int(at) + self._rows for at in self._starts[tail])
            samples += [self._stream(at, at + 1) for at in last_of]
            lanes.append(tail)
        return np.concatenate(samples), np.concatenate(lanes)

    def _stream(self, start: int, stop: int) -> np.ndarray:
        """Return samples [start, stop) of the stream, from as many windows as they span."""
        parts: list[np.ndarray] = []
        window = int(np.searchsorted(self._window_ends, start, side="right"))
        while start < stop:
            end = int(self._window_ends[window])
            samples = self._window(window)
            offset = start - (end - len(samples))
            parts.append(samples[offset : offset + stop - start])
            start, window = end, window + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _window(self, window: int) -> np.ndarray:
        if window in self._windows:
            self._windows.move_to_end(window)
            return self._windows[window]
        chunks = slice(window * WINDOW_CHUNKS, (window + 1) * WINDOW_CHUNKS)
        firsts, counts = self._first[chunks].tolist(), self._counts[chunks].tolist()
        ranges = [np.arange(f, f + n, dtype=np.int64) for f, n in zip(firsts, counts, strict=True)]
        samples = np.concatenate(ranges)
        if self._shuffle:
            samples = self._random(window + 1).permutation(samples)
        self._windows[window] = samples
        if len(self._windows) > 2 * self._lanes:
            self._windows.popitem(last=False)
        return samples

    def _random(self, stream: int) -> np.random.Generator:
        """Return a generator whose counter range no other stream of this key overlaps."""
        counter = np.array([0, 0, 0, stream], np.uint64)
        return np.random.Generator(np.random.Philox(key=self._key, counter=counter))


def plan_batches(
    counts: Sequence[int] | np.ndarray,
    seed: int,
    position: Position,
    global_batch_size: int,
    rank: int,
    world_size: int,
    shuffle: bool = True,
    tail: Tail = "ragged",
) -> Iterator[PlannedBatch]:
    """Yield this rank's part of each global batch from `position` on.

    With ``tail="ragged"`` the iteration ends with the epoch, whose last batch may be smaller; a
    rank's part of it is empty only if fewer samples than ranks are left. With ``"carry"`` it never
    ends: every batch is full, and one at a border joins the end of an epoch to the start of the
    next.
    """
    lanes = count_lanes(global_batch_size)
    order = EpochOrder(counts, seed, position.epoch, lanes, shuffle)
    epoch, consumed, total = position.epoch, position.consumed, order.total
    if not total:
        return

    def choose(lane: np.ndarray) -> np.ndarray:
        """Return the indices of this rank's run of the batch, once sorted by lane."""
        run = slice(len(lane) * rank // world_size, len(lane) * (rank + 1) // world_size)
        return np.argsort(lane, kind="stable")[run]

    share = (rank / world_size, (rank + 1) / world_size)
    at_once = max(_SAMPLES_PLANNED_AT_ONCE // global_batch_size, 1)
    while tail == "carry" or consumed < total:
        even = min((order.even_total - consumed) // global_batch_size, at_once)
        if even > 0:  # whole batches of whole rows hold the same lanes: one choice serves all
            stop = consumed + even * global_batch_size
            sample, lane = order.read(consumed, stop, share)
            mine = choose(lane[:global_batch_size])
            for batch in sample.reshape(even, -1)[:, mine]:
                consumed += global_batch_size
                epochs = np.full(len(mine), epoch)
                if consumed == total:
                    epoch, consumed = epoch + 1, 0
                yield PlannedBatch(batch, epochs, Position(epoch, consumed))
        else:  # one batch with a partial row, which may continue in the next epoch
            parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
            missing = global_batch_size
            while missing:
                stop = min(consumed + missing, total)
                sample, lane = order.read(consumed, stop)
                parts.append((sample, lane, np.full(len(sample), epoch)))
                missing -= len(sample)
                consumed = stop
                if consumed == total:
                    epoch, consumed = epoch + 1, 0
                    if tail == "ragged":
                        break
                    order = EpochOrder(counts, seed, epoch, lanes, shuffle)
            sample, lane, epochs = (np.concatenate(part) for part in zip(*parts, strict=True))
            mine = choose(lane)
            yield PlannedBatch(sample[mine], epochs[mine], Position(epoch, consumed))
        if consumed == 0:
            if tail == "ragged":
                return
            order = EpochOrder(counts, seed, epoch, lanes, shuffle)


def _spread(lanes: int) -> np.ndarray:
    """Return every lane once, in golden-ratio steps: any first few are spread evenly."""
    step = max(round(lanes * 0.618), 1)
    while gcd(step, lanes) > 1:
        step -= 1
    return (np.arange(lanes, dtype=np.int32) * step) % lanes
