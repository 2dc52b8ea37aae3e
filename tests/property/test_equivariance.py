"""Every octic layer commutes with every element; encoder and decoder are exact.

Weights are random everywhere, also where training starts from zero.
"""

import pytest
import torch
from torch import nn

from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.objective import Objective
from efae.model.octic import layers as octic
from efae.model.octic.layout import embed_invariant, layout_of, take_invariant
from efae.model.octic.token_grid import Resample
from efae.symmetry import D4, GROUPS, Representation

M = 6
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def randomize(module):
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=GENERATOR)
        else:  # the latent's power per irrep
            nn.init.uniform_(parameter, 0.3, 3, generator=GENERATOR)
    return module.double().eval()


def act_on_tokens(g, x, group=D4):
    """Regular features (slot, ..., coset * m), acted on by the definition: u becomes g u."""
    layout = layout_of(group)
    fourier = layout.fourier.double() / layout.fourier.double().norm(dim=1, keepdim=True)
    shift = torch.zeros(len(group), len(group), dtype=torch.float64)
    for i, u in enumerate(group):
        shift[group.index(g @ u), i] = 1
    features = x.unflatten(-1, (layout.cosets, -1)).movedim(-2, 1).flatten(0, 1)
    moved = torch.tensordot(fourier @ shift @ fourier.T, features, 1)
    return moved.unflatten(0, (layout.slots, layout.cosets)).movedim(1, -2).flatten(-2)


def act_on_token_grid(g, x, side, group=D4):
    moved = act_on_tokens(g, x, group).unflatten(2, (side, side))
    return g.act_on_image(moved.movedim(-1, 2)).movedim(2, -1).flatten(2, 3)


def draw_tokens(group, batch, tokens, m=M):
    layout = layout_of(group)
    return draw(layout.slots, batch, tokens, layout.cosets * m)


def assert_close(a, b, tolerance=1e-10):
    """Equal up to a relative error in the Euclidean norm."""
    assert (a - b).norm() <= tolerance * (1 + b.norm())


every_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)


@every_group
def test_fourier_is_orthogonal_and_elements_only_sign_and_permute(group):
    layout = layout_of(group)
    assert_close(layout.fourier @ layout.fourier.T, torch.eye(len(group)), 1e-6)
    basis = torch.eye(len(group), dtype=torch.float64)
    x = basis.view(layout.slots, layout.cosets, 1, -1).permute(0, 3, 2, 1)
    for g in group:
        moved = act_on_tokens(g, x, group).abs()
        assert set(moved.round(decimals=6).unique().tolist()) <= {0.0, 1.0}
        assert moved.sum() == pytest.approx(len(group))


@every_group
def test_linear_holds_every_equivariant_map(group):
    """The commutant of a regular representation has the group's order as dimension."""
    assert torch.linalg.matrix_rank(layout_of(group).ties.flatten(1)) == len(group)


LAYERS = {
    "linear": lambda group: octic.Linear(group, M, 2 * M),
    "linear without bias": lambda group: octic.Linear(group, M, M, bias=False),
    "nonlinearity": octic.Nonlinearity,
    "block": lambda group: octic.Block(group, M, num_heads=2, mlp_ratio=2),
}


@every_group
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_commute_with_the_group(group, layer):
    layer, x = randomize(LAYERS[layer](group)), draw_tokens(group, 3, 16)
    for g in group:
        moved = layer(act_on_token_grid(g, x, 4, group))
        assert_close(moved, act_on_token_grid(g, layer(x), 4, group))


def test_the_nonlinearity_is_not_linear():
    layer, x = randomize(octic.Nonlinearity(D4)), draw(4, 1, 2, 2 * M)
    assert (layer(-x) + layer(x)).abs().max() > 0.1


@every_group
def test_conditioned_block_commutes(group):
    block = randomize(octic.Block(group, M, num_heads=2, mlp_ratio=2, conditioning=5))
    x, condition = draw_tokens(group, 3, 16), draw(3, 5)
    for g in group:
        moved = block(act_on_token_grid(g, x, 4, group), condition)
        assert_close(moved, act_on_token_grid(g, block(x, condition), 4, group))


@every_group
def test_lift_and_back_intertwine(group):
    rho = Representation(group, a1=2, a2=1, b1=1, b2=1, e=2)
    lift = randomize(octic.Lift(group, *octic.latent_action(group, rho), M, fan_in=rho.dim))
    z, x = draw(3, 5, rho.dim), draw_tokens(group, 3, 5)
    for g in group:
        matrix = rho.matrix(g)
        assert_close(lift(z @ matrix.T), act_on_tokens(g, lift(z), group))
        assert_close(lift.back(act_on_tokens(g, x, group)), lift.back(x) @ matrix.T)


@every_group
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_resample_commutes_and_inverts(group, ratio):
    resample, x = Resample(group, ratio).double(), draw_tokens(group, 2, 64)
    merged = resample.merge(x, 8, 8)
    assert merged.shape == (*x.shape[:2], 64 // ratio**2, x.shape[-1] * ratio**2)
    assert_close(resample.split(merged, 8, 8), x, 1e-6)
    for g in group:
        moved = resample.merge(act_on_token_grid(g, x, 8, group), 8, 8)
        assert_close(moved, act_on_token_grid(g, merged, 8 // ratio, group), 1e-6)


@every_group
def test_invariants_survive(group):
    layout, x, values = layout_of(group), draw_tokens(group, 3, 1)[:, :, 0], draw(3, M)
    for g in group:
        acted = take_invariant(layout, act_on_tokens(g, x, group))
        assert_close(acted, take_invariant(layout, x))
        embedded = embed_invariant(layout, values)
        assert_close(act_on_tokens(g, embedded, group), embedded)


SIZES = {
    "model.hidden_size": 64,
    "model.encoder_hidden_size": 64,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.patch_size": 4,
    "representation.dim": 12,
    "representation.rotation_dims": 4,
}


def build(**overrides):
    config = with_overrides(Config(), SIZES | overrides)
    return randomize(Autoencoder(config))


IMAGES = {
    "generic": draw(2, 3, 32, 32),
    "mirror-symmetric": (lambda x: x + x.flip(-1))(draw(2, 3, 32, 32)),
    "fully symmetric": sum(g.act_on_image(x) for x in [draw(2, 3, 32, 32)] for g in D4),
    "constant": draw(2, 3, 1, 1).expand(2, 3, 32, 32),
}


def assert_exact(model, x):
    noise, t = draw(*x.shape), torch.tensor([0.3, 0.9]).double()
    with torch.no_grad():
        z = model.encode(x)
        velocity = model.velocity(noise, t, z)
        for g in model.group:
            assert_close(model.encode(g.act_on_image(x)), model.act(g, z))
            moved = model.velocity(g.act_on_image(noise), t, model.act(g, z))
            assert_close(moved, g.act_on_image(velocity))
    return z


@pytest.mark.parametrize("downsampling", [4, 8, 32], ids=["8x8", "4x4", "vector"])
@pytest.mark.parametrize("kind", IMAGES)
def test_exact_level_is_exact(downsampling, kind):
    z = assert_exact(build(**{"model.downsampling": downsampling}), IMAGES[kind])
    assert z.shape == (2, 12, 32 // downsampling, 32 // downsampling)


@pytest.mark.parametrize(
    ("group", "rotation_dims"), [("C4", 4), ("flips", 4), ("mirror", 0), ("trivial", 0)]
)
def test_exact_level_is_exact_for_subgroups_and_no_more(group, rotation_dims):
    split = 0.0 if group == "trivial" else 0.5
    knobs = {"group": group, "rotation_dims": rotation_dims, "chirality_split": split}
    model = build(**{f"representation.{name}": value for name, value in knobs.items()})
    assert model.group is GROUPS[group]
    z = assert_exact(model, IMAGES["generic"])
    outside = next(g for g in D4 if g not in list(model.group))
    whole = Representation(D4, **model.representation.multiplicities)
    with torch.no_grad():
        error = model.encode(outside.act_on_image(IMAGES["generic"])) - whole.act(outside, z)
    assert error.norm() > 0.1 * z.norm()


@pytest.mark.parametrize("group", ["flips", "mirror"])
def test_exact_level_is_exact_on_images_that_are_not_square(group):
    knobs = {"representation.group": group, "data.resolution": (16, 48)}
    model = build(**knobs | {"representation.rotation_dims": 0})
    assert assert_exact(model, draw(2, 3, 16, 48)).shape == (2, 12, 2, 6)


@pytest.mark.parametrize("group", ["D4", "C4"])
def test_quarter_turns_are_exact_on_images_that_are_not_square(group):
    """All weights in float64: resampled positions commute with the turns exactly, not nearly."""
    model = build(**{"representation.group": group})
    assert assert_exact(model, draw(2, 3, 16, 40)).shape == (2, 12, 2, 5)


def test_a_unet_trains_on_images_that_are_not_square_under_quarter_turns_too():
    model = build(**{"model.kind": "unet", "data.resolution": (16, 48)})
    assert assert_exact(model, draw(2, 3, 16, 48)).shape == (2, 12, 2, 6)


def test_learned_positions_need_square_images_to_train_on_under_quarter_turns():
    with pytest.raises(ValueError, match=r"resolution=\(16, 48\): not square.*D4.*flips"):
        build(**{"data.resolution": (16, 48)})


def test_dense_twin_has_the_interface_and_is_not_equivariant():
    """The control: the same test fails where the layers know no group."""
    model, x = build(**{"model.level": "objective"}), IMAGES["generic"]
    with torch.no_grad():
        z = model.encode(x)
        assert z.shape == (2, 12, 4, 4)
        error = model.encode(D4["rot90"].act_on_image(x)) - model.act(D4["rot90"], z)
    assert error.abs().max() > 0.1
    octic_count = sum(p.numel() for p in build().decoder.blocks.parameters() if p.ndim == 3)
    dense_count = sum(p.numel() for p in model.decoder.blocks.parameters() if p.ndim == 3)
    assert dense_count == 8 * octic_count


def test_every_parameter_learns():
    model = build(**{"model.downsampling": 8, "flow.condition_drop": 0.5}).float()
    loss, _ = Objective(model)(draw(4, 3, 32, 32).float(), torch.Generator().manual_seed(0))
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        if name == "bottleneck.power":  # a statistic
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_flat_colours_need_invariant_channels():
    with pytest.raises(ValueError, match=r"2 invariant channels \(A1\) for 3 colours"):
        build(**{"representation.rotation_dims": 8, "representation.chirality_split": 0.5})


def test_the_network_sees_latents_of_unit_scale():
    z = build().bounded(draw(3, 3, 32, 32))
    assert_close(z.square().mean((1, 2, 3)), torch.ones(3, dtype=torch.float64), 1e-4)


def test_wrong_shapes_are_refused():
    model = build()
    for shape in ((1, 1, 32, 32), (3, 32, 32), (1, 3, 0, 32)):
        with pytest.raises(ValueError, match=r"takes \(batch, 3, height, width\)"):
            model.encode(draw(*shape))
    with pytest.raises(ValueError, match="either noise or seed"):
        model.decode(draw(1, 12, 4, 4))
