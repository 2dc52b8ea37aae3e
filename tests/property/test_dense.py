"""The dense export is the same function, in layers without a group, whose weights are free."""

import pytest
import torch
from torch import nn

from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.export_dense import to_dense
from efae.model.objective import Objective
from efae.model.octic import layers as octic
from efae.symmetry import GROUPS

SIZES = {
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.mlp_ratio": 2,
    "representation.dim": 8,
}
# What each group can carry: (A1, A2, B1, B2, E).
MULTIPLICITIES = {
    "D4": (3, 1, 1, 1, 1),
    "C4": (4, 0, 2, 0, 1),
    "flips": (3, 1, 0, 0, 2),
    "mirror": (5, 3, 0, 0, 0),
    "trivial": (8, 0, 0, 0, 0),
}
# Resolution, patch, downsampling: latent grids 4x4, 2x2 and 1x1, ratios 1, 2 and 4.
GRIDS = {
    "4x4, ratio 1": (16, 4, 4),
    "2x2, ratio 2": (16, 4, 8),
    "1x1, ratio 4": (16, 4, 16),
    "2x2, ratio 1": (16, 8, 8),
    "1x1, ratio 1": (8, 8, 8),
    "4x4, ratio 2": (16, 2, 4),
}
UNET = {
    "model.kind": "unet",
    "model.start": "closed_form",
    "model.bottleneck": "running",
    "model.fine_hidden_size": 16,
    "model.attention_depth": 1,
}
every_group = pytest.mark.parametrize("group", GROUPS)


def build(group="D4", grid=(16, 4, 8), **overrides):
    """A model with random weights everywhere, also where training starts from zero."""
    resolution, patch, downsampling = grid
    config = with_overrides(
        Config(),
        {
            **SIZES,
            "representation.group": group,
            "representation.multiplicities": MULTIPLICITIES[group],
            "data.resolution": resolution,
            "model.patch_size": patch,
            "model.downsampling": downsampling,
            **overrides,
        },
    )
    model = Autoencoder(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    nn.init.uniform_(model.bottleneck.power, 0.5, 2, generator=generator)
    return model


def draw_inputs(model):
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    image = torch.randn(
        3, model.config.data.channels, *model.config.data.image_size, generator=generator
    )
    x_t = torch.randn(image.shape, generator=generator)
    return image.to(dtype), x_t.to(dtype), torch.rand(3, generator=generator).to(dtype)


@torch.no_grad()
def run(model, image, x_t, t):
    latent = model.encode(image)
    return latent, model.velocity(x_t, t, latent)


def error(a, b):
    return float((a - b).norm() / b.norm())


def assert_same_function(model, tolerance):
    inputs = draw_inputs(model)
    exact, dense = run(model, *inputs), run(to_dense(model), *inputs)
    for name, expected, found in zip(("latent", "velocity"), exact, dense, strict=True):
        assert error(found, expected) <= tolerance, name


@every_group
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_export_computes_the_same(group, grid):
    assert_same_function(build(group, grid).double(), 1e-10)


@every_group
@pytest.mark.parametrize("kind", [{}, UNET], ids=["transformer", "unet"])
def test_the_export_computes_the_same_with_a_shared_modulation(group, kind):
    assert_same_function(build(group, **kind, **{"model.modulation": "shared"}).double(), 1e-10)


@pytest.mark.parametrize(
    ("group", "grid"),
    [*(("D4", grid) for grid in GRIDS.values()), *((group, (16, 4, 8)) for group in GROUPS)],
    ids=str,
)
def test_the_export_of_a_unet_computes_the_same(group, grid):
    model = build(group, grid, **UNET, **{"flow.condition_drop": 0.1}).double()
    assert_same_function(model, 1e-10)
    _, x_t, t = draw_inputs(model)
    with torch.no_grad():
        exact, dense = (m.velocity(x_t, t, None) for m in (model, to_dense(model)))
    assert error(dense, exact) <= 1e-10


@pytest.mark.parametrize("group", ["flips", "mirror", "trivial"])
def test_the_export_computes_the_same_on_oblong_images(group):
    assert_same_function(build(group, ((16, 32), 4, 8)).double(), 1e-10)


BUCKETS = {"data.buckets": ((16, 32), (32, 16))}


@pytest.mark.parametrize(
    ("resolution", "settings"),
    [(16, BUCKETS), (16, UNET | BUCKETS), ((16, 32), UNET)],
    ids=["transformer, buckets", "unet, buckets", "unet"],
)
def test_models_of_rectangles_under_quarter_turns_are_exported(resolution, settings):
    assert_same_function(build("D4", (resolution, 4, 8), **settings).double(), 1e-10)


@every_group
def test_the_export_computes_the_same_in_single_precision(group):
    assert_same_function(build(group), 1e-5)


@every_group
def test_decoding_and_the_action_on_latents_are_the_same(group):
    model = build(group).double()
    dense = to_dense(model)
    image, noise, _ = draw_inputs(model)
    for g in model.group:
        decoded = [
            m.decode(m.act(g, m.encode(image)), steps=3, noise=noise) for m in (model, dense)
        ]
        assert error(*decoded) <= 1e-10


@every_group
def test_the_null_condition_is_the_same(group):
    model = build(group, **{"flow.condition_drop": 0.1}).double()
    dense = to_dense(model)
    image, x_t, t = draw_inputs(model)
    with torch.no_grad():
        latent = model.encode(image)
        for keep in ([False] * 3, [True, False, True]):
            exact, found = (m.decoder(x_t, t, latent, torch.tensor(keep)) for m in (model, dense))
            assert error(found, exact) <= 1e-10


@every_group
def test_the_kl_bottleneck_is_the_same(group):
    model = build(group, **{"model.bottleneck": "kl"}).double()
    assert_same_function(model, 1e-10)
    spreads = [m.bottleneck.log_variance for m in (model, to_dense(model))]
    assert torch.equal(*spreads)


@every_group
def test_other_image_sizes_than_its_own_are_decoded_the_same(group):
    model = build(group).double()
    dense = to_dense(model)
    generator, t = torch.Generator().manual_seed(2), torch.tensor([0.5], dtype=torch.float64)
    latent, x_t = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 8, 3, 3), (1, 3, 24, 24))
    )
    with torch.no_grad():
        exact, found = (m.velocity(x_t, t, latent) for m in (model, dense))
    assert error(found, exact) <= 1e-10


@every_group
def test_the_export_is_a_plain_dense_model(group):
    model = build(group)
    dense = to_dense(model)
    assert dense.config == with_overrides(model.config, {"model.level": "objective"})
    layouts = [module.layout for module in dense.modules() if hasattr(module, "layout")]
    assert layouts
    assert all(len(layout.group) == 1 for layout in layouts)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in dense.parameters()}
    assert not dense.training
    assert to_dense(model.double().train()).training


@every_group
def test_no_weight_of_the_export_is_left_at_random(group):
    model = build(group)
    torch.manual_seed(1)
    first = to_dense(model).state_dict()
    torch.manual_seed(2)
    second = to_dense(model).state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def broken_symmetry(model):
    """The largest relative errors of encoder and decoder over the group."""
    image, x_t, t = draw_inputs(model)
    latent, velocity = run(model, image, x_t, t)
    worst = (0.0, 0.0)
    for g in model.group:
        with torch.no_grad():
            moved = model.encode(g.act_on_image(image))
            answer = model.velocity(g.act_on_image(x_t), t, model.act(g, latent))
        found = (error(moved, model.act(g, latent)), error(answer, g.act_on_image(velocity)))
        worst = tuple(map(max, worst, found))
    return worst


@pytest.mark.parametrize("group", ["D4", "C4", "flips", "mirror"])
def test_a_weight_of_the_export_is_free(group):
    """Equivariance now rests on the values of the weights alone: one of them breaks it."""
    dense = to_dense(build(group).double())
    assert max(broken_symmetry(dense)) <= 1e-6
    linears = [m for m in dense.modules() if isinstance(m, octic.Linear)]
    with torch.no_grad():
        for linear in (linears[0], linears[-1]):  # of the encoder, and of the decoder
            linear.coefficient[0, 1, 2] += 1
    encoder, decoder = broken_symmetry(dense)
    assert encoder >= 1e-4  # a weight of the queries: it matters less
    assert decoder >= 1e-3


def test_the_export_can_be_trained():
    model = to_dense(build(**{"flow.condition_drop": 0.5})).train()
    image = draw_inputs(model)[0].repeat(4, 1, 1, 1)  # enough to keep some conditions, drop some
    loss, _ = Objective(model)(image, torch.Generator().manual_seed(0))
    loss.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("level", ["regularized", "objective", "none"])
def test_a_dense_model_is_refused(level):
    with pytest.raises(ValueError, match=f"model.level='{level}'.*level 'exact'"):
        to_dense(build(**{"model.level": level}))
