"""Audit of the samples that every rank consumes in three epochs, under kills and resizes.

Each rank is a process that reads from S3 through the node's shared cache, writes down the keys of
every batch, and waits for the others, as a training step does; rank 0 saves the position now and
then. One rank is killed at a random moment, the rest end with it, and a group of another size goes
on from the last saved position. The images differ in shape: they are cut to one, or sorted into
buckets.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from data_pipelines import ShardDataset, storage
from data_pipelines.build_shards import build_shards

pytestmark = pytest.mark.s3
URI = "s3://efae-data/audit"
SAMPLES, GLOBAL_BATCH, SAVE_EVERY = 310, 24, 4
STEPS = 3 * SAMPLES // GLOBAL_BATCH + 1  # three epochs and a little
WORLDS = (1, 3, 2, 4)
SHAPES = ((8, 8), (8, 16), (16, 8))
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["data_pipelines.loading.dataset", "s3fs"])


def choose_shape(number):
    """The shape of an image: over half are square, a seventh is upright."""
    return SHAPES[(0, 0, 0, 0, 1, 1, 2)[number % 7]]


def consume(rank, world, folder, attempt, barrier, buckets):
    """One rank: read, write down, wait for the others, save."""
    loader = ShardDataset.open(URI).loader(
        GLOBAL_BATCH,
        rank,
        world,
        seed=3,
        tail="carry",
        cache_dir=folder / "cache",
        resolution=8,
        buckets=buckets,
    )
    saved = folder / "position.json"
    step = 0
    if saved.exists():
        state = json.loads(saved.read_text())
        step = state["step"]
        loader.load_state_dict(state["position"])
    with (folder / f"{attempt}-{rank}.jsonl").open("w", buffering=1) as log:
        for batch in loader:
            shape = batch.image.shape[2:]
            assert {shape} == {choose_shape(int(key)) if buckets else (8, 8) for key in batch.key}
            log.write(json.dumps([step, batch.key]) + "\n")
            barrier.wait()
            time.sleep(0.02)  # the step itself: a kill lands in it, or while chunks are fetched
            step += 1
            if rank == 0 and (step % SAVE_EVERY == 0 or step == STEPS):
                part = saved.with_suffix(".part")
                part.write_text(json.dumps({"step": step, "position": loader.state_dict()}))
                part.replace(saved)
            barrier.wait()
            if step == STEPS:
                return


@pytest.fixture
def audited_set(local_stack, tmp_path):
    """310 images in 23 shards on S3, the last one smaller."""
    (tmp_path / "images").mkdir()
    for number in range(SAMPLES):
        shape = (*choose_shape(number), 3)
        pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:03d}.png")
    build_shards(f"folder:{tmp_path}/images", URI, samples_per_shard=14, on="here")
    yield
    storage.delete(URI)


def run_group(world, folder, attempt, kill_after_steps, random_number, buckets):
    """Start `world` ranks; kill one of them once that many steps are written, or let them end."""
    barrier = PROCESSES.Barrier(world)
    ranks = [
        PROCESSES.Process(target=consume, args=(rank, world, folder, attempt, barrier, buckets))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    log = folder / f"{attempt}-0.jsonl"
    deadline = time.monotonic() + 120
    while kill_after_steps is not None and time.monotonic() < deadline:
        if log.exists() and len(log.read_bytes().splitlines()) >= kill_after_steps:
            time.sleep(0.04 * random_number.random())
            os.kill(random_number.choice(ranks).pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    if kill_after_steps is None:
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0] * world
    for rank in ranks:
        rank.kill()
        rank.join()


@pytest.mark.parametrize(
    ("seed", "buckets"),
    [(0, ()), (1, ()), (2, SHAPES)],
    ids=["one shape", "one shape, other kills", "buckets"],
)
def test_every_sample_is_consumed_once_in_every_epoch(audited_set, tmp_path, seed, buckets):
    random_number = random.Random(seed)
    attempts = [(world, random_number.randint(3, 8)) for world in WORLDS] + [(2, None)]
    for attempt, (world, kill_after_steps) in enumerate(attempts):
        run_group(world, tmp_path, attempt, kill_after_steps, random_number, buckets)
    assert json.loads((tmp_path / "position.json").read_text())["step"] == STEPS

    # Of each step, what every attempt at it consumed, over all ranks in their order.
    consumed = defaultdict(dict)
    for attempt, (world, _) in enumerate(attempts):
        for rank in range(world):
            lines = (tmp_path / f"{attempt}-{rank}.jsonl").read_text().split("\n")
            for step, keys in map(json.loads, filter(None, lines[:-1])):
                consumed[step].setdefault(attempt, {})[rank] = keys
    repeated = 0
    counts = {shape: Counter() for shape in buckets or ["one"]}
    for number in range(SAMPLES):
        counts[choose_shape(number) if buckets else "one"][f"{number:03d}"] = 0
    for step in range(STEPS):
        whole = [
            [key for rank in sorted(ranks) for key in ranks[rank]]
            for attempt, ranks in consumed[step].items()
            if len(ranks) == attempts[attempt][0]  # not cut off within this step
        ]
        assert all(keys == whole[0] for keys in whole)  # a step done again takes the same samples
        assert len(whole[0]) == GLOBAL_BATCH
        repeated += len(whole) - 1
        (mine,) = [count for count in counts.values() if whole[0][0] in count]  # one bucket's
        assert mine.keys() >= set(whole[0])
        mine.update(whole[0])
        # Nothing is seen again before all has been seen, in this epoch as in those before.
        epochs, rest = divmod(mine.total(), len(mine))
        assert set(mine.values()) == ({epochs, epochs + 1} if rest else {epochs})
        assert sum(count == epochs + 1 for count in mine.values()) == rest
    assert sum(count.total() for count in counts.values()) == STEPS * GLOBAL_BATCH
    assert min(min(count.values()) for count in counts.values()) >= 2  # in three epochs
    assert repeated > 0  # the kills did cost steps that were done again
    # A kill in the middle of a download leaves nothing that is taken for a chunk.
    sizes = {path.stat().st_size for path in (tmp_path / "cache").rglob("*.chunk")}
    assert sizes == {int(size) for size in _chunk_sizes()}


def _chunk_sizes():
    chunks = ShardDataset.open(URI).chunks
    return chunks.end - chunks.start
