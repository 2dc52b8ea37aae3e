"""The measures, against closed forms, an exact model and a model that is not."""

import pytest
import torch

from efae.config import Config, with_overrides
from efae.model.autoencoder import Autoencoder
from efae.symmetry import D4
from efae.training.evaluation import TIME_BINS, evaluate, psnr, ssim, to_float

SIZES = {
    "data.resolution": 16,
    "representation.dim": 12,
    "representation.rotation_dims": 4,
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 1,
    "model.patch_size": 4,
    "flow.sampler_steps": 2,
}


def test_psnr_of_a_known_error():
    image = torch.zeros(3, 1, 8, 8)
    assert psnr(image, image + 0.2).tolist() == pytest.approx([20.0] * 3)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ssim(image, image).tolist() == pytest.approx([1.0, 1.0])
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    scores = [float(ssim(image, image + s * noise).mean()) for s in (0.1, 0.3, 1.0)]
    assert 1 > scores[0] > scores[1] > scores[2] > -0.1


def test_pixels_fill_the_range():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.fixture(scope="module")
def measured():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=generator)
    found = {}
    for level in ("exact", "objective"):
        torch.manual_seed(0)
        model = Autoencoder(with_overrides(Config(), SIZES | {"model.level": level})).eval()
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        found[level] = evaluate(model, images, batch_size=8)
    return found


def test_exact_model_has_no_gap(measured):
    result = measured["exact"]
    assert 0 <= result.worst_gap_db < 1e-4
    assert 0 <= result.symmetric_worst_gap_db < 1e-4
    assert result.group_law_error == 0
    assert max(result.encoder_error.values()) < 1e-9
    assert min(result.decoder_error_db.values()) > 90 > result.noise_floor_db


def test_dense_model_fails_the_same_measures(measured):
    result = measured["objective"]
    others = [g.name for g in D4 if g != D4.identity]
    assert min(result.encoder_error[name] for name in others) > 0.1
    assert max(result.decoder_error_db[name] for name in others) < 60
    assert result.encoder_error["identity"] == 0


def test_numbers_are_complete_and_consistent(measured):
    for result in measured.values():
        numbers = result.numbers()
        assert "pictures" not in numbers
        assert numbers["images"] == 12
        assert set(numbers["gap_db"]) == {g.name for g in D4}
        assert numbers["gap_db"]["identity"] == 0
        assert numbers["worst_gap_db"] == max(map(abs, numbers["gap_db"].values()))
        assert sum(numbers["energy_by_irrep"].values()) == pytest.approx(1, abs=1e-5)
        assert len(numbers["loss_by_time"]) == TIME_BINS
        assert all(loss > 0 for loss in numbers["loss_by_time"])
        assert set(result.pictures.acted) == {g.name for g in D4}


def test_evaluation_repeats():
    model = Autoencoder(with_overrides(Config(), SIZES)).eval()
    images = torch.arange(4 * 3 * 16 * 16).view(4, 3, 16, 16).to(torch.uint8)
    first, second = (evaluate(model, images).numbers() for _ in range(2))
    assert first | {"seconds": 0} == second | {"seconds": 0}
