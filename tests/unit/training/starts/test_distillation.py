"""Distillation into one step: the loss, what stays the teacher's, and who may be a teacher."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from efae.checkpoints.checkpoint import CheckpointError, read_checkpoint
from efae.checkpoints.run_folder import locate_run
from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.objective import Objective, draw
from efae.preflight.driver_checks import RunData, check_source, list_checks
from efae.tracking.server import Server
from efae.training.loop import Start, train
from efae.training.process import Process
from efae.training.starts.distillation import make_sampler
from efae.training.starts.source import copy_source, load_source, start_from
from efae.training.state import TrainState
from tests.unit.training.test_training import TINY, Keeper, assert_same_state

CPU = torch.device("cpu")
ALONE = Process(CPU)
NOWHERE = Server("")
UNET = {
    "model.kind": "unet",
    "model.start": "closed_form",
    "model.bottleneck": "running",
    "model.fine_hidden_size": 8,
}
IMAGE = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def configure(**overrides):
    return with_overrides(Config(), TINY | {"flow.distill_from": "a teacher"} | overrides)


def make_teacher(**overrides):
    """A frozen model whose weights are random everywhere, also where training starts from zero."""
    model = Autoencoder(with_overrides(Config(), TINY | overrides))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.any() or name == "bottleneck.power":
            nn.init.uniform_(parameter, 0.1, 0.2, generator=generator)
    return model.eval().requires_grad_(False)


def make_objective(teacher, **overrides):
    config = configure(**overrides)
    state = TrainState.create(config, CPU)
    start_from(state, teacher)
    return Objective(state.model.train(), None, make_sampler(teacher, config, ALONE))


def is_learned(name):
    """Whether a parameter is one of the decoder's weights, not a statistic of the images."""
    return name.startswith("decoder.") and name != "decoder.residual_power"


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.level": "objective", "flow.prediction": "velocity"},
        {"model.level": "regularized", "representation.learned_basis": True},
        {
            "model.bottleneck": "kl",
            "representation.dim": 11,
            "representation.multiplicities": (4, 1, 1, 1, 2),
            "loss.rotation_probability": 0.5,
        },
        UNET | {"model.start": "random", "loss.scaling_probability": 1.0},
    ],
    ids=str,
)
def test_a_copy_of_a_teacher_of_one_step_has_nothing_to_learn(overrides):
    teacher = make_teacher(**overrides)
    generator = torch.Generator().manual_seed(0)
    loss, t = make_objective(teacher, **overrides, **{"flow.distill_steps": 1})(IMAGE, generator)
    assert loss.abs().max() < 1e-10
    assert t.tolist() == [1, 1, 1]
    objective = make_objective(teacher, **overrides, **{"flow.distill_steps": 2})
    loss, _ = objective(IMAGE, generator)
    assert loss.min() > 1e-6
    loss.mean().backward()
    for name, parameter in objective.model.named_parameters():
        assert (parameter.grad is not None) == is_learned(name), name


@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_noise_chooses_the_sample_of_a_student_alone(kind):
    """From the closed form, one step of a flow shows the mean, whatever the noise."""
    overrides = UNET | {"model.kind": kind}
    teacher = make_teacher(**overrides)
    student = make_objective(teacher, **overrides).model
    latent = teacher.encode(IMAGE)
    for model in (teacher, student):
        first, second = (model.decode(latent, steps=1, seed=seed) for seed in (0, 1))
        assert torch.allclose(first, second, atol=1e-6) == (model is teacher)


def test_all_views_of_an_image_have_one_loss():
    torch.manual_seed(0)
    guided = {"flow.condition_drop": 0.1, "flow.guidance_scale": 2.0}
    objective = make_objective(make_teacher(**guided), **{"flow.distill_steps": 3})
    model = objective.model
    draws = draw(model.config, tuple(IMAGE.shape), torch.Generator().manual_seed(0))
    loss, _ = objective(IMAGE, draws)
    for g in model.group:
        turned = replace(
            draws,
            noise=g.act_on_image(draws.noise),
            latent_noise=model.act(g, draws.latent_noise),
        )
        assert torch.allclose(objective(g.act_on_image(IMAGE), turned)[0], loss, rtol=1e-4)
        if g.name != "identity":
            assert not torch.allclose(objective(g.act_on_image(IMAGE), draws)[0], loss, rtol=1e-4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    output = tmp_path_factory.mktemp("shards") / "set"
    build_shards(f"folder:{folder}", str(output), samples_per_shard=6)
    return str(output)


@pytest.mark.parametrize("overrides", [{}, UNET], ids=["transformer", "unet"])
def test_the_latent_stays_the_teachers_and_a_resumed_run_is_the_uninterrupted_one(
    shards, tmp_path, overrides
):
    teacher = make_teacher(**overrides)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    options = {"training.steps": 4, "training.checkpoint_interval": 2, "flow.distill_steps": 2}
    options |= {"training.global_batch_size": 7, "training.micro_batch_size": 3}
    config = configure(**overrides, **options)
    dataset = ShardDataset.open(shards)
    whole = train(config, dataset, ALONE, Start(source=teacher), Keeper(config, tmp_path))
    for name, parameter in whole.model.named_parameters():
        learned = is_learned(name)
        assert torch.equal(before[name], teacher.state_dict()[name]), name
        assert torch.equal(before[name], parameter) != learned, name
        assert torch.equal(before[name], whole.average.weights[name]) != learned, name
    halfway = read_checkpoint(tmp_path / "step-00000002")
    assert halfway.model.keys() == dict(whole.model.named_parameters()).keys()
    assert_same_state(train(config, dataset, ALONE, Start(halfway, source=teacher)), whole)
    with pytest.raises(ValueError, match=r"a teacher: load the model"):
        train(config, dataset, ALONE)


def test_a_decoder_of_another_size_begins_with_the_linear_path_alone():
    teacher = make_teacher(**UNET)
    with torch.no_grad():
        teacher.decoder.residual_power.copy_(torch.tensor([0.1, 0.2]))
    state = TrainState.create(configure(**UNET, **{"model.hidden_size": 64}), CPU)
    fresh = state.model.decoder.output.coefficient.clone()
    start_from(state, teacher)
    assert torch.equal(state.model.encode(IMAGE), teacher.encode(IMAGE))
    for name in ("linear_path.free", "residual_power", "output.coefficient"):
        same = torch.equal(
            state.model.decoder.get_parameter(name), teacher.decoder.get_parameter(name)
        )
        assert same == (name != "output.coefficient")
    assert torch.equal(state.model.decoder.output.coefficient, fresh)
    assert torch.equal(
        state.average.weights["decoder.linear_path.free"], teacher.decoder.linear_path.free
    )


def test_a_run_keeps_the_teacher_that_it_began_with(tmp_path):
    source, first, second = tmp_path / "source", make_teacher(), make_teacher()
    second.decoder.output.coefficient += 1
    names = {"ray.storage_uri": f"{tmp_path}/runs", "tracking.run_name": "mine"}
    config = configure(**names, **{"flow.distill_from": str(source)})

    def is_used(teacher):
        copy_source(config, NOWHERE)
        used = load_source(config, ALONE)
        assert not used.training
        assert not any(p.requires_grad for p in used.parameters())
        return torch.equal(used.decoder.output.coefficient, teacher.decoder.output.coefficient)

    first.save_pretrained(source)
    assert is_used(first)
    second.save_pretrained(source)
    assert is_used(second)
    keeper = Keeper(config, locate_run(config).path)
    keeper.save(TrainState.create(config, CPU), {"scores": {}, "position": {}})
    keeper.wait()
    first.save_pretrained(source)
    assert is_used(second)
    assert check_source(config, NOWHERE) == f"{tmp_path}/runs/mine/source"
    (tmp_path / "runs/mine/source/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"mine/source: config\.json is missing"):
        check_source(config, NOWHERE)


def test_a_teacher_that_does_not_fit_is_refused_before_the_run(tmp_path):
    where = {"ray.storage_uri": f"{tmp_path}/runs", "flow.distill_from": f"{tmp_path}/teacher"}
    with pytest.raises(ValueError, match="no model or checkpoint at"):
        dict(list_checks(configure(**where), RunData(Config().data), NOWHERE))["starting model"]()
    make_teacher().save_pretrained(tmp_path / "teacher")
    own = {"model.hidden_size": 64, "model.depth": 3, "model.latent_noise": 0.1}
    assert check_source(configure(**where, **own), NOWHERE) == f"{tmp_path}/teacher"
    other = {"model.encoder_depth": 2, "representation.group": "C4", "data.resolution": 32}
    with pytest.raises(ValueError, match=r"has another encoder") as refusal:
        check_source(configure(**where, **own, **other), NOWHERE)
    for difference in (
        "data.resolution: 16 -> 32",
        "representation.group: 'D4' -> 'C4'",
        "model.encoder_depth: 1 -> 2",
    ):
        assert difference in str(refusal.value)
    assert "depth: 2 -> 3" not in str(refusal.value)
    # A unet has no size; and what the teacher itself started from is not the student's concern.
    make_teacher(**UNET, **{"start.model": "b", "start.train": "decoder"}).save_pretrained(
        tmp_path / "teacher"
    )
    larger = configure(**where, **UNET, **{"data.resolution": 32})
    assert check_source(larger, NOWHERE) == f"{tmp_path}/teacher"


def test_options_of_distillation():
    assert Config().flow.default_steps == 4
    assert configure().flow.default_steps == 1
    assert configure(**{"flow.sampler_steps": 2}).flow.default_steps == 2
    for overrides, message in (
        ({"flow.condition_drop": 0.1}, r"flow\.condition_drop=0\.1 with flow\.distill_from"),
        ({"training.compile": "step"}, r"training\.compile=step with flow\.distill_from"),
        ({"flow.distill_steps": 0}, r"flow\.distill_steps=0: must be positive"),
        ({"flow.sampler_steps": 0}, r"flow\.sampler_steps=0: must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            configure(**overrides)
