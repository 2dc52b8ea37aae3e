"""The configuration tree: round trip, overrides, refusals."""

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from efae.config import Config
from efae.config import forms as configuration
from efae.config.forms import from_json, rename_options, to_json, with_overrides
from efae.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset):
    config = PRESETS[preset][1]
    assert configuration.from_json(configuration.to_json(config)) == config


@given(
    rate=st.floats(1e-6, 1.0),
    steps=st.integers(1, 10**9),
    split=st.floats(0, 1),
    counts=st.none() | st.tuples(*[st.integers(0, 64)] * 5),
)
def test_overrides_are_found_again(rate, steps, split, counts):
    overrides = {
        "optimizer.learning_rate": rate,
        "training.steps": steps,
        "representation.chirality_split": split,
        "representation.multiplicities": counts,
    }
    config = with_overrides(Config(), overrides)
    flat = configuration.flatten(configuration.from_json(configuration.to_json(config)))
    assert {key: flat[key] for key in overrides} == overrides


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.learning_rat", 1.0, "did you mean 'optimizer.learning_rate'"),
        ("optimizer", 1.0, "unknown configuration key 'optimizer'"),
        ("training.steps", 0, "training.steps=0: must be positive"),
        ("training.steps", "many", "training.steps"),
        ("training.global_batch_size", 1, "global_batch_size=1: fewer than the 2 workers"),
        ("ray.num_workers", 0, "ray.num_workers=0: must be a positive number"),
        ("ray.num_workers", (3, 2), "ray.num_workers=.*least first"),
        ("ray.rollbacks", -1, "ray.rollbacks=-1"),
        ("resume", "always", "resume='always': use auto, never or the URI"),
        ("data.resolution", 30, "data.resolution=30.*multiple of model.downsampling=8"),
        ("model.patch_size", 3, "model.downsampling=8: must be model.patch_size"),
        ("model.num_heads", 3, "multiple of 8 \\* model.num_heads = 24"),
        ("model.level", "exakt", "model.level"),
        ("data.channels", 4, "data.channels"),
        ("data.pixel_cache_bytes", -1, "data.pixel_cache_bytes=-1: must be >= 0"),
        ("data.buckets", [(32, 32), (32, 30)], "data.buckets=.*32 x 30 .*model.downsampling=8"),
        ("data.buckets", [(32, 32, 32)], "data.buckets"),
    ],
)
def test_bad_values_name_key_value_and_remedy(key, value, message):
    with pytest.raises(ValueError, match=message):
        with_overrides(Config(), {key: value})


BUCKETS = {"data.buckets": [(32, 32), (24, 40), (40, 24)]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.level": "objective"}, "24 x 40 is not square, .*group flips or mirror"),
        (
            {"model.level": "regularized", "representation.group": "C4"},
            "model.level=regularized mixes quarter turns of representation.group=C4",
        ),
        ({"loss.scaling_probability": 0.5}, "24 x 40 is a latent of 3 x 5 cells"),
        ({"loss.rotation_probability": 0.5}, "24 x 40 is not square, .*rotation_probability=0.5"),
        ({"training.compile": "step"}, "training.compile=step: .* every shape of data.buckets"),
        (
            {"training.compile": "blocks", "data.buckets": [(32, 8 * i) for i in range(1, 14)]},
            "training.compile=blocks: .* for 12 shapes, but data.buckets has 13",
        ),
    ],
)
def test_what_buckets_exclude(settings, message):
    with pytest.raises(ValueError, match=message):
        with_overrides(Config(), BUCKETS | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model.level": "none"},
        {"model.level": "objective", "representation.group": "flips"},
        {"model.level": "objective", "data.buckets": [(32, 32), (64, 64)]},
        {"loss.scaling_probability": 0.5, "data.buckets": [(32, 32), (32, 48)]},
        {"training.compile": "blocks"},
    ],
)
def test_what_buckets_allow(settings):
    config = with_overrides(Config(), BUCKETS | settings)
    assert from_json(to_json(config)) == config
    assert config.data.buckets[0] in ((32, 32), (64, 64))


@pytest.mark.parametrize("key", ["loss.scaling_probability", "loss.rotation_probability"])
def test_a_rectangle_is_refused_where_the_loss_cannot_scale_or_turn_it(key):
    settings = {"data.resolution": (16, 24), key: 0.5}
    with pytest.raises(ValueError, match=rf"data.resolution=\(16, 24\) .*{key}=0.5"):
        with_overrides(Config(), settings)


def test_many_shapes_are_not_compiled():
    for number, expected in ((0, "blocks"), (2, "blocks"), (12, "blocks"), (13, "none")):
        buckets = [(32, 8 * i) for i in range(1, number + 1)]
        config = with_overrides(Config(), {"data.buckets": buckets})
        assert config.choose_compilation("cuda") == expected
        assert config.choose_compilation("cpu") == "none"


def test_buckets_are_typed_as_pairs():
    arguments = ["--data.buckets", "32", "32", "24", "40"]
    assert tyro.cli(Config, args=arguments).data.buckets == ((32, 32), (24, 40))


def test_digest_follows_what_decides_the_weights():
    config = Config()
    names = {"tracking.run_name": "other", "ray.num_workers": (1, 4), "resume": "never"}
    names |= {"data.cache_dir": "/other", "data.cache_bytes": 1, "data.decode_threads": 7}
    names |= {"data.pixel_cache_bytes": 1}
    assert configuration.digest(with_overrides(config, names)) == configuration.digest(config)
    changed = with_overrides(config, {"training.seed": 1})
    assert configuration.digest(changed) != configuration.digest(config)


def test_a_name_of_the_earlier_release_is_taken_with_a_warning():
    with pytest.warns(FutureWarning, match=r"renamed to training\.validation_images"):
        config = with_overrides(Config(), {"training.look_images": 7})
    assert config.training.validation_images == 7
    with pytest.warns(FutureWarning, match="next release removes the old name"):
        options = rename_options(["quickstart", "--training.look-images", "7"])
    assert options == ["quickstart", "--training.validation-images", "7"]
    stored = to_json(config).replace("validation_images", "look_images")
    assert from_json(stored) == config
