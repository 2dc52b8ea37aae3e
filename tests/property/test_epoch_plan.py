"""The promises of `epoch_plan`, over arbitrary shard sizes, batch sizes and world changes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.epoch_plan import LANES, Position, order_epoch, plan_batches

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)
SEED = st.integers(0, 2**63)
law = settings(deadline=None, max_examples=60)


@law
@given(COUNTS, SEED, st.integers(0, 1000), st.booleans())
def test_an_epoch_holds_every_sample_once(counts, seed, epoch, shuffle):
    samples, lane = order_epoch(counts, seed, epoch, shuffle)
    assert sorted(samples.tolist()) == list(range(sum(counts)))
    assert len(lane) == sum(counts)
    assert lane.min() >= 0
    assert lane.max() < LANES


@law
@given(COUNTS, SEED, st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_ragged_epochs_are_exactly_once_with_equal_batch_counts(
    counts, seed, world, per_rank, shuffle
):
    batch = world * per_rank
    ranks = [
        list(plan_batches(counts, seed, Position(), batch, rank, world, shuffle))
        for rank in range(world)
    ]
    assert {len(rank) for rank in ranks} == {-(-sum(counts) // batch)}
    for parts in zip(*ranks, strict=True):
        sizes = [len(samples) for samples, _ in parts]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) > 0 or sum(sizes) < world
        assert len({position for _, position in parts}) == 1
    seen = np.concatenate([samples for rank in ranks for samples, _ in rank])
    assert sorted(seen.tolist()) == list(range(sum(counts)))
    assert ranks[0][-1][1] == Position(1, 0)


@law
@given(COUNTS, SEED, st.integers(1, 5), st.sampled_from(["ragged", "carry"]), st.booleans())
def test_global_batches_do_not_depend_on_the_world_size(counts, seed, per_rank, tail, shuffle):
    def collect(world):
        plans = (
            plan_batches(counts, seed, Position(3), 12 * per_rank, rank, world, shuffle, tail)
            for rank in range(world)
        )
        batches = itertools.islice(zip(*plans, strict=True), 7)
        return [np.concatenate([part for part, _ in parts]).tolist() for parts in batches]

    alone = collect(1)
    for world in (2, 3, 4, 12):
        assert collect(world) == alone


@law
@given(
    COUNTS,
    SEED,
    st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 6)), max_size=6),
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
                seen.append(np.concatenate([samples for samples, _ in parts]).tolist())
                position = parts[0][1]
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
    batches = [samples for samples, _ in itertools.islice(plan, -(-3 * total // batch))]
    assert {len(samples) for samples in batches} == {batch}
    handed_out = np.bincount(np.concatenate(batches), minlength=total)
    assert handed_out.min() >= 3
    assert handed_out.sum() < 3 * total + batch


@law
@given(SEED)
def test_epochs_and_seeds_differ(seed):
    first = order_epoch([50, 50, 50], seed, 0)[0]
    assert (first != order_epoch([50, 50, 50], seed, 1)[0]).any()
    assert (first != order_epoch([50, 50, 50], seed + 1, 0)[0]).any()
    assert (first == order_epoch([50, 50, 50], seed, 0)[0]).all()


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("batch", [8, 40, 64, 104, 256])
def test_a_rank_reads_mostly_its_own_share_of_the_shards(world, batch):
    counts = [40] * 256
    shard_of = np.repeat(np.arange(256), 40)
    shards_read = 0
    for rank in range(world):
        plan = plan_batches(counts, 7, Position(), batch, rank, world)
        shards_read += len(set(shard_of[np.concatenate([samples for samples, _ in plan])]))
    # Perfect is 256; each rank opening every shard would be 256 * world.
    assert shards_read < 1.4 * 256
