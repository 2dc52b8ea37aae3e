"""Tiled encoding and decoding: that of the whole image to rounding, or a bounded approximation."""

import functools
import itertools
import warnings

import pytest
import torch
from torch import nn

from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.execution import tiling
from efae.model.execution.tiling import BLENDED_CELLS, place_windows, weigh_windows
from efae.symmetry import D4

SIZES = {
    "data.resolution": 16,
    "model.hidden_size": 16,
    "model.encoder_hidden_size": 16,
    "model.fine_hidden_size": 8,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.mlp_ratio": 1,
    "model.patch_size": 2,
    "model.downsampling": 4,
    "representation.dim": 12,
    "flow.sampler_steps": 2,
}
RUNNING = {"model.bottleneck": "running"}
UNET = {"model.kind": "unet"}
ATTENTION = {
    "transformer": (),
    "unet with attention": (("model.kind", "unet"), ("model.attention_depth", 1)),
}
EXACT = {
    "unet": UNET,
    "closed form": UNET | RUNNING | {"model.start": "closed_form"},
    "one grid": UNET | {"model.patch_size": 4, "model.bottleneck": "kl"},
    "three grids": UNET | {"model.patch_size": 1, "model.modulation": "shared"},
    "guided": UNET | RUNNING | {"flow.condition_drop": 0.1, "flow.guidance_scale": 2.0},
    "dense": UNET | {"model.level": "none", "flow.sampler": "heun"},
    "mirror": UNET | {"representation.group": "mirror", "flow.prediction": "velocity"},
    "learned basis": UNET
    | {"model.level": "objective", "representation.learned_basis": True, "flow.sampler_steps": 1},
}


@functools.cache
def build(knobs=()) -> Autoencoder:
    """A model with weights that are not zero, in double precision; do not modify it."""
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES | dict(knobs)))
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.2)
    return model.double().eval().requires_grad_(False)


def exact(name="unet") -> Autoencoder:
    return build(tuple(EXACT[name].items()))


def draw(*shape) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("most", "overlap"), [(1, 0), (2, 1), (6, 0), (7, 2), (8, 6), (11, 10), (20, 4)]
)
def test_windows_cover_the_axis_symmetrically(most, overlap):
    for cells in range(1, 70):
        starts, length = place_windows(cells, most, overlap)
        assert 0 < length <= most
        assert (starts[0], starts[-1] + length) == (0, cells)
        assert starts == [cells - length - start for start in reversed(starts)]
        steps = [b - a for a, b in itertools.pairwise(starts)]
        assert all(0 < step <= length - overlap for step in steps)
        least = max(0, -(-(cells - most) // (most - overlap)))  # of steps
        assert len(steps) <= least + 1


@pytest.mark.parametrize("pixels", [1, 4])
@pytest.mark.parametrize("margin", [0, 1, 3])
def test_weights_of_a_pixel_sum_to_one_and_vanish_near_inner_edges(margin, pixels):
    for cells in range(10, 60, 7):
        starts, length = place_windows(cells, 10, 2 * margin or BLENDED_CELLS)
        weights = weigh_windows(starts, length, margin, pixels)
        total, edge = torch.zeros(cells * pixels, dtype=weights.dtype), margin * pixels
        for start, weight in zip(starts, weights, strict=True):
            total[start * pixels : (start + length) * pixels] += weight
            assert (weight >= 0).all()
            assert start == 0 or not weight[:edge].any()
            assert start + length == cells or not weight[len(weight) - edge :].any()
        torch.testing.assert_close(total, torch.ones_like(total))
        torch.testing.assert_close(weights.flip(0, 1), weights)


def reach(output: torch.Tensor, other: torch.Tensor, side: int, cell: int) -> int:
    """How far from a cell two outputs differ, in cells of `side` pixels, on any axis."""
    places = (output != other).any(1).nonzero()[:, -2:] // side - cell
    return int(places.abs().max())


@pytest.mark.parametrize(("fine_depth", "depth"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_the_receptive_field_is_what_it_is_measured_to_be(patch, fine_depth, depth):
    model = build(
        (
            ("model.kind", "unet"),
            ("model.patch_size", patch),
            ("model.fine_depth", fine_depth),
            ("model.depth", depth),
            ("model.encoder_depth", depth),
        )
    )
    cells, middle = 25, 12
    image, latent = draw(1, 3, 4 * cells, 4 * cells), draw(1, 12, cells, cells)
    moved = image.clone()
    moved[..., 4 * middle : 4 * middle + 4, 4 * middle : 4 * middle + 4] += 1
    encoded, encoded_moved = model.encoder(image), model.encoder(moved)
    assert reach(encoded, encoded_moved, 1, middle) == model.encoder.receptive_radius()
    t, mean = torch.tensor([0.5], dtype=torch.float64), draw(1, 12)
    output = model.decoder(image, t, latent, None, mean)
    radius = model.decoder.receptive_radius()
    assert reach(output, model.decoder(moved, t, latent, None, mean), 4, middle) == radius
    latent_moved = latent.clone()
    latent_moved[..., middle, middle] += 1
    assert reach(output, model.decoder(image, t, latent_moved, None, mean), 4, middle) <= radius


def least_cells(model: Autoencoder) -> int:
    """Side of the least tile, in cells."""
    return 2 * max(model.encoder.receptive_radius(), model.decoder.receptive_radius()) + 1


@pytest.mark.parametrize("name", EXACT)
def test_convolutions_in_tiles_equal_the_whole(name):
    model = exact(name)
    least = 4 * least_cells(model)
    image, noise = draw(1, 3, least + 19, least + 9), draw(1, 3, least + 20, least + 12)
    size, tile = image.shape[2:], least + 8
    with warnings.catch_warnings(action="ignore"):  # both sides are padded
        latent, encoded = model.encode(image), model.encode(image, tile=tile)
    torch.testing.assert_close(encoded, latent, atol=1e-10, rtol=0)
    whole = model.decode(latent, noise=noise, size=size)
    sample = model.decode(latent, noise=noise, size=size, tile=tile)
    torch.testing.assert_close(sample, whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [(60, 4), (4, 60), (40, 88), (76, 76)])
def test_any_rectangle_in_the_smallest_tiles_equals_the_whole(size):
    model, image = exact("closed form"), draw(2, 3, *size)
    tile, latent = 4 * least_cells(model), model.encode(image)
    torch.testing.assert_close(model.encode(image, tile=tile), latent, atol=1e-10, rtol=0)
    whole = model.decode(latent, 1, image)
    sample = model.decode(latent, 1, image, tile=tile)
    torch.testing.assert_close(sample, whole, atol=1e-10, rtol=0)


def test_one_cell_less_of_overlap_would_show(monkeypatch):
    model, image = exact(), draw(1, 3, 64, 52)
    latent, noise = model.encode(image), draw(1, 3, 64, 52)
    whole, tile = model.decode(latent, noise=noise), 4 * least_cells(model)
    for network in (model.encoder, model.decoder):
        less = network.receptive_radius() - 1
        monkeypatch.setattr(network, "receptive_radius", lambda less=less: less)
    assert (model.encode(image, tile=tile) - latent).abs().max() > 1e-6
    assert (model.decode(latent, noise=noise, tile=tile) - whole).abs().max() > 1e-6


def test_tiles_equal_the_whole_in_single_precision_and_from_a_seed():
    model = Autoencoder(exact().config).eval().requires_grad_(False)
    model.load_state_dict(exact().state_dict())
    image, tile = draw(1, 3, 76, 52).float(), 4 * least_cells(model)
    latent = model.encode(image)
    torch.testing.assert_close(model.encode(image, tile=tile), latent, atol=1e-5, rtol=0)
    sample = model.decode(latent, seed=3, tile=tile)
    torch.testing.assert_close(sample, model.decode(latent, seed=3), atol=1e-5, rtol=0)
    model.precision = "bf16"
    near = model.decode(model.encode(image, tile=tile), seed=3, tile=tile)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, sample, atol=0.2, rtol=0)


def test_tiles_that_hold_the_image_change_nothing():
    for model in (exact(), build(ATTENTION["transformer"])):
        image = draw(1, 3, 24, 48)
        latent = model.encode(image)
        assert torch.equal(model.encode(image, tile=48), latent)
        whole = model.decode(latent, noise=image)
        assert torch.equal(model.decode(latent, noise=image, tile=64), whole)


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_a_network_sees_windows_of_one_shape_within_the_tile(kind):
    model, sizes = build((("model.kind", kind),)), []
    hooks = [
        network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-2:]))
        for network in (model.encoder, model.decoder)
    ]
    latent = model.encode(draw(1, 3, 120, 60), tile=48)
    encoded, seen = len(sizes), set(sizes)
    model.decode(latent, seed=0, tile=48)
    for hook in hooks:
        hook.remove()
    assert encoded > 4
    assert len(sizes) - encoded > 4
    for shapes in (seen, set(sizes[encoded:])):
        assert len(shapes) == 1
        assert max(max(shape) for shape in shapes) <= 48


@pytest.mark.parametrize("name", ["unet", "unet with attention", "transformer"])
def test_flips_and_turns_commute_with_tiles(name):
    """Blended tiles too: those of a turned rectangle are the turned ones."""
    model = exact("one grid") if name == "unet" else build(ATTENTION[name])
    image, noise = draw(1, 3, 60, 44), draw(1, 3, 60, 44)
    latent = model.encode(image, tile=32)
    sample = model.decode(latent, 1, noise, tile=32)
    for g in D4:
        acted = model.act(g, latent)
        moved = model.encode(g.act_on_image(image), tile=32)
        torch.testing.assert_close(moved, acted, atol=1e-10, rtol=0)
        turned = model.decode(acted, 1, g.act_on_image(noise), tile=32)
        torch.testing.assert_close(turned, g.act_on_image(sample), atol=1e-10, rtol=0)


def measure_seam(error: torch.Tensor) -> float:
    """The greatest step of an error between two columns of pixels, relative to the median."""
    steps = error.diff(dim=-1).square().mean((0, 1, 2)).sqrt()
    return float(steps.max() / steps.median())


@pytest.mark.parametrize("name", ATTENTION)
def test_tiles_with_attention_are_blended(name, monkeypatch):
    model, latent, noise = build(ATTENTION[name]), draw(4, 12, 24, 24), draw(4, 3, 96, 96)
    whole = model.decode(latent, 1, noise)
    error = model.decode(latent, 1, noise, tile=48) - whole
    assert 1e-5 < error.std() / whole.std() < 0.5  # weights are random
    assert measure_seam(error) < 2
    if name == "unet with attention":
        assert error.std() < 0.01 * whole.std()
        monkeypatch.setattr(tiling, "BLENDED_CELLS", 0)
        assert measure_seam(model.decode(latent, 1, noise, tile=48) - whole) > 3


def test_a_model_can_be_given_a_tile_once(monkeypatch):
    model, image = build(ATTENTION["transformer"]), draw(1, 3, 76, 52)
    latent, encoded = model.encode(image), model.encode(image, tile=40)
    sample = model.decode(latent, noise=image, tile=48)
    monkeypatch.setattr(model, "tile", 40)
    assert torch.equal(model.encode(image), encoded)
    assert torch.equal(model.decode(latent, noise=image, tile=48), sample)
    assert not torch.equal(model.decode(latent, noise=image), sample)


def test_gradients_flow_through_tiles():
    model = exact()
    image = draw(1, 3, 60, 44).requires_grad_()
    (whole,) = torch.autograd.grad(model.encode(image).pow(3).sum(), image)
    (tiled,) = torch.autograd.grad(model.encode(image, tile=28).pow(3).sum(), image)
    torch.testing.assert_close(tiled, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tile", [-8, 0, 4, 16, 30, 48.0, "48"])
def test_impossible_tiles_are_refused(tile):
    model = build((("model.kind", "transformer"),))
    expected = rf"tile={tile}: must be a multiple of model\.downsampling=4 and at least 20"
    if not isinstance(tile, int):
        expected = f"tile={tile!r}: give a whole number of pixels"
    with pytest.raises(ValueError, match=expected):
        model.encode(draw(1, 3, 64, 64), tile=tile)
    with pytest.raises(ValueError, match=expected):
        model.decode(draw(1, 12, 16, 16), seed=0, tile=tile)
