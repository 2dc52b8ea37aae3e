"""The measurement of rotations, against closed forms, an exact model and a wrong action."""

import math

import pytest
import torch

from efae.config import Config, with_overrides
from efae.model.autoencoder import Autoencoder
from efae.symmetry import D4, Representation
from efae.symmetry.rotation import disk_mask, rotate_image
from efae.training.angles import masked_psnr, measure_rotations

SIZES = {
    "data.resolution": 16,
    "representation.dim": 12,
    "representation.multiplicities": (4, 0, 2, 2, 2),
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 1,
    "model.patch_size": 4,
    "flow.sampler_steps": 2,
}
NUMBERS = {"encoder_error", "psnr", "gap_db", "resampling_floor_db"}


def draw_images(count, channels, side, seed=0):
    """Smooth noise in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)


class Pixels:
    """The image is its own latent: invariant channels on the pixel grid."""

    representation = Representation(D4, a1=3)

    def encode(self, image):
        return image

    def decode(self, latent, *, noise):
        assert noise.shape == latent.shape
        return latent


class PixelsDeclaredVectors(Pixels):
    """The control: the same code with a representation that is not its own."""

    representation = Representation(D4, a1=1, e=1)


class Mean:
    """A vector latent that forgets all but the mean colour."""

    representation = Representation(D4, a1=3)

    def encode(self, image):
        disk = disk_mask(*image.shape[-2:])
        return (disk * image).sum((2, 3), keepdim=True) / disk.sum()

    def decode(self, latent, *, noise):
        return latent.expand(noise.shape)


def test_masked_psnr_of_a_known_error_ignores_the_corners():
    image, other = torch.zeros(3, 2, 8, 8), torch.full((3, 2, 8, 8), 0.2)
    mask = disk_mask(8, 8)
    assert masked_psnr(image, other, mask).tolist() == pytest.approx([20.0] * 3)
    other[..., 0, 0] = 100
    assert masked_psnr(image, other, mask).tolist() == pytest.approx([20.0] * 3)
    assert masked_psnr(image, other, torch.ones(8, 8)).max() < 0


def test_pixels_are_an_exact_tokenizer():
    images = draw_images(6, 3, 16)
    measured = measure_rotations(Pixels(), images, (30, 90, -45))
    assert list(measured) == [0.0, 30.0, 90.0, -45.0]
    for angle, found in measured.items():
        assert set(found) == NUMBERS
        assert found["encoder_error"] < 1e-3, angle  # clamping to [-1, 1]
        assert found["psnr"] > 60
        turned = rotate_image(images, math.radians(angle)).clamp(-1, 1)
        back = rotate_image(turned, -math.radians(angle)).clamp(-1, 1)
        floor = float(masked_psnr(back, images, disk_mask(16, 16)).mean())
        assert found["resampling_floor_db"] == pytest.approx(floor)
        assert found["gap_db"] == pytest.approx(measured[0.0]["psnr"] - found["psnr"])
    assert measured[0.0]["gap_db"] == 0
    assert measured[90.0]["resampling_floor_db"] > 90 > measured[30.0]["resampling_floor_db"] > 30


def test_a_wrong_representation_is_found():
    measured = measure_rotations(PixelsDeclaredVectors(), draw_images(6, 3, 16), (45, 90))
    for angle in (45.0, 90.0):
        assert measured[angle]["encoder_error"] > 0.2
        assert measured[angle]["gap_db"] > 20
    assert measured[0.0]["encoder_error"] < 1e-6


def test_a_tokenizer_that_ignores_the_image_has_no_gap_and_poor_psnr():
    measured = measure_rotations(Mean(), draw_images(8, 3, 16), (45,))
    assert abs(measured[45.0]["gap_db"]) < 0.5
    assert measured[45.0]["psnr"] < 20
    assert measured[45.0]["encoder_error"] < 0.05


@pytest.mark.parametrize("downsampling", [8, 16], ids=["2x2", "vector"])
def test_an_autoencoder_is_measured_and_quarter_turns_are_exact(downsampling):
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES | {"model.downsampling": downsampling}))
    model.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    images = draw_images(6, 3, 16)
    measured = measure_rotations(model, images, (15, 90), seed=3, batch_size=4)
    assert all(set(found) == NUMBERS for found in measured.values())
    assert all(math.isfinite(value) for found in measured.values() for value in found.values())
    assert measured[90.0]["encoder_error"] < 1e-7 < 1e-3 < measured[15.0]["encoder_error"]
    scores = []
    for i, image in enumerate(images.split(4)):
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(3 + i))
        acted = model.act(D4["rot90"], model.encode(image))
        sample = model.decode(acted, noise=noise).clamp(-1, 1)
        turned = D4["rot90"].act_on_image(image)
        scores.append(masked_psnr(sample, turned, disk_mask(16, 16)))
    assert measured[90.0]["psnr"] == pytest.approx(float(torch.cat(scores).mean()), abs=1e-2)


def test_the_measurement_repeats_and_does_not_depend_on_the_batch_for_pixels():
    images = draw_images(6, 3, 16)
    first = measure_rotations(Pixels(), images, (20,))
    assert first == measure_rotations(Pixels(), images, (20,))
    parts = measure_rotations(Pixels(), images, (20,), batch_size=4)
    assert parts[20.0] == pytest.approx(first[20.0], rel=1e-4)
