"""A loader's options: one value, or flat keywords, or a run's configuration."""

from dataclasses import fields

import numpy as np
import pytest

from data_pipelines import ShardDataset
from data_pipelines.loading.options import LoaderOptions, ReadOptions, choose_options
from efae.config import Config, DataConfig
from efae.config.forms import with_overrides


def test_changes_replace_options_of_any_kind():
    for options in (ReadOptions(cache_bytes=7), LoaderOptions(cache_bytes=7, tail="carry")):
        chosen = choose_options(options, crop="random", members=("cls",))
        assert (chosen.cache_bytes, chosen.crop, chosen.members) == (7, "random", ("cls",))
        assert chosen.tail == getattr(options, "tail", "ragged")
    with pytest.raises(TypeError, match="resolutoin"):
        choose_options(LoaderOptions(), resolutoin=8)


def test_a_configuration_reads_as_its_options_say(shards):
    """Every option counts: none is lost between a configuration and a loader."""
    values = {
        "resolution": (4, 6),
        "buckets": (),
        "crop": "random",
        "channels": 1,
        "cache_bytes": 2**30,
        "cache_dir": "/cache",
        "pixel_cache_bytes": 0,
        "bad_samples": "replace",
        "most_bad_samples": 3,
        "decode_threads": 2,
    }
    data = DataConfig(uri=shards, **values)
    assert set(values) == {field.name for field in fields(ReadOptions)}
    assert choose_options(data) == LoaderOptions(**values)
    dataset = ShardDataset.open(shards)
    found, expected = dataset.loader(5, options=data), dataset.loader(5, **values)
    for one, other in zip(found, expected, strict=True):
        assert one.key == other.key
        assert one.image.shape[1:] == (1, 4, 6)
        assert one.image.equal(other.image)


def test_sides_are_integers_of_any_kind():
    side = np.int64(8)
    assert repr(ReadOptions(resolution=side).resolution) == "8"
    chosen = choose_options(LoaderOptions(), resolution=[side, 16], buckets=np.array([[8, 16]]))
    assert repr((chosen.image_size, chosen.buckets)) == "((8, 16), ((8, 16),))"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "resolution=0: must be positive"),
        ({"resolution": (8, -1)}, r"resolution=\(8, -1\): must be positive"),
        ({"cache_bytes": 0}, "cache_bytes=0: must be positive"),
        ({"decode_threads": 0}, "decode_threads=0: must be positive"),
        ({"pixel_cache_bytes": -1}, "pixel_cache_bytes=-1: must be >= 0"),
        ({"pixel_cache_bytes": 1, "crop": "random"}, "pixel_cache_bytes=1: random crops differ"),
        ({"pixel_cache_bytes": 1, "buckets": ((8, 8),)}, "pixel_cache_bytes=1: it holds images"),
        ({"buckets": ((8, 8), (8, 0))}, "buckets=.*: 8 x 0: must be positive"),
        ({"buckets": ((8, 8), (8, 16), (8, 8))}, "buckets=.*: 8 x 8 is there twice"),
    ],
)
def test_a_loader_and_a_configuration_refuse_the_same(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        choose_options(LoaderOptions(), **options)
    with pytest.raises(ValueError, match=rf"\sdata\.{message}"):
        with_overrides(Config(), {f"data.{name}": value for name, value in options.items()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "top"}, "crop='top': use center or random"),
        ({"channels": 4}, r"channels=4: use 1 \(grey\), 3 \(RGB\) or None"),
        ({"bad_samples": "skip"}, "bad_samples='skip': use fail or replace"),
        ({"tail": "drop"}, "tail='drop': use ragged or carry"),
        ({"augment": "flips"}, "augment='flips': use group or None"),
        ({"resolution": (8, 8, 3)}, r"resolution=\(8, 8, 3\): give one side, or a height and .*"),
        ({"resolution": 8.0}, r"resolution=8\.0: give one side, or a height and .*"),
        ({"buckets": ((8, 8, 3),)}, r"buckets=\(\(8, 8, 3\),\): give a height and a width .*"),
        ({"buckets": (8, 16)}, r"buckets=\(8, 16\): give a height and a width .*"),
    ],
)
def test_a_value_of_no_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        choose_options(LoaderOptions(), **options)
