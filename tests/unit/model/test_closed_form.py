"""The linear map in closed form: equivariant, optimal, exact in any order of the images."""

import itertools

import pytest
import torch

from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.measures import to_float
from efae.model.autoencoder import Autoencoder
from efae.model.closed_form import (
    Moments,
    choose_multiplicities,
    fit_linear_map,
    set_linear_paths,
)
from efae.model.networks.linear_path import patchify
from efae.model.octic.layers import patch_action
from efae.symmetry import D4, GROUPS, Representation

SPLITS = [
    {"a1": 3, "a2": 1, "b1": 1, "b2": 1, "e": 3},
    {"a1": 4, "b1": 2},
    {"a1": 12, "a2": 12, "b1": 12, "b2": 12, "e": 20},
]
every_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)


def draw_images(channels=3, count=60, size=16):
    """Smooth images, each brighter at one side, uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, size // 4 + 1, size // 4 + 1, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    ramp = torch.linspace(0.5, 1, size) * torch.linspace(0.8, 1, size)[:, None]
    return (image * ramp * 255).round().to(torch.uint8)


@every_group
@pytest.mark.parametrize("split", SPLITS, ids=["default", "no planes", "more than there is"])
@pytest.mark.parametrize(("side", "channels"), [(4, 3), (8, 1), (2, 3)])
def test_the_map_commutes_with_the_group_and_its_rows_are_orthonormal(group, split, side, channels):
    rho = Representation(group, **split)
    rows = fit_linear_map(Moments.of(draw_images(channels), side), rho, side).rows
    source, _ = patch_action(group, side, channels)
    for g, permutation in zip(group, source, strict=True):
        moved = torch.zeros_like(rows)
        moved[:, permutation] = rows  # W R(g)
        assert torch.allclose(moved, rho.matrix(g) @ rows, atol=1e-12)
    kept = rows[rows.norm(dim=1) > 0.5]
    assert torch.allclose(kept @ kept.T, torch.eye(len(kept)).double(), atol=1e-9)
    assert (rows[rows.norm(dim=1) <= 0.5] == 0).all()


@every_group
def test_no_other_equivariant_map_has_less_error(group):
    """Moving any row towards another pixel pattern of its own symmetry costs."""
    images, side = draw_images(), 4
    rho = Representation(group, a1=4, a2=1, b1=2, b2=1, e=2)
    fitted = fit_linear_map(Moments.of(images, side), rho, side)
    patches = patchify(to_float(images), side).flatten(0, 1).double()

    def measure(rows):
        projection = torch.linalg.pinv(rows) @ rows
        return float((patches - patches @ projection.T).square().mean())

    least = measure(fitted.rows)
    assert least == pytest.approx(fitted.error, rel=1e-6)
    source, _ = patch_action(group, side, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        other = torch.randn(fitted.rows.shape, generator=generator, dtype=torch.float64)
        moved = torch.zeros_like(other)
        for g, permutation in zip(group, source, strict=True):
            moved += rho.matrix(g) @ other[:, permutation] / len(group)
        assert measure(fitted.rows + 0.05 * moved) > least


def test_with_no_symmetry_it_is_principal_component_analysis():
    images, side = draw_images(), 4
    patches = patchify(to_float(images), side).flatten(0, 1).double()
    fitted = fit_linear_map(Moments.of(images, side), Representation(GROUPS["trivial"], a1=7), side)
    singular = torch.linalg.svdvals(patches)
    assert torch.allclose(fitted.variance, singular[:7] ** 2 / len(patches), rtol=1e-6)


def test_moments_are_the_same_bits_in_any_order_and_split():
    images = draw_images(count=31)
    whole = Moments.of(images, 4)
    for size in (1, 7, 30):
        parts = [Moments.of(part, 4) for part in images.flip(0).split(size)]
        total = parts[0]
        for part in parts[1:]:
            total += part
        assert torch.equal(total.second, whole.second)
        assert torch.equal(total.mean_product(), whole.mean_product())


@pytest.mark.parametrize("dim", [3, 4, 7, 8, 12])
def test_the_chosen_split_is_the_best_of_all(dim):
    moments, side = Moments.of(draw_images(), 4), 4
    chosen = choose_multiplicities(moments, D4, dim, side, invariant=1)

    def measure(split):
        return fit_linear_map(moments, Representation(D4, **split), side).error

    names = ("a1", "a2", "b1", "b2", "e")
    every = (
        dict(zip(names, split, strict=True))
        for split in itertools.product(range(dim + 1), repeat=5)
        if sum(split[:4]) + 2 * split[4] == dim and split[0] >= 1
    )
    least = min(map(measure, every))
    assert sum(chosen.values()) + chosen["e"] == dim
    assert measure(chosen) == pytest.approx(least, rel=1e-9)


@every_group
@pytest.mark.parametrize("kind", ["transformer", "unet"])
@pytest.mark.parametrize("level", ["exact", "objective"])
def test_the_first_prediction_is_that_of_the_linear_map(group, kind, level):
    overrides = {
        "data.resolution": 16,
        "model.kind": kind,
        "model.level": level,
        "model.start": "closed_form",
        "model.bottleneck": "running",
        "model.downsampling": 4,
        "model.patch_size": 2,
        "representation.group": group.name,
        "representation.dim": 12,
        "representation.learned_basis": level == "objective",
    }
    model = Autoencoder(with_overrides(Config(), overrides)).eval()
    images = draw_images()
    fitted = fit_linear_map(Moments.of(images, 4), model.representation, 4)
    set_linear_paths(model, fitted)
    image = to_float(images)
    with torch.no_grad():
        latent = model.encode(image)
        decoded = model.decode(latent, steps=1, seed=0)
    assert torch.allclose(decoded, fitted.reconstruct(image, 4), atol=1e-5)
    for block in model.bottleneck.blocks:
        assert float(latent[:, block].square().mean()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "flow", "has_latent"),
    [
        ("transformer", {"flow.condition_drop": 0.1}, True),
        ("unet", {"flow.condition_drop": 0.1}, False),
        ("unet", {"flow.distill_from": "teacher"}, True),
    ],
)
@pytest.mark.parametrize("t", [1e-4, 0.03, 0.3, 0.7, 1.0])
def test_a_network_sees_the_best_linear_estimate_and_corrects_the_path(kind, flow, has_latent, t):
    """If residuals are like noise: no other share of what x_t shows has less error."""
    spread = 0.1 if has_latent else 0.5
    overrides = {
        "data.resolution": 32,
        "model.kind": kind,
        "model.start": "closed_form",
        "model.bottleneck": "running",
    }
    decoder = (
        Autoencoder(with_overrides(Config(), overrides | flow)).decoder.eval().requires_grad_(False)
    )
    decoder.residual_power.copy_(torch.tensor([0.1**2, 0.5**2]))
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(64, 32, 4, 4, generator=generator)
    keep = torch.full((64,), has_latent) if "flow.condition_drop" in flow else None
    linear = decoder.linear_path.back(latent) * has_latent
    image = linear + spread * torch.randn(64, 3, 32, 32, generator=generator)
    noise = torch.randn(image.shape, generator=generator)
    x_t, times = (1 - t) * image + t * noise, torch.full((64,), t)
    seen, corrected = decoder.see(x_t, times, latent, keep)
    assert torch.equal(corrected, linear)
    assert torch.equal(decoder(x_t, times, latent, keep), linear)  # before training
    shown, rest = x_t - (1 - t) * linear, image - linear
    best = float((shown * rest).mean() / shown.square().mean())
    if "flow.distill_from" in flow:  # the noise that chooses its sample, at the residual's scale
        assert float((seen - linear).std()) == pytest.approx(spread, rel=0.02)
        assert torch.allclose(seen - linear, shown * (spread / shown.std()), atol=0.02 * spread)
    else:
        assert torch.allclose(seen, linear + best * shown, atol=0.02 * spread)
    if t == 1:
        assert torch.equal(seen, linear) != ("flow.distill_from" in flow)
