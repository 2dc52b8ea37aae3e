"""The laws of a generator: its velocity and its normalisation commute with the group; guidance."""

from dataclasses import replace

import pytest
import torch

from data_pipelines.shards.latent_format import LatentFormat
from efae.config import GeneratorConfig
from efae.config.forms import with_overrides
from efae.generation.network import Generator
from efae.generation.normalization import Normalization
from efae.generation.objective import GeneratorObjective, draw
from efae.generation.sampling import Guidance, sample_latents
from efae.symmetry import D4, GROUPS, TRIVIAL, Representation

COUNT, CLASSES = 3, 5


def build(
    group: str = "D4", cells: tuple[int, int] = (4, 4), difference: float = 0.0, **overrides
) -> Generator:
    """A generator whose every weight matters, in float64."""
    counts = {"a1": 3, "a2": 0, "b1": 2, "b2": 1, "e": 2 if GROUPS[group].turns else 0}
    form = LatentFormat(
        shape=[Representation(GROUPS[group], **counts).dim, *cells],
        dtype="float32",
        group=group,
        multiplicities=counts,
        model_digest="0" * 64,
        model_uri="nowhere",
        certificate={"max_abs_difference": difference},
    )
    sizes = {
        "generator.hidden_size": 48,
        "generator.num_heads": 2,
        "generator.depth": 2,
        "generator.equivariant": True,
        "data.classes": CLASSES,
        "data.format": form.model_dump_json(),
    }
    torch.manual_seed(0)
    model = Generator(with_overrides(GeneratorConfig(), sizes | overrides)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def make_input(model: Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(COUNT, *model.shape, dtype=torch.float64),
        torch.rand(COUNT, dtype=torch.float64),
        torch.tensor([0, CLASSES - 1, CLASSES]),
    )


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("group", ["D4", "C4", "flips", "mirror"])
def test_the_equivariant_network_commutes_with_every_element(group, patch_size):
    cells = (4, 4) if GROUPS[group].swaps_sides else (2, 6)
    model = build(group, cells, **{"generator.patch_size": patch_size})
    x_t, t, label = make_input(model)
    output = model(x_t, t, label)
    assert output.std() > 0.01
    for g in GROUPS[group]:
        acted = model(model.representation.act(g, x_t), t, label)
        difference = (acted - model.representation.act(g, output)).abs().max()
        assert difference < 1e-9 * output.abs().max(), g


@pytest.mark.parametrize("group", ["D4", "C4", "mirror"])
def test_dense_last_blocks_tell_views_apart(group):
    model = build(group, **{"generator.dense_blocks": 1, "data.views": 0.5})
    x_t, t, label = make_input(model)
    output = model(x_t, t, label)
    for g in GROUPS[group]:
        acted = model(model.representation.act(g, x_t), t, label)
        same = torch.allclose(acted, model.representation.act(g, output), atol=1e-3)
        assert same == (g.name == "identity"), g


def test_samples_of_the_equivariant_network_move_with_their_noise():
    model = build()
    noise, _, label = make_input(model)
    guidance = Guidance(3, 2.0, (0.2, 0.9))
    sample = sample_latents(model, noise, label, guidance)
    for g in D4:
        acted = sample_latents(model, model.representation.act(g, noise), label, guidance)
        assert torch.allclose(acted, model.representation.act(g, sample), atol=1e-9), g


def test_every_condition_matters_and_the_dense_network_knows_its_view():
    model = build(**{"generator.equivariant": False, "data.views": 0.5})
    x_t, t, label = make_input(model)
    zero = torch.zeros(COUNT, dtype=torch.long)
    output = model(x_t, t, label, zero)
    assert torch.equal(model(x_t, t, label), output)  # the identity's view
    assert torch.equal(model(x_t, t), model(x_t, t, torch.full_like(label, CLASSES)))
    for other in (
        model(x_t, t / 2, label),
        model(x_t, t, zero + 1),
        model(x_t, t, label, zero + 3),
    ):
        assert (other - output).abs().amax((1, 2, 3)).min() > 1e-3
    moved = model(x_t.roll(1, -1), t, label).roll(-1, -1)
    assert (moved - output).abs().max() > 1e-3  # positions matter


@pytest.mark.parametrize("group", ["D4", "flips", "trivial"])
def test_normalization_commutes_and_has_unit_power(group):
    counts = {"a1": 3, "a2": 1, "b1": 2, "b2": 1, "e": 2 if GROUPS[group].turns else 0}
    representation = Representation(GROUPS[group], **counts)
    scales = torch.linspace(0.2, 3, representation.dim)[:, None, None]
    latent = scales * torch.randn(64, representation.dim, 4, 4)
    latent[:, :3] += torch.tensor([1.0, -2.0, 0.5])[:, None, None]
    normalization = Normalization(representation)
    normalization.fit(latent.split(10))
    normal = normalization.normalize(latent)
    for block in representation.blocks.values():
        assert normal[:, block].square().mean().sqrt() == pytest.approx(1, abs=1e-5)
    assert normal[:, :3].mean((0, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(normalization.denormalize(normal), latent, atol=1e-5)
    for g in GROUPS[group]:
        acted = normalization.normalize(representation.act(g, latent))
        assert torch.equal(acted, representation.act(g, normal)), g


def test_guidance_is_between_and_beyond_both_fields():
    model = build(**{"flow.sampler": "euler"})
    noise, _, label = make_input(model)
    label = label.clamp(max=CLASSES - 1)
    once, null = Guidance(1), torch.full_like(label, CLASSES)
    given, without = (sample_latents(model, noise, y, once) for y in (label, null))
    assert torch.allclose(sample_latents(model, noise, label, Guidance(1, 0.0)), without)
    twice = sample_latents(model, noise, label, Guidance(1, 2.0))
    assert torch.allclose(twice, 2 * given - without)
    late = sample_latents(model, noise, label, Guidance(1, 2.0, (0.0, 0.5)))
    assert torch.equal(late, given)  # the only step is at t = 1
    for other, labels in ((model, None), (build(**{"flow.condition_drop": 0.0}), label)):
        with pytest.raises(ValueError, match=r"guidance 2\.0: it needs labels"):
            sample_latents(other, noise, labels, Guidance(1, 2.0))


def test_draws_act_on_the_chosen_share_and_drop_the_chosen_share():
    overrides = {"data.views": 0.25, "data.classes": CLASSES, "flow.condition_drop": 0.5}
    config = with_overrides(GeneratorConfig(), overrides)
    label, shape = torch.zeros(4000, dtype=torch.long), (4000, 1, 1, 1)
    draws = draw(config, shape, label, "D4", torch.Generator().manual_seed(0))
    moved = (draws.element != 0).float().mean()
    assert moved == pytest.approx(0.25 * 7 / 8, abs=0.02)
    assert draws.element.unique().tolist() == list(range(8))
    assert (draws.label == CLASSES).float().mean() == pytest.approx(0.5, abs=0.03)
    config = with_overrides(config, {"data.views": 0.0, "flow.condition_drop": 0.0})
    draws = draw(config, shape, label, "D4", torch.Generator().manual_seed(0))
    assert draws.element is None
    assert torch.equal(draws.label, label)


def test_all_views_of_a_latent_have_one_loss_if_the_network_is_equivariant():
    model = build()
    objective = GeneratorObjective(model)
    latent, _, label = make_input(model)
    generator = torch.Generator().manual_seed(0)
    draws = draw(model.config, tuple(latent.shape), label, "D4", generator)
    loss, t = objective(latent, draws)
    assert torch.equal(t, draws.t)
    for g in D4:
        moved = type(draws)(draws.t, model.representation.act(g, draws.noise), draws.label)
        acted, _ = objective(model.representation.act(g, latent), moved)
        assert torch.allclose(acted, loss, rtol=1e-5), g


def test_a_view_has_the_loss_of_the_acted_latent_and_the_network_is_told():
    model = build(**{"generator.equivariant": False, "data.views": 0.5})
    objective = GeneratorObjective(model)
    latent, _, label = make_input(model)
    generator = torch.Generator().manual_seed(0)
    draws = draw(model.config, tuple(latent.shape), label, "D4", generator)
    assert model.element is not None
    table = model.element.weight.clone()
    for number, g in enumerate(D4):
        view = replace(draws, element=torch.full_like(label, number))
        model.element.weight.copy_(table)
        told, _ = objective(latent, view)
        model.element.weight.copy_(table[:1].expand_as(table))  # as if all were the identity
        seen, _ = objective(latent, view)
        upright = replace(draws, element=torch.zeros_like(label))
        acted, _ = objective(model.representation.act(g, latent), upright)
        assert torch.allclose(seen, acted, rtol=1e-5), g
        assert torch.allclose(told, seen, rtol=1e-5) == (g == D4.identity), g


def test_sizes_that_do_not_fit_are_refused():
    for overrides, what in (
        ({"generator.patch_size": 3}, "does not divide the 4 x 4 latents"),
        ({"data.format": ""}, "data.format=''"),
    ):
        with pytest.raises(ValueError, match=what):
            build(**overrides)
    for options in ({}, {"generator.equivariant": False, "data.views": 0.5}):
        option = r"data\.views=0\.5" if options else r"generator\.equivariant=True"
        with pytest.raises(ValueError, match=f"{option}: .*trivial group, so nothing acts"):
            build("trivial", **options)
        with pytest.raises(ValueError, match=f"{option}: quarter turns"):
            build("D4", (4, 6), **options)
        with pytest.raises(ValueError, match=f"{option}: .* differ by up to 0.5"):
            build(difference=0.5, **options)
    assert build("trivial", **{"generator.equivariant": False}).layout.group == TRIVIAL
