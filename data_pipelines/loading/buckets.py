"""Batches of several shapes: every global batch holds the samples of one bucket.

A bucket is a height and width. A sample's bucket depends on the size of its image alone. The
samples of each bucket have an order of their own, the one of `epoch_plan`; an epoch takes the
batches of all buckets in turn, each as evenly as its number allows. Thus the promises of
`epoch_plan` hold for every bucket, and with them for the set.

With ``tail="carry"``, bucket b of n_b samples has floor((e + 1) n_b / B) - floor(e n_b / B) batches
of B in epoch e: samples that do not fill a batch wait for the next epoch of their bucket. Each
sample is still consumed once in every epoch of its order, but up to B - 1 samples of a bucket lag
behind the epoch that the position counts.

The buckets share the permutation of the chunks and advance together, so that a node reads about the
chunks that it would read without buckets, and uses a chunk for all buckets at about the same time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from data_pipelines.loading.epoch_plan import PlannedBatch, Position, plan_batches
from data_pipelines.loading.options import Tail
from data_pipelines.shards.index import Shard, ShardIndex

Size = tuple[int, int]
_TURNS = 2**64 - 2
"""Stream of random numbers that neither the order nor the draws of samples use."""


@dataclass(frozen=True)
class Buckets:
    """The samples of each bucket."""

    of: np.ndarray
    """Bucket of each sample, int32 (n,)."""
    samples: list[np.ndarray]
    """Samples of each bucket, ascending."""
    counts: list[np.ndarray]
    """Number of samples in each chunk, for each bucket."""

    def list_batches(
        self, seed: int, epoch: int, batch_size: int, shuffle: bool, tail: Tail
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the bucket of each global batch of an epoch, and the samples up to its end."""
        key = np.array([seed, epoch], np.uint64)
        counter = np.array([0, 0, 0, _TURNS], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=counter))
        buckets: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        times: list[np.ndarray] = []
        for number, samples in enumerate(self.samples):
            total = len(samples)
            if tail == "carry":
                count = (epoch + 1) * total // batch_size - epoch * total // batch_size
                size = np.full(count, batch_size)
            else:
                size = np.diff(np.append(np.arange(0, total, batch_size), total))
                count = len(size)
            # One batch in each of `count` equal slices of the epoch, at a random time within it.
            times.append((np.arange(count) + (random.random(count) if shuffle else 0.5)) / count)
            buckets.append(np.full(count, number))
            sizes.append(size)
        turns = np.argsort(np.concatenate(times), kind="stable")
        return np.concatenate(buckets)[turns], np.cumsum(np.concatenate(sizes)[turns])

    def plan(
        self,
        seed: int,
        position: Position,
        global_batch_size: int,
        rank: int,
        world_size: int,
        shuffle: bool = True,
        tail: Tail = "ragged",
    ) -> Iterator[PlannedBatch]:
        """Yield this rank's part of each global batch from `position` on; see `plan_batches`."""
        size, epoch = global_batch_size, position.epoch
        buckets, ends = self.list_batches(seed, epoch, size, shuffle, tail)
        first = int(np.searchsorted(ends, position.consumed, side="right"))
        done = np.bincount(buckets[:first], minlength=len(self.samples)).tolist()
        plans: list[Iterator[PlannedBatch]] = []
        for samples, counts, batches in zip(self.samples, self.counts, done, strict=True):
            total = len(samples)
            start = Position(epoch, batches * size)
            if tail == "carry" and total:
                start = Position(*divmod((epoch * total // size + batches) * size, total))
            plans.append(plan_batches(counts, seed, start, size, rank, world_size, shuffle, tail))
        while True:
            for turn in range(first, len(buckets)):
                bucket, last = int(buckets[turn]), turn + 1 == len(buckets)
                batch = next(plans[bucket])
                yield replace(
                    batch,
                    sample=self.samples[bucket][batch.sample],
                    position=Position(epoch + 1) if last else Position(epoch, int(ends[turn])),
                    bucket=bucket,
                )
            if tail == "ragged":
                return
            first, epoch = 0, epoch + 1
            buckets, ends = self.list_batches(seed, epoch, size, shuffle, tail)


def sort_into_buckets(
    sizes: np.ndarray, chunk_counts: np.ndarray, buckets: Sequence[Size]
) -> Buckets:
    """Sort samples into buckets by the size of their images.

    Args:
        sizes: Height and width of each image, int64 (n, 2).
        chunk_counts: Number of samples in each chunk.
        buckets: Height and width of each bucket.
    """
    of = choose_buckets(sizes, buckets)
    chunk = np.repeat(np.arange(len(chunk_counts)), chunk_counts)
    samples = [np.flatnonzero(of == number) for number in range(len(buckets))]
    counts = [np.bincount(chunk[rows], minlength=len(chunk_counts)) for rows in samples]
    return Buckets(of, samples, counts)


def choose_buckets(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Return the bucket of each image, int32 (n,).

    It is the one whose ratio of height to width is nearest, on a logarithmic scale; of several as
    near, the first. Of buckets of one ratio, it is the largest that needs no enlargement, or else
    the smallest.
    """
    height, width = sizes.T
    alike: dict[Fraction, list[int]] = {}
    for number, (rows, columns) in enumerate(buckets):
        alike.setdefault(Fraction(rows, columns), []).append(number)
    least, chosen = np.full(len(sizes), np.inf), np.zeros(len(sizes), np.int32)
    for ratio, numbers in alike.items():
        # Quotients of exact integers are the same on every machine; logarithms are not.
        one, other = height * ratio.denominator, width * ratio.numerator
        distance = np.maximum(one, other) / np.minimum(one, other)
        nearer = distance < least
        least[nearer] = distance[nearer]
        by_size = sorted(numbers, key=lambda number: buckets[number])
        chosen[nearer] = by_size[0]
        for number in by_size[1:]:
            rows, columns = buckets[number]
            chosen[nearer & (height >= rows) & (width >= columns)] = number
    return chosen


def split_by_bucket(index: ShardIndex, buckets: Sequence[Size]) -> list[ShardIndex]:
    """Return the index of the images of each bucket, without shards that have none of them.

    Args:
        index: Index of the set, with the sizes of its images.
        buckets: Height and width of each bucket.
    """
    of = choose_buckets(index.image_sizes(), buckets).tolist()
    parts: list[ShardIndex] = []
    for number in range(len(buckets)):
        shards: list[Shard] = []
        bucket = iter(of)
        for shard in index.shards:
            others = [key for key in shard.keys if next(bucket) != number]
            if len(others) < len(shard.keys):
                # In their order, on which the id of the set depends.
                shards.append(shard.leave_out(dict.fromkeys([*shard.left_out, *others])))
        parts.append(replace(index, shards=tuple(shards)))
    return parts


def explain_missing_sizes(uri: str, buckets: Sequence[Size]) -> str:
    """Return why these buckets need another index of the set, and the remedy."""
    return (
        f"buckets={buckets}: the index of {uri} does not have the sizes of its images; add them"
        f" with `python -m data_pipelines.index_shards {uri}`"
    )
