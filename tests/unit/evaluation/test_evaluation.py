"""The measures: against closed forms, an exact model, models that are not, and each other."""

import copy
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.evaluate import Measurement, evaluate
from efae.evaluation.flow_measures import STEP_COUNTS, TIME_BINS
from efae.evaluation.linear_reference import fit_linear_reference
from efae.evaluation.lpips_fid import Fid
from efae.evaluation.measures import (
    LARGEST_PSNR,
    draw_noise,
    psnr,
    ssim,
    symmetric_images,
    to_float,
)
from efae.evaluation.protocol import FlowTokenizer
from efae.evaluation.results import CHOSEN, describe_protocol, join_parts
from efae.model.autoencoder import Autoencoder
from efae.model.closed_form import Moments, fit_linear_map, set_linear_paths
from efae.symmetry import D4, FLIPS, Representation

SIZES = {
    "data.resolution": 16,
    "representation.dim": 12,
    "representation.rotation_dims": 6,
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 1,
    "model.patch_size": 4,
    "model.downsampling": 4,
    "flow.sampler_steps": 2,
}
FIXED_BY = {
    "mirror": ("flip_h",),
    "half_turn": ("rot180",),
    "diagonal": ("transpose",),
    "all_elements": tuple(g.name for g in D4),
    "constant": tuple(g.name for g in D4),
}


def draw_images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def build(level: str) -> Autoencoder:
    """A model whose every parameter is alive."""
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES | {"model.level": level})).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def test_psnr_of_a_known_error_and_of_equal_images():
    image = torch.zeros(3, 1, 8, 8)
    assert psnr(image, image + 0.2).tolist() == pytest.approx([20.0] * 3)
    assert psnr(image, image).tolist() == pytest.approx([LARGEST_PSNR] * 3)


@pytest.mark.parametrize("count", [1, 2])
def test_ssim_is_one_for_equal_images_and_falls_with_noise(count):
    image = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ssim(image, image).tolist() == pytest.approx([1.0] * count)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    scores = [float(ssim(image, image + s * noise).mean()) for s in (0.1, 0.3, 1.0)]
    assert 1 > scores[0] > scores[1] > scores[2] > -0.1


def test_pixels_fill_the_range():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_noise_of_an_image_depends_on_seed_and_position_only():
    whole = draw_noise(range(6), (1, 4, 4), seed=3)
    assert torch.equal(draw_noise([4, 2], (1, 4, 4), seed=3), whole[[4, 2]])
    others = torch.cat(
        [whole, draw_noise(range(6), (1, 4, 4), 4), draw_noise(range(6), (1, 4, 4), 3, 1)]
    )
    assert len({tuple(x.flatten().tolist()) for x in others}) == 18
    many = draw_noise(range(500), (1, 4, 4), seed=0)
    assert abs(float(many.mean())) < 0.05
    assert float(many.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("side", [7, 8])
def test_symmetric_images_are_exactly_symmetric_and_keep_what_they_can(side):
    image = torch.rand(2, 3, side, side)
    found = symmetric_images(image)
    assert set(found) == set(FIXED_BY)
    for kind, made in found.items():
        fixed_by = {g.name for g in D4 if torch.equal(g.act_on_image(made), made)}
        assert fixed_by == {"identity", *FIXED_BY[kind]}
        assert made.mean() == pytest.approx(float(image.mean()), abs=0.1)
    assert torch.equal(found["mirror"][..., : side // 2], image[..., : side // 2])
    assert torch.equal(found["half_turn"][..., : side // 2, :], image[..., : side // 2, :])


def test_images_that_are_not_square_have_no_diagonal():
    found = symmetric_images(torch.rand(1, 1, 6, 8))
    assert set(found) == {"mirror", "half_turn", "all_elements", "constant"}
    assert all(
        torch.equal(g.act_on_image(found["all_elements"]), found["all_elements"]) for g in FLIPS
    )


@pytest.fixture(scope="module")
def models():
    return {level: build(level) for level in ("exact", "objective")}


class Colours(torch.nn.Module):
    """A network of three features: the mean colours."""

    num_features = 3

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        return pixels.float().mean((2, 3))


def colour_fid() -> Fid:
    return Fid(FrechetInceptionDistance(Colours()), "none")


@pytest.fixture(scope="module")
def measured(models):
    return {
        level: evaluate(model, draw_images(12), batch_size=8, angles_degrees=(30,))
        for level, model in models.items()
    }


@pytest.fixture(scope="module")
def measured_with_fid(models):
    model, images = models["objective"], draw_images(12)
    return evaluate(model, images, batch_size=8, angles_degrees=(30,), fid=colour_fid())


def test_exact_model_has_no_gap(measured):
    result = measured["exact"]
    assert 0 <= result.worst_gap_db < 1e-4
    assert 0 <= result.symmetric_worst_gap_db < 1e-4
    assert result.group_law_error == 0
    assert max(result.encoder_error.values()) < 1e-9
    assert (
        max(e for errors in result.encoder_error_by_irrep.values() for e in errors.values()) < 1e-9
    )
    assert min(result.decoder_error_db.values()) > 90 > result.noise_floor_db
    assert max(result.velocity_error_by_time) < 1e-9
    for score in result.ssim_by_element.values():
        assert score == pytest.approx(result.ssim, abs=1e-5)


def test_one_image_does_not_make_an_exact_model_inexact(models):
    result = evaluate(models["exact"], draw_images(1))
    assert max(result.encoder_error.values()) < 1e-9


def test_dense_model_fails_the_same_measures(measured):
    result = measured["objective"]
    others = [g.name for g in D4 if g != D4.identity]
    assert min(result.encoder_error[name] for name in others) > 0.1
    for errors in result.encoder_error_by_irrep.values():
        assert min(errors[name] for name in others) > 0.1
    assert max(result.decoder_error_db[name] for name in others) < 60
    assert min(result.velocity_error_by_time) > 1e-6
    assert min(result.symmetric_gap_db.values()) > 1e-6
    assert result.encoder_error["identity"] == 0


def test_numbers_are_complete_and_consistent(measured):
    for result in measured.values():
        numbers = result.numbers()
        assert "pictures" not in numbers
        assert json.loads(json.dumps(numbers, allow_nan=False))["images"] == 12
        assert set(numbers["gap_db"]) == set(numbers["ssim_by_element"]) == {g.name for g in D4}
        assert numbers["gap_db"]["identity"] == 0
        assert numbers["worst_gap_db"] == max(map(abs, numbers["gap_db"].values()))
        assert numbers["symmetric_worst_gap_db"] == max(numbers["symmetric_gap_db"].values())
        assert set(numbers["symmetric_gap_db"]) == set(FIXED_BY)
        assert sum(numbers["energy_by_irrep"].values()) == pytest.approx(1, abs=1e-5)
        assert set(numbers["encoder_error_by_irrep"]) == set(numbers["energy_by_irrep"])
        spectra = numbers["diffusability"]["spectral_energy_concentration_by_irrep"]
        assert set(spectra) == set(numbers["energy_by_irrep"])
        assert len(numbers["loss_by_time"]) == len(numbers["velocity_error_by_time"]) == TIME_BINS
        assert all(loss > 0 for loss in numbers["loss_by_time"])
        for name in ("psnr_by_steps", "ssim_by_steps", "sharpness_by_steps"):
            assert tuple(numbers[name]) == STEP_COUNTS
        assert (numbers["lpips"], numbers["fid"], numbers["deterministic"]) == (None, None, False)
        assert list(numbers["rotations"]) == [0.0, 30.0]
        assert numbers["latent_shape"] == (12, 4, 4)
        assert set(result.pictures.acted) == {g.name for g in D4}
        times = [t for t, _ in result.pictures.states]
        assert (times[0], times[-1], len(times)) == (1, 0, 17)


def test_the_linear_map_is_measured_like_the_model(models, measured):
    """Also where the model is this very map: then nothing is left to learn."""
    images = draw_images(12)
    result = measured["exact"]
    fitted = fit_linear_map(Moments.of(images, 4), models["exact"].representation, 4)
    decoded = fitted.reconstruct(to_float(images), 4).clamp(-1, 1)
    assert result.linear_psnr == pytest.approx(float(psnr(decoded, to_float(images)).mean()))
    assert result.linear_ssim == pytest.approx(float(ssim(decoded, to_float(images)).mean()))
    start = {"model.start": "closed_form", "model.bottleneck": "running"}
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES | start)).eval()
    set_linear_paths(model, fitted)
    found = evaluate(model, images)
    assert found.linear_psnr == result.linear_psnr
    assert found.psnr == pytest.approx(found.linear_psnr, abs=1e-3)
    assert found.ssim == pytest.approx(found.linear_ssim, abs=1e-4)


def test_the_split_of_the_best_linear_map_beats_the_others(measured):
    for result in measured.values():
        split = result.closed_form_split
        rho = Representation(D4, **split["multiplicities"])
        assert rho.dim == 12
        assert rho.multiplicities["a1"] >= 3
        assert rho.multiplicities != result.multiplicities
        assert split["linear_psnr"] > result.linear_psnr


def test_too_few_images_have_no_linear_map(models):
    """A map fitted to fewer would be far ahead of one fitted to other images."""
    result = evaluate(models["exact"], draw_images(11))
    assert (result.linear_psnr, result.linear_ssim, result.closed_form_split) == (None,) * 3
    assert "too few patches" in result.protocol["linear_psnr"]


def test_cells_too_large_to_fit_have_no_linear_map():
    sizes = {"data.resolution": 48, "model.patch_size": 48, "model.downsampling": 48}
    mirror = {"representation.group": "mirror", "representation.rotation_dims": 0}  # to save time
    model = Autoencoder(with_overrides(Config(), SIZES | sizes | mirror)).eval()
    images = torch.zeros(1000, 3, 48, 48, dtype=torch.uint8)  # patches enough
    assert fit_linear_reference(model, images, torch.device("cpu"), 1) is None
    result = evaluate(model, images[:1])
    assert result.linear_psnr is None
    assert "48 x 48 pixels has 6912 values" in result.protocol["linear_psnr"]


def test_the_protocol_says_how(measured, models):
    protocol = measured["exact"].protocol
    assert (protocol["images"], protocol["chosen_images"], protocol["seed"]) == (12, 12, 0)
    assert (protocol["sampler"], protocol["sampler_steps"]) == ("euler", 2)
    assert protocol["data_range"] == 2
    assert set(protocol["versions"]) == {"torch", "torchmetrics"}
    assert protocol["passes"] == "1 per encode and decode"
    averaged = copy.copy(models["exact"])
    averaged.symmetrize = True
    totals = SimpleNamespace(count=lambda name: 1)
    part: Any = SimpleNamespace(totals=totals, closed_form_split={"a1": 12})
    passes = describe_protocol(averaged, part, (), 0, None, None)["passes"]
    assert passes == "8 per encode and decode, averaged over D4"


def assert_same_numbers(one: dict, other: dict) -> None:
    for name in set(one) - {"seconds", "protocol", "representation"}:
        assert flat(one[name]) == pytest.approx(flat(other[name]), rel=1e-6, abs=1e-6), name


def flat(value) -> list:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [entry for part in value for entry in flat(part)]
    return [value if isinstance(value, int | float) else hash(value)]


def test_evaluation_repeats_whatever_the_batch_size(models, measured):
    model = models["objective"]
    again = evaluate(model, draw_images(12), batch_size=8, angles_degrees=(30,)).numbers()
    assert again | {"seconds": 0} == measured["objective"].numbers() | {"seconds": 0}
    other = evaluate(model, draw_images(12), batch_size=5, angles_degrees=(30,))
    assert_same_numbers(other.numbers(), again)
    pictures, whole = other.pictures, measured["objective"].pictures
    assert torch.allclose(pictures.acted["rot90"], whole.acted["rot90"], atol=1e-4)
    for (t, state), (time, expected) in zip(pictures.states, whole.states, strict=True):
        assert t == time
        assert torch.allclose(state, expected, atol=1e-4)
    reseeded = evaluate(models["objective"], draw_images(12), seed=1).numbers()
    assert reseeded["psnr"] != again["psnr"]


def test_interpolated_fid_is_of_decodes_between_neighbours(models, measured_with_fid):
    model, images = models["objective"], draw_images(12)
    image = to_float(images)
    noise = draw_noise(range(12), tuple(image.shape[1:]), 0)
    with torch.no_grad():
        latent = model.encode(image)
        pairs = torch.cosine_similarity(latent.flatten(1)[:, None], latent.flatten(1)[None], dim=2)
        nearest = [max(set(range(12)) - {i}, key=lambda j, i=i: pairs[i, j]) for i in range(12)]
        half = torch.acos(pairs[range(12), nearest]) / 2
        weight = (half.sin() / (2 * half).sin())[:, None, None, None]
        between = model.decode(weight * (latent + latent[nearest]), noise=noise)
    fid = colour_fid()
    fid.add(image, between)
    found = measured_with_fid
    assert found.interpolated_fid == pytest.approx(fid.compute()[0], rel=1e-4)
    assert found.interpolated_fid != pytest.approx(found.fid, rel=1e-2)


@pytest.mark.parametrize("shares", [(12,), (5, 7), (0, 1, 0, 11), (4, 4, 4)])
def test_parts_add_up_to_the_whole(models, measured, shares):
    model, images, parts = models["objective"], draw_images(12), []
    linear = fit_linear_reference(model, images, torch.device("cpu"), batch_size=7)
    measurement = Measurement(model, batch_size=4, angles=(0.0, 30.0), linear=linear)
    for number, share in enumerate(shares):
        first = sum(shares[:number])
        parts.append(measurement.measure(images[first : first + share], first, 12))
    found, expected = measurement.summarize(join_parts(parts)), measured["objective"]
    assert_same_numbers(found.numbers(), expected.numbers())
    shown = min(next(filter(None, shares)), len(expected.pictures.original))
    assert torch.equal(found.pictures.original, expected.pictures.original[:shown])


def test_the_closer_look_is_at_few_images_evenly_chosen(models):
    result = evaluate(models["objective"], draw_images(CHOSEN + 7), batch_size=64)
    assert result.protocol["chosen_images"] == (CHOSEN + 8) // 2
    assert result.protocol["images"] == CHOSEN + 7


@pytest.mark.parametrize(
    ("group", "planes", "chirality", "sides"),
    [
        ("C4", 4, 0.5, 16),
        ("flips", 4, 0.5, (16, 24)),
        ("mirror", 0, 0.5, 16),
        ("trivial", 0, 0, 16),
    ],
)
def test_every_group_is_measured(group, planes, chirality, sides):
    changes = {"representation.group": group, "representation.rotation_dims": planes}
    changes |= {"representation.chirality_split": chirality, "data.resolution": sides}
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES | changes)).eval()
    height, width = model.config.data.image_size
    result = evaluate(model, torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8))
    assert set(result.gap_db) == {g.name for g in model.group}
    assert result.worst_gap_db < 1e-4
    assert result.symmetric_worst_gap_db < 1e-4
    assert max(result.encoder_error.values()) < 1e-9
    assert ("diagonal" in result.symmetric_gap_db) == (height == width)


def test_images_of_one_colour_each_have_finite_numbers(models):
    grey = torch.arange(4, dtype=torch.uint8).mul(60).reshape(4, 1, 1, 1).expand(4, 3, 16, 16)
    found = evaluate(models["exact"], grey.contiguous(), batch_size=4).numbers()
    json.dumps(found, allow_nan=False)


def test_no_images_are_refused(models):
    with pytest.raises(ValueError, match="no images"):
        evaluate(models["exact"], draw_images(0))


class WrongAction(torch.nn.Module):
    """Our model with an action that is not one: the mirror forgets the channels."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model
        self.group, self.representation = model.group, model.representation

    def encode(self, image):
        return self.model.encode(image)

    def decode(self, latent, steps=None, noise=None, seed=None):
        return self.model.decode(latent, steps, noise, seed)

    def act(self, element, latent):
        if element.name == "flip_h":
            return element.act_on_image(latent)
        return self.model.act(element, latent)


def test_a_wrong_action_is_found_and_a_model_without_velocity_is_measured(models):
    model = WrongAction(models["exact"])
    assert not isinstance(model, FlowTokenizer)
    result = evaluate(model, draw_images(6))
    assert result.group_law_error > 0.1
    assert result.encoder_error["flip_h"] > 0.1 > 1e-9 > result.encoder_error["flip_v"]
    assert result.loss_by_time is None
    assert result.psnr_by_steps == {}
    assert result.noise_floor_db is not None  # it has no velocity to show, but draws noise


SHARES = ((5, 7), (12, 0))
RANK = """
import json, sys
import torch, torch.distributed as dist
from tests.unit.evaluation.test_evaluation import SHARES, build, colour_fid, draw_images
from efae.evaluation.evaluate import evaluate
torch.set_num_threads(1)
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
for shares in SHARES:
    first = sum(shares[:rank])
    images = draw_images(sum(shares))[first : first + shares[rank]]
    model, fid = build("objective"), colour_fid()
    found = evaluate(model, images, batch_size=4, angles_degrees=(30,), fid=fid)
    print(json.dumps(found.numbers()))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one(measured_with_fid):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(port)],
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    found = [[json.loads(line) for line in text.splitlines()] for text in printed]
    one = json.loads(json.dumps(measured_with_fid.numbers()))
    for first, second in zip(*found, strict=True):
        assert_same_numbers(first, one)
        assert first | {"seconds": 0} == second | {"seconds": 0}
        assert first["protocol"] == one["protocol"]
