"""What a sweep may try: named spaces and files, combinations that can work, different models."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.representation import build_representation
from efae.presets import PRESETS
from efae.sweep.config import OF_GRIDS, SweepConfig
from efae.sweep.space import NAMED_SPACES, Chooser, apply_combination, count_latent, read_space
from efae.sweep.sweep import check_settings, describe_size
from efae.symmetry.representation import IRREPS

QUICKSTART = PRESETS["quickstart"][1]
ROTATION, CHIRALITY = "representation.rotation_dims", "representation.chirality_split"
RATE = "optimizer.learning_rate"
SPLITS = read_space("split", QUICKSTART)
COPIES = [f"representation.multiplicities.{irrep}" for irrep in IRREPS[1:]]


@pytest.mark.parametrize("name", ["split", "multiplicities"])
@pytest.mark.parametrize("preset", ["quickstart", "fashion_mnist"])
def test_a_named_space_holds_different_models_of_one_size(name, preset):
    config = PRESETS[preset][1]
    possible = Chooser(config, read_space(name, config)).list_possible()
    assert possible is not None
    models = [build_representation(apply_combination(config, c)) for c in possible]
    assert {model.dim for model in models} == {config.representation.dim}
    splits = {tuple(model.multiplicities.values()) for model in models}
    assert len(splits) == len(models) > 12
    assert all(model.multiplicities["a1"] >= config.data.channels for model in models)


def test_all_splits_of_an_autoencoders_channels_are_tried_or_counted():
    counted: dict[int, str] = {}
    for dim in (4, 8):
        overrides = {"representation.dim": dim, "start.action": "split"}
        config = with_overrides(PRESETS["fine_tune"][1], overrides)
        chooser = Chooser(config, read_space("multiplicities", config))
        possible = chooser.list_possible()
        counted[dim] = describe_size(possible, SweepConfig().trials)
        if dim == 4:  # three invariant channels, one for each colour, and one of any kind
            models = [build_representation(apply_combination(config, c)) for c in possible]
            splits = {tuple(model.multiplicities.values()) for model in models}
            assert splits == {(4, 0, 0, 0, 0), (3, 1, 0, 0, 0), (3, 0, 1, 0, 0), (3, 0, 0, 1, 0)}
    assert "has 4 different models; all of them are tried" in counted[4]
    assert "has 47 different models; sweep.trials=16 leaves out 31" in counted[8]
    assert "infinite" in describe_size(None, 16)


def test_what_cannot_work_or_was_there_is_refused():
    chooser = Chooser(QUICKSTART, read_space("split", QUICKSTART))
    assert chooser.accept({ROTATION: 8, CHIRALITY: 0.5})
    assert not chooser.accept({ROTATION: 8, CHIRALITY: 0.5})
    assert not chooser.accept({ROTATION: 8, CHIRALITY: 0.51})  # the same whole channels
    assert not chooser.accept({ROTATION: 7, CHIRALITY: 0.5})
    assert not chooser.accept({ROTATION: 28, CHIRALITY: 0.5})  # two invariant, three colours
    assert [("even" in why, "colours" in why) for why in chooser.refused.values()] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    ("space", "split", "combination"),
    [
        ("split", (8, 1, 4, 3, 8), {ROTATION: 16, CHIRALITY: 0.5}),  # trained as 8+2+3+3+8
        ("split", (6, 1, 1, 0, 12), {ROTATION: 24, CHIRALITY: 0.25}),
        ("split", (7, 2, 4, 3, 8), None),
        ("split", (2, 2, 2, 2, 12), None),  # two invariant, three colours
        ("split", (4, 0, 0, 0, 14), {ROTATION: 28, CHIRALITY: 0.0}),
        ("split_and_rate", (8, 1, 4, 3, 8), {ROTATION: 16, CHIRALITY: 0.5, RATE: 1.0}),
        ("multiplicities", (8, 2, 4, 2, 8), dict(zip(COPIES, (2, 4, 2, 8), strict=True))),
        ("multiplicities", (8, 1, 4, 3, 8), None),  # in steps of 2
        ("sizes", (8, 1, 4, 3, 8), None),
    ],
)
def test_a_split_has_a_place_where_the_space_contains_it(tmp_path, space, split, combination):
    config = with_overrides(QUICKSTART, {"representation.dim": 32})
    if space == "sizes":
        space = str(tmp_path / "space.toml")
        Path(space).write_text('"model.hidden_size" = {choices = [96, 192]}')
    chooser = Chooser(config, read_space(space, config))
    found = chooser.place(dict(zip(IRREPS, split, strict=True)))
    if combination and RATE in combination:
        combination |= {RATE: config.optimizer.learning_rate}
    assert found == combination
    assert not chooser.seen
    assert found is None or chooser.accept(found)


def test_sizes_are_checked_before_a_trial(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text('"model.num_heads" = {choices = [4, 5]}')
    chooser = Chooser(QUICKSTART, read_space(str(path), QUICKSTART))
    assert chooser.list_possible() == [{"model.num_heads": 4}]


def test_multiplicities_take_what_is_left():
    space = read_space("multiplicities", QUICKSTART)
    names = [key.rpartition(".")[2] for key in space.distributions]
    assert names == ["a2", "b1", "b2", "e"]
    combination = dict(zip(space.distributions, (2, 4, 6, 5), strict=True))
    config = apply_combination(QUICKSTART, combination)
    assert config.representation.multiplicities == (10, 2, 4, 6, 5)


def test_multiplicities_take_what_is_left_of_searched_channels():
    combination = {"representation.dim": 64} | dict(zip(COPIES, (2, 4, 6, 5), strict=True))
    representation = build_representation(apply_combination(QUICKSTART, combination))
    assert (representation.dim, representation.multiplicities["a1"]) == (64, 42)


def test_a_file_says_values(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text(
        """
        optimizer.learning_rate = {low = 1e-3, high = 1e-2, log = true}
        "model.level" = {choices = ["exact", "objective"]}
        "representation.rotation_dims" = {low = 0, high = 16, step = 8}
        training.precision = ["fp32", "bf16"]
        """
    )
    space = read_space(str(path), QUICKSTART)
    assert space.describe() == {
        "optimizer.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
        "model.level": {"choices": ["exact", "objective"]},
        ROTATION: {"low": 0, "high": 16, "log": False, "step": 8},
        "training.precision": {"choices": ["fp32", "bf16"]},
    }
    assert not space.is_finite  # there is no end of learning rates
    del space.distributions["optimizer.learning_rate"]
    values = (["exact", "objective"], [0, 8, 16], ["fp32", "bf16"])
    assert space.is_finite
    assert list(space.combinations) == [
        dict(zip(space.distributions, chosen, strict=True)) for chosen in itertools.product(*values)
    ]


@pytest.mark.parametrize(
    ("key", "more", "values"),
    [
        ("optimizer.weight_decay", "", None),
        ("optimizer.weight_decay", ", step = 0.25", [0.0, 0.25, 0.5, 0.75, 1.0]),
        (CHIRALITY, ", step = 1", [0.0, 1.0]),
        (CHIRALITY, "", None),
        ("optimizer.warmup_steps", "", [0, 1]),
    ],
)
def test_whole_bounds_of_a_fraction_are_a_range_of_fractions(tmp_path, key, more, values):
    path = tmp_path / "space.toml"
    path.write_text(f'"{key}" = {{low = 0, high = 1{more}}}')
    space = read_space(str(path), QUICKSTART)
    assert space.is_finite == (values is not None)
    assert values is None or [combination[key] for combination in space.combinations] == values


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('"model.widht" = [1]', "model.widht"),
        ('"model.hidden_siz" = [64]', "did you mean 'model.hidden_size'"),
        ('"training.steps" = [100, 200]', "training.steps"),
        ('"ray.num_workers" = [1, 2]', "same data, steps, seed and resources"),
        ('"model.depth" = {low = 4, high = 2}', "model.depth"),
        ('"model.depth" = {low = 1}', "low and high"),
        ('"model.depth" = []', "choices"),
        ('"representation.multiplicities" = [[4, 0, 0, 0, 0]]', "numbers, texts"),
        ('"representation.multiplicities.a2" = [0, 1]', "takes the remaining channels"),
        ("model.depth = ", "Invalid value"),
        ("", "empty"),
    ],
)
def test_a_wrong_file_is_refused_by_its_line(tmp_path, text, complaint):
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")) as refusal:
        read_space(str(path), QUICKSTART)
    assert str(path) in str(refusal.value)


def test_an_unknown_space_names_the_known_ones():
    with pytest.raises(ValueError, match="splits.*" + ", ".join(NAMED_SPACES)):
        read_space("splits", QUICKSTART)


@pytest.mark.parametrize("more", ["", "optimizer.learning_rate = {low = 0.001, high = 0.002}"])
def test_an_impossible_space_says_why(tmp_path, more):
    path = tmp_path / "space.toml"
    path.write_text(f"representation.rotation_dims = [3, 5]\n{more}")
    with pytest.raises(ValueError, match=r"none of its combinations.*2 were.*even number"):
        Chooser(QUICKSTART, read_space(str(path), QUICKSTART)).list_possible()


def test_the_size_of_the_latent():
    config = with_overrides(
        Config(), {"data.resolution": (32, 64), "representation.group": "flips"}
    )
    assert count_latent(config) == 32 * 4 * 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"trials": 0},
        {"objectives": ()},
        {"objectives": ("psnr", "psnr")},
        {"first_rung": 1.0},
        {"finalists": -1},
        {"search": "bayes"},
    ],
)
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(SweepConfig(), **wrong)


def test_a_validation_must_come_before_the_first_rung():
    with pytest.raises(ValueError, match=r"training.evaluation_interval=500.*lower it to 200"):
        check_settings(with_overrides(QUICKSTART, {"training.steps": 800}), SweepConfig(), SPLITS)
    check_settings(PRESETS["quickstart_trial"][1], SweepConfig(), SPLITS)


def test_the_sizes_of_a_model_that_trials_start_from_are_not_searched(tmp_path):
    config = with_overrides(PRESETS["quickstart_trial"][1], {"start.model": "builtin:openmoji-32"})
    with pytest.raises(ValueError, match=r"representation\.rotation_dims.* are those of start"):
        check_settings(config, SweepConfig(), SPLITS)
    pretrained = {"start.model": "diffusers:/vae", "start.action": "split"}
    config = with_overrides(PRESETS["fine_tune"][1], pretrained)
    check_settings(config, SweepConfig(), SPLITS)
    path = tmp_path / "space.toml"
    path.write_text('"model.downsampling" = [4, 8]\n"representation.dim" = [4, 8]\n')
    with pytest.raises(ValueError, match=r"downsampling, repr.*\.dim.* read from the autoencoder"):
        check_settings(config, SweepConfig(), read_space(str(path), config))


@pytest.mark.parametrize("objective", OF_GRIDS)
def test_spatial_objectives_need_a_grid(tmp_path, objective):
    config = PRESETS["quickstart_trial"][1]
    settings = SweepConfig(objectives=("psnr", objective))
    check_settings(config, settings, SPLITS)
    path = tmp_path / "space.toml"
    path.write_text('"model.downsampling" = [8, 32]')
    space = read_space(str(path), config)
    with pytest.raises(ValueError, match=rf"{objective} needs .*downsampling=32 leaves 1 x 1"):
        check_settings(config, settings, space)
    check_settings(config, SweepConfig(objectives=("velocity_irreducible_variance",)), space)
