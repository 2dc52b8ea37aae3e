"""Every octic layer commutes with every element; encoder and decoder are exact.

Weights are random everywhere, also where training starts from zero.
"""

import pytest
import torch
from torch import nn

from efae.config import Config, with_overrides
from efae.model import octic
from efae.model.autoencoder import Autoencoder
from efae.symmetry import D4, Representation

M = 6
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def randomize(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=GENERATOR)
    return module.double().eval()


def act_on_tokens(g, x):
    """Regular features (slot, ..., m * coset), acted on by the definition: u becomes g u."""
    layout = octic.layout_of(D4)
    fourier = layout.fourier.double()
    shift = torch.zeros(8, 8, dtype=torch.float64)
    for i, u in enumerate(D4):
        shift[D4.index(g @ u), i] = 1
    features = x.unflatten(-1, (-1, 2)).movedim(-1, 1).flatten(0, 1)
    moved = torch.tensordot(fourier @ shift @ fourier.T, features, 1)
    return moved.unflatten(0, (4, 2)).movedim(1, -1).flatten(-2)


def act_on_token_grid(g, x, side):
    moved = act_on_tokens(g, x).unflatten(2, (side, side))
    return g.act_on_image(moved.movedim(-1, 2)).movedim(2, -1).flatten(2, 3)


def assert_close(a, b, tolerance=1e-10):
    """Equal up to a relative error in the Euclidean norm."""
    assert (a - b).norm() <= tolerance * (1 + b.norm())


def test_fourier_is_orthogonal_and_elements_only_sign_and_permute():
    fourier = octic.layout_of(D4).fourier
    assert_close(fourier @ fourier.T, torch.eye(8), 1e-6)
    x = (
        torch.eye(8, dtype=torch.float64).view(4, 2, 1, 8).permute(0, 3, 2, 1)
    )  # (slot, 8, 1, coset)
    for g in D4:
        moved = act_on_tokens(g, x)
        assert set(moved.round(decimals=9).abs().unique().tolist()) == {0.0, 1.0}


def test_linear_holds_every_equivariant_map():
    """The commutant of the regular representation has dimension 8, and so have the ties."""
    assert torch.linalg.matrix_rank(octic.layout_of(D4).ties) == 8


@pytest.mark.parametrize(
    "layer",
    [
        octic.Linear(D4, M, 2 * M),
        octic.Linear(D4, M, M, bias=False),
        octic.Nonlinearity(D4),
        octic.Block(D4, M, num_heads=2, mlp_ratio=2),
    ],
    ids=["linear", "linear without bias", "nonlinearity", "block"],
)
def test_layers_commute_with_the_group(layer):
    layer, x = randomize(layer), draw(4, 3, 16, 2 * M)
    for g in D4:
        assert_close(layer(act_on_token_grid(g, x, 4)), act_on_token_grid(g, layer(x), 4))


def test_the_nonlinearity_is_not_linear():
    layer, x = randomize(octic.Nonlinearity(D4)), draw(4, 1, 2, 2 * M)
    assert (layer(-x) + layer(x)).abs().max() > 0.1


def test_conditioned_block_commutes():
    block = randomize(octic.Block(D4, M, num_heads=2, mlp_ratio=2, conditioning=5))
    x, condition = draw(4, 3, 16, 2 * M), draw(3, 5)
    for g in D4:
        moved = block(act_on_token_grid(g, x, 4), condition)
        assert_close(moved, act_on_token_grid(g, block(x, condition), 4))


def test_lift_and_back_intertwine():
    rho = Representation(D4, a1=2, a2=1, b1=1, b2=1, e=2)
    lift = randomize(octic.Lift(D4, *octic.latent_action(D4, rho), M, fan_in=rho.dim))
    z, x = draw(3, 5, rho.dim), draw(4, 3, 5, 2 * M)
    for g in D4:
        matrix = rho.matrix(g)
        assert_close(lift(z @ matrix.T), act_on_tokens(g, lift(z)))
        assert_close(lift.back(act_on_tokens(g, x)), lift.back(x) @ matrix.T)


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_resample_commutes_and_inverts(ratio):
    resample, x = octic.Resample(D4, ratio).double(), draw(4, 2, 64, 2 * M)
    merged = resample.merge(x, 8, 8)
    assert merged.shape == (4, 2, 64 // ratio**2, 2 * M * ratio**2)
    assert_close(resample.split(merged, 8, 8), x, 1e-6)
    for g in D4:
        moved = resample.merge(act_on_token_grid(g, x, 8), 8, 8)
        assert_close(moved, act_on_token_grid(g, merged, 8 // ratio), 1e-6)


def test_invariants_survive():
    x = draw(4, 3, 2 * M)
    layout = octic.layout_of(D4)
    values = draw(3, M)
    for g in D4:
        acted = octic.take_invariant(layout, act_on_tokens(g, x))
        assert_close(acted, octic.take_invariant(layout, x))
        embedded = octic.embed_invariant(layout, values)
        assert_close(act_on_tokens(g, embedded), embedded)


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


@pytest.mark.parametrize("downsampling", [4, 8, 32], ids=["8x8", "4x4", "vector"])
@pytest.mark.parametrize("kind", IMAGES)
def test_exact_level_is_exact(downsampling, kind):
    model = build(**{"model.downsampling": downsampling})
    x, noise, t = IMAGES[kind], draw(2, 3, 32, 32), torch.tensor([0.3, 0.9]).double()
    with torch.no_grad():
        z = model.encode(x)
        assert z.shape == (2, 12, 32 // downsampling, 32 // downsampling)
        velocity = model.velocity(noise, t, z)
        for g in D4:
            assert_close(model.encode(g.act_on_image(x)), model.act(g, z))
            moved = model.velocity(g.act_on_image(noise), t, model.act(g, z))
            assert_close(moved, g.act_on_image(velocity))


def test_exact_level_in_fp32_errs_by_rounding_only():
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES)).eval()
    for parameter in model.parameters():
        if not parameter.any():  # what starts at zero would hide its own errors
            nn.init.normal_(parameter, std=0.05, generator=GENERATOR)
    x, noise = draw(4, 3, 32, 32).float(), draw(4, 3, 32, 32).float()
    with torch.no_grad():
        z = model.encode(x)
        sample = model.decode(z, steps=4, noise=noise)
        for g in D4:
            assert_close(model.encode(g.act_on_image(x)), model.act(g, z), 1e-5)
            moved = model.decode(model.act(g, z), steps=4, noise=g.act_on_image(noise))
            assert_close(moved, g.act_on_image(sample), 1e-5)


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
    model = build(**{"model.downsampling": 8}).float()
    loss, _ = model(draw(4, 3, 32, 32).float(), torch.Generator().manual_seed(0))
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_flat_colours_need_invariant_channels():
    with pytest.raises(ValueError, match=r"2 invariant channels \(A1\) for 3 colours"):
        build(**{"representation.rotation_dims": 8, "representation.chirality_split": 0.5})


def test_latent_scale_is_one():
    z = build().encode(draw(3, 3, 32, 32))
    assert_close(z.square().mean((1, 2, 3)), torch.ones(3, dtype=torch.float64), 1e-4)


def test_wrong_shapes_are_refused():
    model = build()
    with pytest.raises(ValueError, match=r"takes \(batch, 3, 32, 32\)"):
        model.encode(draw(1, 3, 32, 48))
    with pytest.raises(ValueError, match="either noise or seed"):
        model.decode(draw(1, 12, 4, 4))
