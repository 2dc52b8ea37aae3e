"""The promises of `epoch_plan`, over arbitrary chunk sizes, batch sizes and world changes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.loading.epoch_plan import (
    MOST_LANES,
    EpochOrder,
    Position,
    count_lanes,
    plan_batches,
)

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)
SEED = st.integers(0, 2**63)
law = settings(deadline=None, max_examples=60)


@law
@given(COUNTS, SEED, st.integers(0, 1000), st.integers(1, 50), st.booleans())
def test_an_order_holds_every_sample_once_and_takes_equally_from_the_lanes(
    counts, seed, epoch, lanes, shuffle
):
    order = EpochOrder(counts, seed, epoch, lanes, shuffle)
    samples, lane = order.read(0, order.total)
    assert sorted(samples.tolist()) == list(range(sum(counts)))
    for end in range(0, order.total, 7):
        taken = np.bincount(lane[:end], minlength=lanes if shuffle else 1)
        assert taken.max() - taken.min() <= 1
    third = order.total // 3
    for start, stop in ((0, 1), (third, order.total - third), (order.total - 1, order.total)):
        assert order.read(start, stop)[0].tolist() == samples[start:stop].tolist()


@law
@given(COUNTS, SEED, st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_ragged_epochs_are_exactly_once_with_equal_batch_counts(
    counts, seed, world, per_rank, shuffle
):
    batch = world * per_rank + seed % world  # also where the ranks do not divide it
    ranks = [
        list(plan_batches(counts, seed, Position(), batch, rank, world, shuffle))
        for rank in range(world)
    ]
    assert {len(rank) for rank in ranks} == {-(-sum(counts) // batch)}
    for parts in zip(*ranks, strict=True):
        sizes = [len(part.sample) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) > 0 or sum(sizes) < world
        assert len({part.position for part in parts}) == 1
    seen = np.concatenate([part.sample for rank in ranks for part in rank])
    assert sorted(seen.tolist()) == list(range(sum(counts)))
    assert ranks[0][-1].position == Position(1, 0)


@law
@given(COUNTS, SEED, st.integers(1, 5), st.sampled_from(["ragged", "carry"]), st.booleans())
def test_global_batches_do_not_depend_on_the_world_size(counts, seed, per_rank, tail, shuffle):
    def collect(world):
        plans = (
            plan_batches(counts, seed, Position(3), 12 * per_rank, rank, world, shuffle, tail)
            for rank in range(world)
        )
        batches = itertools.islice(zip(*plans, strict=True), 7)
        return [join(parts) for parts in batches]

    alone = collect(1)
    for world in (2, 3, 4, 5, 7, 12):
        assert collect(world) == alone


def join(parts):
    """(sample, epoch) of a global batch, in its order."""
    return [pair for p in parts for pair in zip(p.sample.tolist(), p.epoch.tolist(), strict=True)]


@law
@given(
    COUNTS,
    SEED,
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), max_size=6),
    st.sampled_from(["ragged", "carry"]),
)
def test_a_run_that_changes_its_world_size_sees_the_uninterrupted_stream(
    counts, seed, sessions, tail
):
    def read(position, world, batches):
        seen = []
        while len(seen) < batches:
            plans = (
                plan_batches(counts, seed, position, 12, rank, world, tail=tail)
                for rank in range(world)
            )
            for parts in itertools.islice(zip(*plans, strict=True), batches - len(seen)):
                seen.append(join(parts))
                position = parts[0].position
        return seen, position

    position, seen = Position(), []
    for world, batches in sessions:
        more, position = read(position, world, batches)
        seen += more
    assert seen == read(Position(), 1, len(seen))[0]


@law
@given(COUNTS, SEED, st.integers(1, 30))
def test_carry_batches_are_full_and_every_epoch_is_whole(counts, seed, batch):
    total = sum(counts)
    plan = plan_batches(counts, seed, Position(), batch, 0, 1, tail="carry")
    batches = list(itertools.islice(plan, -(-3 * total // batch)))
    assert {len(planned.sample) for planned in batches} == {batch}
    for epoch in range(3):
        samples = np.concatenate([p.sample[p.epoch == epoch] for p in batches])
        assert sorted(samples.tolist()) == list(range(total))


@law
@given(SEED)
def test_epochs_and_seeds_differ(seed):
    def read(*of):
        return EpochOrder([50, 50, 50], *of, lanes=8, shuffle=True).read(0, 150)[0]

    first = read(seed, 0)
    assert (first != read(seed, 1)).any()
    assert (first != read(seed + 1, 0)).any()
    assert (first == read(seed, 0)).all()


def test_the_lanes_divide_the_batch():
    for batch in range(1, 2000):
        lanes = count_lanes(batch)
        assert batch % lanes == 0
        assert lanes <= MOST_LANES or lanes == batch
        assert lanes == batch or lanes >= MOST_LANES // 8


def test_a_shuffle_is_a_good_one():
    chunk, chunks = 100, 600
    total = chunk * chunks
    order = EpochOrder([chunk] * chunks, 5, 0, 256, True).read(0, total)[0]
    # Neighbours are strangers, and a batch comes from many chunks.
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert (order[:-1] // chunk == order[1:] // chunk).mean() < 0.01
    batches = order.reshape(-1, 100) // chunk
    assert min(len(set(batch.tolist())) for batch in batches) > 85
    # The chunks of a shard, twelve each, lie all over the epoch: as wide as a uniform spread.
    shard, place = order // (chunk * 12), np.arange(total) / total
    spread = [place[shard == number].std() for number in range(chunks // 12)]
    assert np.median(spread) > 0.8 * np.sqrt(1 / 12)
    # The order of the source leaves no trend.
    assert abs(np.corrcoef(order, np.arange(total))[0, 1]) < 0.1


@pytest.mark.parametrize("chunks", [128, 512])
@pytest.mark.parametrize("batch", [8, 40, 96, 256, 960, 1024])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_all_nodes_together_read_hardly_more_than_the_set(world, batch, chunks):
    if batch % world:
        batch *= world
    counts = np.random.default_rng(1).integers(30, 50, chunks)  # uneven, as chunks are
    chunk_of = np.repeat(np.arange(chunks), counts)
    read = 0
    for rank in range(world):  # each on a node of its own, with a cache of its own
        plan = plan_batches(counts, 7, Position(), batch, rank, world)
        read += len(set(chunk_of[np.concatenate([part.sample for part in plan])]))
    # Ranks that read what comes would read `world` times the set.
    assert read <= 1.15 * chunks


def test_a_plan_of_a_hundred_million_samples_starts_at_once():
    counts = np.full(1_000_000, 100)
    plan = plan_batches(counts, 0, Position(0, 5000 * 4096), 4096, 3, 64)
    batch = next(plan)
    assert len(batch.sample) == 64
    order = EpochOrder(counts, 0, 0, count_lanes(4096), True)
    order.read(0, 2**14)
    held = sum(window.nbytes for window in order._windows.values())
    assert held < 10 * 2**20
