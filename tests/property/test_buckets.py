"""The promises of `epoch_plan` for batches of several shapes, over arbitrary sets and worlds."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.loading.buckets import choose_buckets, sort_into_buckets
from data_pipelines.loading.epoch_plan import Position

SHAPES = [(8, 8), (8, 16), (16, 8), (8, 24)]
SEED = st.integers(0, 2**63)
TAIL = st.sampled_from(["ragged", "carry"])
law = settings(deadline=None, max_examples=60)


@st.composite
def made_buckets(draw):
    """A set of up to 200 samples in chunks, in four buckets, some of them rare or empty."""
    counts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=10).filter(sum))
    total = sum(counts)
    of = draw(st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 3]), min_size=total, max_size=total))
    buckets = sort_into_buckets(np.array(SHAPES)[of], np.array(counts), SHAPES)
    assert buckets.of.tolist() == of
    return buckets


def plan(buckets, seed, position, batch, world, tail, shuffle=True):
    """Global batches: a tuple of the ranks' parts each."""
    ranks = (
        buckets.plan(seed, position, batch, rank, world, shuffle, tail) for rank in range(world)
    )
    return zip(*ranks, strict=True)


def join(parts):
    """(sample, epoch) of a global batch, in its order."""
    return [pair for p in parts for pair in zip(p.sample.tolist(), p.epoch.tolist(), strict=True)]


def check_one_bucket(buckets, parts):
    (bucket,) = {part.bucket for part in parts}  # also that of a rank whose part is empty
    assert {int(buckets.of[sample]) for sample, _ in join(parts)} == {bucket}
    assert len({part.position for part in parts}) == 1
    sizes = [len(part.sample) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@law
@given(made_buckets(), SEED, st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_ragged_epochs_are_exactly_once_in_batches_of_one_bucket(
    buckets, seed, world, per_rank, shuffle
):
    batch = world * per_rank + seed % world
    steps = list(plan(buckets, seed, Position(), batch, world, "ragged", shuffle))
    assert len(steps) == sum(-(-len(samples) // batch) for samples in buckets.samples)
    for parts in steps:
        check_one_bucket(buckets, parts)
    seen = sorted(pair for parts in steps for pair in join(parts))
    assert seen == [(sample, 0) for sample in range(len(buckets.of))]
    assert steps[-1][0].position == Position(1, 0)


@law
@given(made_buckets(), SEED, st.integers(1, 30), st.integers(1, 4), st.integers(1, 4))
def test_with_carry_every_bucket_goes_through_whole_epochs_in_full_batches(
    buckets, seed, batch, world, epochs
):
    batch = max(batch, world)
    seen = {number: [] for number in range(len(SHAPES))}
    for parts in plan(buckets, seed, Position(), batch, world, "carry"):
        position = parts[0].position
        if (position.epoch, position.consumed) > (epochs, 0):  # the first batch of another epoch
            break
        check_one_bucket(buckets, parts)
        pairs = join(parts)
        assert len(pairs) == batch
        seen[parts[0].bucket] += pairs
    for number, samples in enumerate(buckets.samples):
        total, pairs = len(samples), seen[number]
        # Nothing is seen again before all of the bucket has been seen.
        assert len(set(pairs)) == len(pairs)
        for place, epoch in enumerate(sorted(epoch for _, epoch in pairs)):
            assert epoch == place // total
        # The samples that wait are fewer than a batch.
        assert epochs * total - batch < len(pairs) <= epochs * total


@law
@given(made_buckets(), SEED, st.integers(1, 3), TAIL, st.booleans())
def test_global_batches_do_not_depend_on_the_world_size(buckets, seed, per_rank, tail, shuffle):
    def collect(world):
        steps = plan(buckets, seed, Position(3), 12 * per_rank, world, tail, shuffle)
        return [(parts[0].bucket, join(parts)) for parts in itertools.islice(steps, 9)]

    alone = collect(1)
    for world in (2, 3, 4, 5, 12):
        assert collect(world) == alone


@law
@given(
    made_buckets(),
    SEED,
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), max_size=6),
    TAIL,
)
def test_a_run_that_changes_its_world_size_sees_the_uninterrupted_stream(
    buckets, seed, sessions, tail
):
    def read(position, world, batches):
        seen = []
        while len(seen) < batches:
            steps = plan(buckets, seed, position, 12, world, tail)
            for parts in itertools.islice(steps, batches - len(seen)):
                seen.append(join(parts))
                position = parts[0].position
        return seen, position

    position, seen = Position(), []
    for world, batches in sessions:
        more, position = read(position, world, batches)
        seen += more
    assert seen == read(Position(), 1, len(seen))[0]


def test_the_buckets_of_an_epoch_are_mixed_evenly_and_anew():
    of = np.repeat([0, 1, 2], [6000, 3000, 60])
    buckets = sort_into_buckets(np.array(SHAPES)[of], np.array([10] * 906), SHAPES)
    turns, ends = buckets.list_batches(0, 0, 30, shuffle=True, tail="carry")
    assert np.bincount(turns).tolist() == [200, 100, 2]
    assert ends.tolist() == list(range(30, 30 * 302 + 1, 30))
    for number, count in enumerate([200, 100, 2]):  # never ahead or behind by more than a batch
        share = np.cumsum(turns == number) - count * np.arange(1, 303) / 302
        assert np.abs(share).max() < 2
    for seed, epoch in ((1, 0), (0, 1)):
        assert (buckets.list_batches(seed, epoch, 30, True, "carry")[0] != turns).any()


@pytest.mark.parametrize("batch", [40, 256])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_all_nodes_together_read_hardly_more_than_the_set(world, batch):
    batch *= world if batch % world else 1
    buckets, chunk_of = make_large_set(512)
    read = 0
    for rank in range(world):  # each on a node of its own, with a cache of its own
        parts = buckets.plan(7, Position(), batch, rank, world)
        read += len(set(chunk_of[np.concatenate([part.sample for part in parts])]))
    assert read <= 1.2 * 512


def test_a_cache_of_half_the_set_fetches_it_twice_not_once_per_bucket():
    buckets, chunk_of = make_large_set(4096)
    held, fetched = {}, 0  # in the order of use
    for part in buckets.plan(7, Position(), 256, 0, 1):
        for chunk in np.unique(chunk_of[part.sample]).tolist():
            fetched += held.pop(chunk, None) is None
            held[chunk] = True
            if len(held) > 2048:
                del held[next(iter(held))]
    assert fetched <= 2 * 4096


def make_large_set(chunks):
    """Buckets of a set of that many chunks, and the chunk of each sample."""
    random = np.random.default_rng(1)
    counts = random.integers(30, 50, chunks)
    chunk_of = np.repeat(np.arange(chunks), counts)
    of = random.choice(4, len(chunk_of), p=[0.6, 0.25, 0.1, 0.05])
    return sort_into_buckets(np.array(SHAPES)[of], counts, SHAPES), chunk_of


def find_distance(height, width, shape):
    ratio = Fraction(height, width) / Fraction(*shape)
    return max(ratio, 1 / ratio)


SIDE = st.integers(1, 30) | st.integers(1, 2**17)


@law
@given(
    st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=40),
    st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=8, unique=True),
)
def test_an_image_goes_to_the_nearest_ratio_and_the_largest_size_it_fills(images, shapes):
    chosen = choose_buckets(np.array(images), shapes)
    for (height, width), number in zip(images, chosen.tolist(), strict=True):
        distances = [find_distance(height, width, shape) for shape in shapes]
        first = shapes[distances.index(min(distances))]
        alike = sorted(shape for shape in shapes if Fraction(*shape) == Fraction(*first))
        filled = [shape for shape in alike if shape[0] <= height and shape[1] <= width]
        assert shapes[number] == (filled[-1] if filled else alike[0])


def test_ties_go_to_the_first():
    images = np.array([(50, 50), (7, 7)])
    assert choose_buckets(images, [(8, 16), (16, 8)]).tolist() == [0, 0]
    assert choose_buckets(images, [(16, 8), (8, 16)]).tolist() == [0, 0]
    assert choose_buckets(images, [(48, 24), (4, 4), (8, 8), (64, 64)]).tolist() == [2, 1]
