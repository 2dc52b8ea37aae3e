"""Runs that begin with the weights of one of our models: what they keep, change and refuse."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from efae.checkpoints.checkpoint import read_checkpoint, read_model
from efae.checkpoints.run_folder import locate_run
from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.preflight.driver_checks import RunData, check_source, list_checks
from efae.training.loop import Start, train
from efae.training.starts.source import check_start, copy_source, describe_source, load_source
from efae.training.state import TrainState
from efae.training.tasks import choose_task
from tests.unit.training.starts.test_distillation import (
    ALONE,
    CPU,
    NOWHERE,
    UNET,
    is_learned,
    make_teacher,
)
from tests.unit.training.test_training import TINY, Keeper, assert_same_state

SMALL = TINY | UNET | {"model.downsampling": 4, "data.resolution": 8, "training.steps": 4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, output = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards") / "set"
    for i in range(16):
        shape = ((16, 16), (16, 32))[i % 2]
        pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    build_shards(f"folder:{folder}", str(output), samples_per_shard=6)
    return str(output)


@pytest.fixture(scope="module")
def checkpoint(shards, tmp_path_factory):
    """A checkpoint of a run at 8 px, in batches of 8."""
    folder = tmp_path_factory.mktemp("small")
    config = with_overrides(Config(), SMALL | {"optimizer.ema_decay": 0.5})
    train(config, ShardDataset.open(shards), ALONE, observer=Keeper(config, folder))
    return folder / "step-00000004"


def test_training_begins_with_the_averaged_weights_on_other_data_shapes_and_batches(
    shards, checkpoint, tmp_path
):
    other = {"data.buckets": ((16, 16), (16, 32)), "data.resolution": 16}
    other |= {"training.global_batch_size": 4, "training.checkpoint_interval": 2}
    where = {"ray.storage_uri": f"{tmp_path}/runs", "tracking.run_name": "large"}
    config = with_overrides(Config(), SMALL | other | where | {"start.model": str(checkpoint)})
    facts = choose_task(config).copy_source(NOWHERE)
    found = read_checkpoint(checkpoint)
    assert facts == {
        "source": str(checkpoint),
        "source_digest": read_model(str(checkpoint)).digest,
    }

    source, dataset = load_source(config, ALONE), ShardDataset.open(shards)
    state = TrainState.create(config, CPU)
    choose_task(config).begin(state, dataset, ALONE, source)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, found.ema[name]), name
        assert torch.equal(state.average.weights[name], found.ema[name]), name
    assert not torch.equal(found.ema["bottleneck.power"], found.model["bottleneck.power"])
    assert (state.step, dict(state.optimizer.state)) == (0, {})

    keeper = Keeper(config, locate_run(config).path)
    whole = train(config, dataset, ALONE, Start(source=source), keeper)
    halfway = read_checkpoint(locate_run(config).path / "step-00000002")
    assert_same_state(train(config, dataset, ALONE, Start(halfway)), whole)
    gone = with_overrides(config, {"start.model": f"{tmp_path}/gone"})
    assert check_source(gone, NOWHERE) == f"{tmp_path}/runs/large/source"  # the run's own copy
    copy_source(gone, NOWHERE)
    assert describe_source(config) == facts


def test_only_the_decoder_trains_where_latents_are_to_stay(shards, checkpoint):
    settings = {"start.model": str(checkpoint), "start.train": "decoder"}
    config = with_overrides(Config(), SMALL | settings)
    source = Autoencoder.restore(read_model(str(checkpoint)))
    state = train(config, ShardDataset.open(shards), ALONE, Start(source=source))
    for name, parameter in state.model.named_parameters():
        same = torch.equal(parameter, source.get_parameter(name))
        assert same != is_learned(name), name


def test_a_model_that_does_not_fit_is_refused_before_the_run(checkpoint, tmp_path):
    def refuse(message, **overrides):
        settings = SMALL | {"ray.storage_uri": f"{tmp_path}/runs"} | overrides
        config = with_overrides(Config(), settings)
        with pytest.raises(ValueError, match=message) as refusal:
            dict(list_checks(config, RunData(config.data), NOWHERE))["starting model"]()
        return str(refusal.value)

    refuse("no model or checkpoint at", **{"start.model": f"{tmp_path}/none"})
    refuse("no model 'builtin:none' comes with", **{"start.model": "builtin:none"})
    other = {"model.depth": 3, "model.latent_noise": 0.1, "representation.group": "C4"}
    other |= {"representation.rotation_dims": None, "flow.condition_drop": 0.1}
    text = refuse("belong to other settings", **{"start.model": str(checkpoint)}, **other)
    for part in (
        "(representation.group: 'D4' -> 'C4'; representation.rotation_dims: 4 -> None;",
        "model.depth: 2 -> 3; flow.condition_drop: 0.0 -> 0.1); give"
        " --representation.group D4 --representation.rotation-dims 4 --model.depth 2"
        " --flow.condition-drop 0.0",
    ):
        assert part in text
    make_teacher().save_pretrained(tmp_path / "transformer")
    text = refuse(
        "the learned positions of a transformer are those of one size, a unet takes any; give"
        r" --data.resolution 16$",
        **{"start.model": f"{tmp_path}/transformer"},
        **TINY | {"data.resolution": 32, "training.global_batch_size": 4},
        **{"model.kind": "transformer", "model.start": "random", "model.bottleneck": "rms"},
        **{"model.downsampling": 8, "model.fine_hidden_size": 64},
    )
    assert text.count(" -> ") == 1
    own = with_overrides(Config(), SMALL | {"start.model": "b"})
    vae = {"start.model": "diffusers:/vae", "model.start": "random"}
    foreign = with_overrides(own, vae | {"model.bottleneck": "posterior"})
    with pytest.raises(ValueError, match=r"name that one: --start\.model diffusers:/vae, or"):
        check_start(own, foreign)
    student = with_overrides(own, {"start.model": "", "flow.distill_from": "some/teacher"})
    assert student.model.has_linear_start
    with pytest.raises(ValueError, match=r"distilled into one step.*its teacher: some/teacher"):
        check_start(own, student)
    for settings, message in (
        ({"flow.distill_from": "a"}, "a student starts from its teacher"),
        ({"start.action": "fitted"}, "leave it at spatial"),
        ({"start.symmetrize": True}, "without an autoencoder of diffusers"),
        ({"model.bottleneck": "posterior"}, "no other encoder has a posterior"),
    ):
        with pytest.raises(ValueError, match=message):
            with_overrides(Config(), SMALL | {"start.model": "b"} | settings)
