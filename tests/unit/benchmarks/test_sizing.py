"""The sizing tables: the documentation shows them, and the formulas have the code's numbers."""

from pathlib import Path

import pytest
import torch

from benchmarks import sizing
from data_pipelines.loading import loader
from data_pipelines.storage import objects
from efae.model.autoencoder import Autoencoder
from efae.presets import IMAGENET_256


@pytest.mark.parametrize("job", [sizing.IMAGENET, sizing.LARGE])
def test_the_documentation_shows_the_tables(job):
    text = (Path(__file__).parents[3] / "docs/sizing.md").read_text()
    assert sizing.make_table(job) in text


@pytest.mark.parametrize("hosts", [1, 2, 8])
def test_caches_miss_everything_first_and_less_the_more_they_hold(hosts):
    for epoch in (1, 5, 50):
        missing = [sizing.missing_share(hosts, share / 20, epoch) for share in range(1, 21)]
        assert missing == sorted(missing, reverse=True)
        assert missing[-1] == pytest.approx((1 - 1 / hosts) ** epoch)
        assert all(0 <= share <= 1 for share in missing)
    assert sizing.missing_share(hosts, 1.0, 0) == 1


def test_the_formulas_have_the_numbers_of_the_code():
    assert objects._attempt_seconds(2**24) == sizing.FILE_SECONDS
    assert objects.ATTEMPT_SECONDS == sizing.FETCH_SECONDS
    assert loader._FETCH_THREADS == sizing.FETCH_THREADS
    assert loader._PREFETCH_BYTES == sizing.PREFETCH_BYTES
    assert IMAGENET_256.data.cache_bytes == sizing.IMAGENET.cache_bytes
    assert IMAGENET_256.ray.checkpoints_to_keep == 2
    with torch.random.fork_rng(devices=[]):
        parameters = sum(weight.numel() for weight in Autoencoder(IMAGENET_256).parameters())
    assert parameters == sizing.IMAGENET.parameters


def test_steps_of_fine_tuning_are_measured():
    small = sizing.SDXL | {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
    found = sizing.measure_fine_tuning(small, batch=2, resolution=16, activation_memory=0.0)
    assert found["images_per_second"] > 0
    assert 0.01 < found["peak_gib"] < 64
