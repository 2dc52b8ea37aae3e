"""The sizing model: against the simulation, the code it speaks of, the measurement and the docs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.sizing import model
from benchmarks.sizing.__main__ import RESULTS, is_close
from benchmarks.sizing.host import make_state
from benchmarks.sizing.measure import Row
from benchmarks.sizing.simulate import make_set, simulate, simulate_uploads
from benchmarks.sizing.table import make_measured, make_tables
from data_pipelines.loading import dataset, loader
from data_pipelines.loading.epoch_plan import WINDOW_CHUNKS
from data_pipelines.shards.index import Members, Shard, ShardIndex, dump_index
from data_pipelines.storage import objects
from efae.checkpoints.checkpoint import write_checkpoint
from efae.model.autoencoder import Autoencoder
from efae.presets import IMAGENET_256, QUICKSTART_TRIAL

ROOT = Path(__file__).parents[3]
CHUNKS = make_set(65_536, 2**19)
"""8,192 chunks of 4 MiB."""
SET_BYTES = int((CHUNKS.end - CHUNKS.start).sum())


def fetch(hosts, cache_share, epochs, **options):
    """Shares of the set that are fetched in each epoch, over all hosts."""
    cache_bytes = int(cache_share * SET_BYTES)
    return simulate(CHUNKS, hosts, cache_bytes, epochs, **options).sum(axis=0) / SET_BYTES


@pytest.mark.parametrize("hosts", [1, 2, 3, 8, 64])
def test_an_endless_cache_fills_as_the_model_says(hosts):
    fetched = fetch(hosts, 1.01, 4, global_batch_size=1024)
    expected = np.array([model.missing_share(hosts, 1.0, epoch) for epoch in range(4)])
    twice = model.border_share(hosts, 128, len(CHUNKS.count))
    assert fetched[0] >= 1
    assert fetched[0] <= 1 + twice
    assert (fetched >= expected - 0.02).all()
    assert (fetched <= expected * (1 + twice) + 0.02).all()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("hosts", [1, 8])
def test_a_full_cache_misses_what_the_model_says_or_a_little_less(hosts, share):
    fetched = fetch(hosts, share, 5, global_batch_size=1024)
    expected = np.array([model.missing_share(hosts, share * 31 / 32, epoch) for epoch in range(5)])
    assert np.abs(fetched / expected - 1).max() < 0.08


def test_it_does_not_matter_which_rank_of_a_host_reads_a_chunk():
    assert fetch(2, 1.01, 2, ranks_per_host=4) == pytest.approx(fetch(2, 1.01, 2), rel=1e-3)


def test_a_cache_below_the_least_is_read_past():
    job = model.Job(gpus=1, images=65_536, image_bytes=2**19, parameters=0)
    windows = model.least_cache(job) - min(job.cache_bytes / 4, model.PREFETCH_BYTES)
    assert windows == 2 * WINDOW_CHUNKS * 128 * 2**22
    share = windows / SET_BYTES
    # 128 borders between lanes lie in windows, which are read at their start and at their end.
    assert fetch(1, share, 1, global_batch_size=1024)[0] < 1.06
    assert fetch(1, share / 4, 1, global_batch_size=1024)[0] > 1.9


def test_rates_of_a_run_that_fits_its_caches():
    job = replace(model.IMAGENET, gpus=1)
    assert model.cold_rate(job) == pytest.approx(500 * 30_000)
    assert model.later_rate(job, 1) == 0
    assert model.cold_rate(replace(job, gpus=8)) == pytest.approx(8 * 500 * 30_000)


@pytest.mark.parametrize(("interval", "upload"), [(10, 4), (10, 10), (10, 25), (1, 300)])
def test_training_stands_still_where_an_upload_takes_longer_than_the_interval(interval, upload):
    job = model.Job(8, 1, 1.0, parameters=1, checkpoint_seconds=interval)
    rate = model.checkpoint_bytes(job) / upload
    stood = simulate_uploads(interval, upload, 1000)
    assert stood / (stood + 1000 * interval) == pytest.approx(
        model.standing_share(job, rate), abs=2e-3
    )
    if upload <= interval:
        assert rate >= model.least_upload_rate(job)
        assert stood == 0


def test_a_checkpoint_is_as_large_as_the_model_says(tmp_path):
    state = make_state(QUICKSTART_TRIAL)
    tensors, metadata = state.snapshot()
    write_checkpoint(tmp_path, **tensors, metadata=metadata, config=QUICKSTART_TRIAL)
    stored = sum(file.stat().st_size for file in tmp_path.iterdir())
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    assert 1 <= stored / (model.BYTES_PER_PARAMETER * parameters) < 1.05


def test_an_index_is_as_large_as_the_model_says():
    count = 2000
    random = np.random.default_rng(0)
    members = {
        extension: Members(
            np.arange(count) * 101_000 + first,
            np.full(count, size),
            random.integers(0, 2**32, count),
        )
        for extension, first, size in (("jpg", 512, 90_000), ("cls", 100_000, 3))
    }
    keys = [f"{number:09d}" for number in range(count)]
    index = ShardIndex((Shard("a.tar", 101_000 * count, "0" * 64, keys, members),), None)
    per_sample = len(dump_index(index)) / count
    assert per_sample == pytest.approx(model.INDEX_BYTES_PER_SAMPLE, rel=0.1)


def test_the_model_has_the_numbers_of_the_code():
    assert objects._attempt_seconds(2**24) == model.FILE_SECONDS
    assert objects.ATTEMPT_SECONDS == model.RANGE_SECONDS
    assert loader._FETCH_THREADS == model.FETCH_THREADS
    assert dataset._PREFETCH_BYTES == model.PREFETCH_BYTES
    assert IMAGENET_256.data.cache_bytes == model.IMAGENET.cache_bytes
    assert IMAGENET_256.ray.checkpoints_to_keep == 2
    with torch.random.fork_rng(devices=[]):
        parameters = sum(weight.numel() for weight in Autoencoder(IMAGENET_256).parameters())
    assert parameters == model.IMAGENET.parameters


def test_what_was_measured_is_as_predicted():
    rows = [
        Row(**{name: row[name] for name in Row.__annotations__})
        for row in json.loads(RESULTS.read_text())["rows"]
    ]
    assert {(row.what, row.hosts) for row in rows} == {
        ("checkpoint written", 1),
        *(
            (what, hosts)
            for what in ("epoch 1", "epoch 2", "checkpoint read by all")
            for hosts in (1, 2, 3)
        ),
    }
    assert all(map(is_close, rows))


def test_the_docs_show_the_tables_as_the_model_makes_them():
    text = (ROOT / "docs/operating.md").read_text()
    assert make_tables() in text
    assert make_measured(json.loads(RESULTS.read_text())["rows"]) in text
