"""Diffusability: against latents whose numbers are known, and under the group."""

import math
from dataclasses import asdict

import pytest
import scipy.fft
import torch

from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.diffusability import (
    Diffusability,
    interpolate_with_nearest,
    local_distant_similarity,
    measure_latents,
    summarize_diffusability,
)
from efae.evaluation.measures import Totals, to_float
from efae.model.autoencoder import Autoencoder
from efae.symmetry import D4, FLIPS, Representation
from efae.training.state import TrainState
from efae.training.validation import Validation

WHITE = math.pi / 2


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measure(latent, image=None, blocks=None, batch_size=10**6) -> Diffusability:
    blocks = blocks or {"a1": slice(0, latent.shape[1])}
    image = draw(len(latent), 1, 16, 16, seed=1) if image is None else image
    totals = Totals()
    for start in range(0, len(latent), batch_size):
        few = slice(start, start + batch_size)
        measure_latents(image[few], latent[few], blocks, totals)
    return summarize_diffusability(totals, blocks)


def power_law(slope, *shape, seed=0):
    """A Gaussian field with E_uv = f^-slope, and the spectrum."""
    u, v = (torch.arange(side, dtype=torch.float64) / side for side in shape[-2:])
    frequency = (u[:, None] ** 2 + v**2).sqrt()
    frequency[0, 0] = math.inf
    energy = frequency**-slope
    field = scipy.fft.idctn((energy.sqrt() * draw(*shape, seed=seed)).numpy(), axes=(-2, -1),
                            norm="ortho")  # fmt: skip
    return torch.from_numpy(field), energy


def high_share(energy, share=0.25):
    height, width = energy.shape
    places = [(u, v) for u in range(height) for v in range(width)]
    high = sum(energy[u, v] for u, v in places if u + v > share * (height + width - 2))
    return float(high / energy.sum())


def test_white_noise():
    found = measure(draw(3000, 4, 8, 8))
    assert found.velocity_irreducible_variance == pytest.approx(WHITE, rel=0.01)
    assert found.spectral_energy_concentration == pytest.approx(
        high_share(torch.ones(8, 8)), abs=0.01
    )
    assert found.local_distant_similarity == pytest.approx(0, abs=0.005)
    assert found.spectral_slope == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("slope", [1, 2, 3])
def test_power_laws(slope):
    latent, energy = power_law(slope, 2000, 4, 8, 8)
    image, _ = power_law(2.5, 2000, 1, 8, 8, seed=2)
    found = measure(5 * latent, image)
    assert found.spectral_slope == pytest.approx(slope, abs=0.03)
    assert found.image_spectral_slope == pytest.approx(2.5, abs=0.05)
    assert found.spectral_slope_gap == pytest.approx(abs(slope - 2.5), abs=0.06)
    assert found.spectral_energy_concentration == pytest.approx(high_share(energy), abs=0.01)
    # The transform is orthogonal, so E has the eigenvalues of the cells' covariance.
    known = WHITE * float(energy.sqrt().mean() / energy.mean().sqrt())
    assert found.velocity_irreducible_variance == pytest.approx(known, rel=0.02)


def test_only_frequencies_of_the_latent_grid_count_in_images():
    coefficients = torch.zeros(50, 1, 32, 32, dtype=torch.float64)
    coefficients[..., :8, :8] = draw(50, 1, 8, 8)
    coefficients[..., 8:, :] = 100
    image = torch.from_numpy(scipy.fft.idctn(coefficients.numpy(), axes=(-2, -1), norm="ortho"))
    assert measure(draw(50, 2, 8, 8), image).image_spectral_slope == pytest.approx(0, abs=0.3)


def test_constant_fields_vary_in_one_direction_per_channel():
    constant = draw(4000, 3, 1, 1).expand(-1, -1, 4, 4)
    found = measure(constant)
    assert found.velocity_irreducible_variance == pytest.approx(WHITE / 4, rel=0.02)
    assert found.spectral_energy_concentration == pytest.approx(0, abs=1e-12)
    assert found.local_distant_similarity == pytest.approx(0, abs=1e-5)
    assert found.spectral_slope == 0


def test_latents_that_never_vary_have_nothing_to_predict():
    found = measure(draw(1, 3, 4, 4).expand(20, -1, -1, -1))
    assert found.velocity_irreducible_variance == pytest.approx(0, abs=1e-6)
    assert found.spectral_slope != 0  # the mean of each cell is part of the spectrum


def test_latents_that_are_all_equal_have_no_energy():
    found = measure(0.7 + 1e-8 * draw(20, 3, 4, 4))
    assert found.velocity_irreducible_variance == 0
    assert found.spectral_energy_concentration == 0
    assert found.spectral_slope == 0
    assert found.local_distant_similarity == pytest.approx(0, abs=1e-6)


def test_a_model_that_has_diverged_is_measured_without_an_error():
    assert math.isnan(measure(torch.full((4, 3, 4, 4), math.nan)).velocity_irreducible_variance)


@pytest.mark.parametrize(("place", "high"), [((1, 0), 0), ((1, 1), 1), ((3, 2), 1)])
def test_one_frequency(place, high):
    coefficients = torch.zeros(50, 2, 4, 4, dtype=torch.float64)
    coefficients[..., place[0], place[1]] = draw(50, 2)
    latent = torch.from_numpy(scipy.fft.idctn(coefficients.numpy(), axes=(-2, -1), norm="ortho"))
    found = measure(latent)
    assert found.spectral_energy_concentration == pytest.approx(high, abs=1e-9)
    assert found.velocity_irreducible_variance == pytest.approx(WHITE / 4, rel=0.05)


def test_velocity_variance_is_the_error_of_the_best_predictor_of_gaussian_latents():
    channels, cells = torch.tensor([4.0, 0.5]).double(), torch.tensor([3.0, 1.0, 0.2]).double()
    bases = [torch.linalg.qr(draw(n, n, seed=n))[0] for n in (2, 3)]
    latent = (channels[:, None] * cells).sqrt() * draw(40_000, 2, 3)
    latent = torch.einsum("ij,bjs,ts->bit", bases[0], latent, bases[1])
    found = measure(7 + 3 * latent[:, :, None], draw(40_000, 1, 1, 3))
    spread = float((channels[:, None] * cells).mean())
    closed = WHITE * float((channels[:, None] * cells).sqrt().mean()) / spread**0.5
    assert found.velocity_irreducible_variance == pytest.approx(closed, rel=0.01)
    x = latent.flatten(1) / spread**0.5
    errors: list[float] = []
    for t in (torch.arange(20) + 0.5) / 20:
        noise = draw(*x.shape, seed=99)
        x_t, v = (1 - t) * x + t * noise, noise - x
        best = torch.linalg.lstsq(x_t, v).solution  # the posterior mean of a Gaussian is linear
        errors.append(float((v - x_t @ best).square().mean()))
    assert found.velocity_irreducible_variance == pytest.approx(sum(errors) / 20, rel=0.01)


def test_windows_of_a_large_grid():
    assert measure(draw(100, 4, 32, 20)).velocity_irreducible_variance == pytest.approx(
        WHITE, rel=0.03
    )
    found = measure(draw(500, 2, 1, 1).expand(-1, -1, 32, 20))
    assert found.velocity_irreducible_variance == pytest.approx(WHITE / math.sqrt(16 * 10), rel=0.1)


@pytest.mark.parametrize("side", [(2, 2), (1, 3), (4, 4), (3, 6), (5, 5)])
def test_similarity_is_the_mean_over_pairs(side):
    latent = draw(3, 4, *side)
    radius = max(2, max(side) / 2)
    cells = [(y, x) for y in range(side[0]) for x in range(side[1])]
    for example, found in zip(latent, local_distant_similarity(latent), strict=True):
        near: list[float] = []
        far: list[float] = []
        for p in cells:
            for q in cells:
                distance = abs(p[0] - q[0]) + abs(p[1] - q[1])
                a, b = example[:, p[0], p[1]], example[:, q[0], q[1]]
                if distance:
                    (near if distance < radius else far).append(float(a @ b / a.norm() / b.norm()))
        assert float(found) == pytest.approx(sum(near) / len(near) - sum(far) / len(far), abs=1e-5)


def as_list(found):
    values = asdict(found)
    return [*values.pop("spectral_energy_concentration_by_irrep").values(), *values.values()]


@pytest.mark.parametrize(("side", "group"), [((4, 4), D4), ((20, 20), D4), ((3, 6), FLIPS)])
def test_no_number_changes_if_all_latents_are_acted_on(side, group):
    rho = Representation(group, a1=2, a2=1, b1=1, b2=1, e=2)
    latent = power_law(1.5, 30, rho.dim, *side)[0] + draw(1, rho.dim, *side, seed=1)
    image = draw(30, 3, side[0] * 2, side[1] * 2, seed=2)
    before = as_list(measure(latent, image, rho.blocks))
    for g in group:
        after = measure(rho.act(g, latent), g.act_on_image(image), rho.blocks)
        assert as_list(after) == pytest.approx(before, rel=1e-6, abs=1e-6), g


def test_quarter_turns_of_a_grid_that_is_not_square():
    rho = Representation(D4, a1=2, e=2)
    latent, image = draw(30, 6, 3, 6), draw(30, 3, 6, 12, seed=2)
    before = as_list(measure(latent, image, rho.blocks))
    for g in D4:
        after = measure(rho.act(g, latent), g.act_on_image(image), rho.blocks)
        assert as_list(after) == pytest.approx(before, rel=1e-6, abs=1e-6), g


def test_scale_and_shift_do_not_matter():
    latent = power_law(2, 100, 4, 4, 4)[0]
    found, shifted = (measure(z).scores() for z in (latent, 0.13 * (latent + 3)))
    for name in found.keys() - {"local_distant_similarity"}:
        assert shifted[name] == pytest.approx(found[name], rel=1e-6), name
    scaled = measure(0.13 * latent).scores()
    assert scaled == pytest.approx(found, rel=1e-5)


def test_concentration_by_irrep():
    blocks = {"a1": slice(0, 2), "e": slice(2, 6)}
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)
    smooth = draw(40, 2, 1, 1).expand(-1, -1, 4, 4)
    latent = torch.cat([smooth, 3 * draw(40, 4, 1, 1) * checkers], 1)
    found = measure(latent, blocks=blocks)
    by_irrep = found.spectral_energy_concentration_by_irrep
    assert by_irrep is not None
    assert by_irrep["a1"] == pytest.approx(0, abs=1e-9)
    assert by_irrep["e"] > 0.9
    energy = latent - latent.mean((0, 2, 3), keepdim=True)
    share = float(energy[:, 2:].square().sum() / energy.square().sum())
    assert found.spectral_energy_concentration == pytest.approx(share * by_irrep["e"])


def test_batches_do_not_matter():
    latent = draw(50, 4, 4, 4)
    assert as_list(measure(latent, batch_size=7)) == pytest.approx(as_list(measure(latent)))


def test_a_vector_has_no_spectrum():
    found = measure(draw(5000, 6, 1, 1))
    assert found.velocity_irreducible_variance == pytest.approx(WHITE, rel=0.01)
    assert found.scores().keys() == {"velocity_irreducible_variance"}


def test_validation_measures_the_averaged_weights(monkeypatch):
    sizes = {
        "data.resolution": 16,
        "representation.dim": 12,
        "representation.rotation_dims": 6,
        "model.hidden_size": 32,
        "model.encoder_hidden_size": 32,
        "model.num_heads": 2,
        "model.depth": 1,
        "model.patch_size": 4,
        "model.downsampling": 4,
        "flow.sampler_steps": 1,
    }
    state = TrainState.create(with_overrides(Config(), sizes), torch.device("cpu"))
    images = torch.randint(
        0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    curves = Validation(images, torch.device("cpu")).measure(state)
    with torch.no_grad():
        image = to_float(images)
        latent = state.model.eval().encode(image)
    known = measure(latent, image, state.model.representation.blocks).scores()
    assert len(known) == 4
    assert {name: curves[name] for name in known} == pytest.approx(known, rel=1e-5)
    # And the same in parts, where the batch does not fit into memory.
    decode, sizes, drawn = Autoencoder.decode, [], []

    def decode_few(model, latent, **options):
        sizes.append(len(latent))
        if len(latent) > 5:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return decode(model, latent, **options)

    monkeypatch.setattr(Autoencoder, "decode", decode_few)
    monkeypatch.setattr(Validation, "_draw", lambda _, show, *shown: drawn.append(shown))
    validation = Validation(images, torch.device("cpu"), show=print)
    assert validation.measure(state) == pytest.approx(curves, rel=1e-4, abs=1e-6)
    assert torch.equal(drawn[0][1], image)
    assert sizes[:3] == [12, 6, 3]
    del sizes[:]
    validation.measure(state)
    assert max(sizes) == 3  # without another attempt


def interpolate(everything, first=0, batch_size=4):
    batches = interpolate_with_nearest(everything, first, len(everything) - first, batch_size)
    return torch.cat(list(batches))


def test_interpolation_is_half_way_on_the_arc_to_the_nearest_other_latent():
    directions = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 1], [1, 0.5, 0], [0, 0, 1]])
    found = interpolate(directions[:, :, None, None], first=1, batch_size=3).flatten(1)
    half = torch.atan2(torch.tensor(2.0), torch.tensor(1.0)) / 2  # from (1, 0.5) to (0, 2)
    weight = half.sin() / (2 * half).sin()
    assert torch.allclose(found[0], weight * torch.tensor([1, 2.5, 0]))
    assert torch.allclose(found[[1, 3]], directions[2])  # its equal is its neighbour
    assert interpolate(torch.tensor([[1.0], [-1.0]])[:, :, None, None]).abs().max() == 0


@pytest.mark.parametrize("g", list(D4), ids=str)
def test_interpolation_commutes_with_the_group(g):
    representation = Representation(D4, a1=2, b1=1, e=2)
    latent = draw(9, representation.dim, 3, 3)
    found = interpolate(representation.act(g, latent))
    assert torch.allclose(found, representation.act(g, interpolate(latent)))
