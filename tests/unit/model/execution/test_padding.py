"""Images whose sides the latent grid does not divide: padded, acted on as latents, cropped."""

import itertools
import warnings

import pytest
import torch

from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.execution.padding import crop, pad_to_cells
from efae.symmetry import D4

SIZES = {
    "data.resolution": 16,
    "model.hidden_size": 16,
    "model.encoder_hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 1,
    "representation.dim": 16,
    "flow.sampler_steps": 2,
}


def build() -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES)).eval().requires_grad_(False)
    for weight in model.decoder.parameters():  # a new decoder's output is zero
        weight.add_(0.1 * torch.randn_like(weight))
    return model


def draw(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width"), list(itertools.product((1, 2, 5, 8, 11), repeat=2)))
def test_edges_are_repeated_on_both_sides_and_cropped_again(height, width):
    image = draw(2, 3, height, width)
    padded = pad_to_cells(image, 4)
    tall, wide = padded.shape[2:]
    assert (tall % 4, wide % 4) == (0, 0)
    assert 0 <= tall - height < 4
    assert 0 <= wide - width < 4
    rows = (torch.arange(tall) - (tall - height) // 2).clamp(0, height - 1)
    columns = (torch.arange(wide) - (wide - width) // 2).clamp(0, width - 1)
    assert torch.equal(padded, image[:, :, rows][..., columns])
    assert torch.equal(crop(padded, (height, width)), image)


def commutes(image, g):
    padded = pad_to_cells(g.act_on_image(image), 4)
    return torch.equal(padded, g.act_on_image(pad_to_cells(image, 4)))


def test_padding_commutes_but_for_an_odd_pixel():
    assert all(commutes(draw(1, 1, 6, 10), g) for g in D4)
    odd = draw(1, 1, 5, 10)
    assert [g.name for g in D4 if commutes(odd, g)] == ["identity", "rot90", "flip_h", "transpose"]


def test_the_padding_is_reported_once():
    model, image = build(), draw(1, 3, 20, 27)
    with pytest.warns(UserWarning, match=r"20 x 27 .* 24 x 32: .*=8 .*size=\(20, 27\)") as told:
        latent = model.encode(image)
    assert told[0].filename == __file__
    assert torch.equal(latent, model.encode(pad_to_cells(image, 8)))
    model.encode(draw(1, 3, 9, 9))  # warnings are errors


def test_cropped_decodes_turn_with_their_latents():
    model, image, noise = build(), draw(1, 3, 20, 12), draw(1, 3, 24, 16)
    with warnings.catch_warnings(action="ignore"):
        latent = model.encode(image)
    whole = model.decode(latent, noise=noise)
    sample = model.decode(latent, noise=noise, size=(20, 12))
    assert torch.equal(sample, whole[..., 2:22, 2:14])
    for g in D4:
        size = (12, 20) if g.swaps_sides else (20, 12)
        acted, moved = model.act(g, latent), g.act_on_image(noise)
        turned = model.decode(acted, noise=moved, size=size)
        torch.testing.assert_close(turned, g.act_on_image(sample), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [8, "8", (8.0, 8.0), (8, 8, 8)])
def test_a_size_is_two_whole_numbers(size):
    with pytest.raises(ValueError, match=r"size=.*: give height and width, two whole numbers"):
        build().decode(draw(1, 16, 1, 1), seed=0, size=size)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 3, 8, 8).numpy(), "ndarray"),
        ([0.0], "list"),
    ],
)
def test_what_is_no_tensor_of_floats_is_refused(given, found):
    model = build()
    with pytest.raises(ValueError, match=f"image of {found}: encode takes a tensor of floats in"):
        model.encode(given)
    with pytest.raises(ValueError, match=f"latent of {found}: decode takes the tensor of floats"):
        model.decode(given, seed=0)


@pytest.mark.parametrize("shape", [(0, 2, 2), (1, 0, 2), (1, 2, 0), (2, 2)])
def test_empty_batches_and_grids_are_refused(shape):
    batch, *grid = shape
    expected = r"of shape \(.*\): this model takes \(batch, {}, height, width\), one or more"
    with pytest.raises(ValueError, match="image " + expected.format(3)):
        build().encode(torch.zeros(batch, 3, *grid))
    with pytest.raises(ValueError, match="latent " + expected.format(16)):
        build().decode(torch.zeros(batch, 16, *grid), seed=0)


def test_latents_in_half_precision_are_decoded_as_they_are_stored():
    model, latent = build(), draw(1, 16, 2, 2)
    for dtype in (torch.float16, torch.bfloat16):
        stored = latent.to(dtype)
        assert torch.equal(model.decode(stored, seed=0), model.decode(stored.float(), seed=0))


@pytest.mark.parametrize("size", [(16, 12), (25, 16), (20, 17), (12, 20), (0, 0)])
def test_sizes_of_other_latents_are_refused(size):
    with pytest.raises(ValueError, match=rf"size=\({size[0]}, {size[1]}\): .*3 x 2 cells of 8"):
        build().decode(draw(1, 16, 3, 2), seed=0, size=size)


def test_noise_at_the_size_of_the_image_before_padding_is_refused():
    with pytest.raises(ValueError, match=r"noise of shape \(1, 3, 20, 12\).*\(1, 3, 24, 16\)"):
        build().decode(draw(1, 16, 3, 2), noise=draw(1, 3, 20, 12))
