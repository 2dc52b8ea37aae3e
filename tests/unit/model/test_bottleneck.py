"""Bounds, noise and unit scale of latents; all of it commutes with the group."""

import pytest
import torch

from efae.model.bottleneck import Bottleneck
from efae.symmetry import D4, GROUPS, Representation

RHO = Representation(D4, a1=3, a2=1, b1=1, b2=1, e=2)
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR)


def test_rms_bounds_every_example():
    bounded = Bottleneck(RHO, "rms", 0.1).bound(50 * draw(4, RHO.dim, 2, 2))
    assert bounded.square().mean((1, 2, 3)).tolist() == pytest.approx([1.0] * 4, rel=1e-4)


def test_one_scale_of_all_examples_keeps_their_ratios_and_reaches_unit_power():
    bottleneck, latent = Bottleneck(RHO, "running", 0.1), 50 * draw(64, RHO.dim, 2, 2)
    latent[:32] *= 3
    for _ in range(600):
        bottleneck.update_power(bottleneck.bound(latent))
    bounded = bottleneck.bound(latent)
    assert float(bounded.square().mean()) == pytest.approx(1, rel=1e-3)
    assert torch.allclose(bounded * latent[0, 0, 0, 0], latent * bounded[0, 0, 0, 0], rtol=1e-4)
    for block in bottleneck.blocks:
        power = bottleneck.normalize(bounded)[:, block].square().mean()
        assert float(power) == pytest.approx(1, rel=1e-3)
    assert torch.allclose(bottleneck.denormalize(bottleneck.normalize(bounded)), bounded)
    assert float(bottleneck.mean_power()) == pytest.approx(1)


def test_the_penalty_pulls_the_power_of_all_examples_to_one_and_depends_on_no_batch():
    bottleneck, latent = Bottleneck(RHO, "running", 0.1), draw(64, RHO.dim, 2, 2)
    scale = torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.SGD([scale], 0.3)
    for _ in range(800):
        bounded = bottleneck.bound(scale * latent)
        penalty = bottleneck.scale_penalty(bounded)
        parts = [bottleneck.scale_penalty(part) for part in bounded.split(7)]
        assert torch.allclose(penalty, torch.cat(parts), atol=1e-7)
        optimizer.zero_grad()
        penalty.mean().backward()
        optimizer.step()
        bottleneck.update_power(bounded)
    power = (scale.detach() * latent).square().mean()
    assert float(power) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", ["rms", "running", "kl"])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_every_map_commutes_with_the_group(kind, group):
    rho = Representation(group, a1=3, a2=1, b1=1, b2=1, e=2)
    bottleneck, latent = Bottleneck(rho, kind, 0.1), draw(2, rho.dim, 4, 4)
    torch.nn.init.uniform_(bottleneck.power, 0.1, 3.0)
    for g in group:
        acted = rho.act(g, latent)
        for step in (bottleneck.bound, bottleneck.normalize, bottleneck.denormalize):
            assert torch.allclose(step(acted), rho.act(g, step(latent)), atol=1e-6)
        if kind == "kl":
            assert torch.allclose(bottleneck.divergence(acted), bottleneck.divergence(latent))


def test_noise_is_isotropic_on_every_copy():
    bottleneck = Bottleneck(RHO, "kl", 0.0)
    torch.nn.init.uniform_(bottleneck.log_variance, -4, 0)
    zeros = torch.zeros(4096, RHO.dim, 2, 2)
    with torch.no_grad():
        noise = bottleneck.add_noise(
            zeros, torch.randn(zeros.shape, generator=torch.Generator().manual_seed(1))
        )
    spread = noise.square().mean((0, 2, 3)).sqrt()
    expected = (bottleneck.log_variance / 2).exp().detach()
    planes = RHO.blocks["e"]
    assert torch.allclose(spread[: planes.start], expected[: planes.start], rtol=0.03)
    for axis in (0, 1):  # the two axes of a plane share one spread, else a turn would change it
        assert torch.allclose(spread[planes][axis::2], expected[planes.start :], rtol=0.03)


def test_normalised_latents_have_unit_scale_per_irrep_and_denormalise():
    bottleneck = Bottleneck(RHO, "rms", 0.1)
    blocks = [slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 10)]  # B1 and B2 share a scale
    parts = [torch.full((b.stop - b.start,), 1.0 + i) for i, b in enumerate(blocks)]
    sizes = torch.cat(parts)
    latent = bottleneck.bound(draw(512, RHO.dim, 2, 2) * sizes[:, None, None])
    for _ in range(600):
        bottleneck.update_power(latent)
    out = bottleneck.normalize(latent)
    for block in blocks:
        assert float(out[:, block].square().mean()) == pytest.approx(1, abs=1e-3)
    assert torch.allclose(bottleneck.denormalize(out), latent, atol=1e-5)


def test_an_irrep_without_energy_keeps_a_finite_scale():
    bottleneck = Bottleneck(RHO, "rms", 0.1)
    latent = torch.zeros(2, RHO.dim, 2, 2)
    latent[:, RHO.blocks["a1"]] = 1
    for _ in range(2000):
        bottleneck.update_power(latent)
    assert bottleneck.normalize(latent).isfinite().all()


def test_divergence_is_that_of_the_gaussians():
    bottleneck, latent = Bottleneck(RHO, "kl", 0.0), draw(3, RHO.dim, 2, 2)
    torch.nn.init.uniform_(bottleneck.log_variance, -4, 0)
    spread = (bottleneck.log_variance / 2).exp()[bottleneck.copy_of_channel, None, None]
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(latent, spread), torch.distributions.Normal(0.0, 1.0)
    )
    assert torch.allclose(bottleneck.divergence(latent), expected.sum((1, 2, 3)), rtol=1e-4)
