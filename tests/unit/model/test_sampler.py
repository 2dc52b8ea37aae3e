"""Solvers against closed forms: their order, their cost, and the law that they end in."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.sampler import EVALUATIONS, guide, integrate, time_grid
from efae.symmetry import GROUPS

METHODS = tuple(EVALUATIONS)
ORDER = {"euler": 1, "midpoint": 2, "heun": 2}
GRIDS = ({}, {"power": 2.0}, {"power": 0.7}, {"shift": 3.0}, {"power": 1.5, "shift": 2.0})
MEAN, STD = 0.7, 0.3
"""Of the Gaussian data."""
MIXTURE = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 0.8]), torch.tensor([0.4, 0.25])
"""Weights, means and standard deviations of the data that are a mixture of two Gaussians."""

every_method = pytest.mark.parametrize("method", METHODS)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gaussian(x, t):
    """E(noise - image | x_t = x) of data N(MEAN, STD^2): linear in x, nonlinear in t."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def law_at(t):
    """The law of x_t when the data are the mixture."""
    weights, means, stds = (part.double() for part in MIXTURE)
    spread = ((1 - t) ** 2 * stds**2 + t**2).sqrt()
    return MixtureSameFamily(Categorical(weights), Normal((1 - t) * means, spread))


def mixture(x, t):
    """E(noise - image | x_t = x) of the mixture: the components' fields, weighted."""
    weights, means, stds = (part.double() for part in MIXTURE)
    law = law_at(t)
    share = (law.component_distribution.log_prob(x[..., None]) + weights.log()).softmax(-1)
    variance = law.component_distribution.variance
    slope = (t - (1 - t) * stds**2) / variance
    return (share * (slope * (x[..., None] - (1 - t) * means) - means)).sum(-1)


def order_of(method, error_at, steps=(64, 128)):
    """The exponent of the error in the step."""
    coarse, fine = (float(error_at(n, method)) for n in steps)
    return math.log2(coarse / fine)


@every_method
def test_order_on_exponential_decay(method):
    def error(steps, method):
        end = integrate(
            lambda x, t: x, torch.ones(1, dtype=torch.float64), time_grid(steps), method
        )
        return (end - math.exp(-1)).abs()

    assert order_of(method, error) == pytest.approx(ORDER[method], abs=0.06)


@every_grid
@every_method
def test_order_and_law_on_gaussian_data(method, grid):
    """The flow carries x to MEAN + STD * x: all x, hence the law N(0, 1) to N(MEAN, STD^2)."""
    x = draw(256)

    def error(steps, method):
        return (integrate(gaussian, x, time_grid(steps, **grid), method) - MEAN - STD * x).norm()

    order = order_of(method, error, (128, 256))
    expected = ORDER[method]
    if method == "heun":  # its last step is Euler's, and (1 / steps)^power long
        expected = min(2, 2 * grid.get("power", 1.0))
    # On this field midpoint happens to be of third order.
    assert order == pytest.approx(expected, abs=0.1) or (method == "midpoint" and order > 2)
    assert error(256, method) / x.norm() < (1e-2 if method == "euler" else 1e-3)


@every_method
def test_order_and_law_on_a_mixture(method):
    """In one dimension the flow keeps the order of points, so it keeps their quantiles."""
    x = draw(64)
    quantile = Normal(0, 1).cdf(x)

    def error(steps, method):
        return (law_at(0.0).cdf(integrate(mixture, x, time_grid(steps), method)) - quantile).norm()

    assert order_of(method, error, (128, 256)) == pytest.approx(ORDER[method], abs=0.1)
    assert error(256, method) / math.sqrt(len(x)) < (2e-3 if method == "euler" else 2e-5)


@every_method
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_path_needs_one_step(method, steps):
    image, noise = draw(4, 3, 8, 8), draw(4, 3, 8, 8, seed=1)
    sample = integrate(lambda x, t: noise - image, noise, time_grid(steps), method)
    assert torch.allclose(sample, image, atol=1e-12)


@every_method
def test_evaluations_and_their_times(method):
    seen = []

    def record(x, t):
        seen.append(t)
        return x

    integrate(record, draw(2), time_grid(5), method)
    fallback = method == "heun"  # its last step costs one
    assert len(seen) == 5 * EVALUATIONS[method] - fallback
    assert all(0 < t <= 1 for t in seen)
    assert all(isinstance(t, float) for t in seen)


@every_method
@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_image_prediction_has_no_velocity_at_zero(method, steps):
    """(x - image) / t: finite on the way, and its one solution ends in the image."""
    image, noise = draw(4), draw(4, seed=1)
    end = integrate(lambda x, t: (x - image) / t, noise, time_grid(steps), method)
    assert torch.allclose(end, image, atol=1e-12)


def test_heun_corrects_a_last_step_that_ends_above_zero():
    x = torch.ones(1, dtype=torch.float64)
    end = integrate(lambda x, t: x, x, [1.0, 0.5], "heun")
    assert float(end) == pytest.approx(1 - 0.5 + 0.5**2 / 2, abs=1e-12)


@every_method
def test_visit_sees_every_state_from_noise_to_sample(method):
    states, noise, times = [], draw(2, 3), time_grid(6, shift=3.0)
    end = integrate(gaussian, noise, times, method, visit=lambda t, x: states.append((t, x)))
    assert [t for t, _ in states] == times.tolist()
    assert states[0][1] is noise
    assert states[-1][1] is end
    third = integrate(gaussian, noise, times[:4], method)
    assert torch.equal(states[3][1], third)


@every_method
def test_type_stays_and_gradients_flow(method):
    noise = draw(3).float().requires_grad_()
    end = integrate(gaussian, noise, time_grid(8), method)
    assert end.dtype == torch.float32
    end.sum().backward()
    assert float((noise.grad - STD).abs().max()) < 0.2


@every_method
def test_no_value_is_read_back_from_the_device(method):
    """A meta tensor has no values: whoever asks for one fails."""
    noise = torch.empty(2, 3, 8, 8, device="meta")
    field = guide(lambda x, t: x, lambda x, t: -x, 2.0, (0.3, 0.6))
    assert integrate(field, noise, time_grid(8, shift=3.0), method).device.type == "meta"


@every_grid
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_grid_falls_from_one_to_zero(grid, steps):
    times = time_grid(steps, **grid)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert (float(times[0]), float(times[-1])) == (1.0, 0.0)
    assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("value", [1e-3, 0.1, 0.3, 1 / 3, 3.0, 7.0, 1e3])
def test_ends_are_exact_at_every_shift(value):
    times = time_grid(10, shift=value)
    assert (float(times[0]), float(times[-1])) == (1.0, 0.0)


def test_grids_against_their_formulas():
    u = torch.linspace(1, 0, 26, dtype=torch.float64)
    assert torch.equal(time_grid(25), u)
    assert torch.allclose(time_grid(25, power=4.0), u**4, atol=1e-15)
    assert torch.allclose(time_grid(25, shift=3.0), 3 * u / (1 + 2 * u), atol=1e-15)
    both = time_grid(25, power=2.0, shift=3.0)
    assert torch.allclose(both, 3 * u**2 / (1 + 2 * u**2), atol=1e-15)


@pytest.mark.parametrize(
    ("grid", "towards"),
    [
        ({"power": 4.0}, "image"),
        ({"power": 0.5}, "noise"),
        ({"shift": 3.0}, "noise"),
        ({"shift": 1 / 3}, "image"),
    ],
    ids=str,
)
def test_where_points_are_dense(grid, towards):
    steps = -time_grid(20, **grid).diff()
    if towards == "image":
        steps = steps.flip(0)
    assert bool((steps.diff() > 0).all())


def test_shifts_compose_by_multiplication():
    """A shift multiplies t / (1 - t)."""
    once = time_grid(9, shift=2.0)
    assert torch.allclose(3 * once / (1 + 2 * once), time_grid(9, shift=6.0), atol=1e-15)
    assert torch.allclose(1 - time_grid(9, shift=0.25).flip(0), time_grid(9, shift=4.0), atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0: at least one"),
        ({"steps": -3}, "steps=-3"),
        ({"steps": 4, "power": 0.0}, r"power=0\.0: must be positive"),
        ({"steps": 4, "power": math.inf}, "power=inf"),
        ({"steps": 4, "shift": -1.0}, r"shift=-1\.0: must be positive"),
        ({"steps": 4, "shift": math.nan}, "shift=nan"),
        ({"steps": 50, "power": 1e3}, r"power=1000\.0, shift=1\.0: two of 50 steps"),
    ],
    ids=str,
)
def test_grid_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_grid(**arguments)


@pytest.mark.parametrize(
    "times", [[], [1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.1, 0.0], [1.0, -0.1], [1.0, math.nan]]
)
def test_integrate_refuses_times_that_do_not_fall(times):
    with pytest.raises(ValueError, match="must be two or more, falling"):
        integrate(gaussian, draw(1), times)


def test_integrate_refuses_unknown_methods():
    with pytest.raises(ValueError, match="method='rk4': must be one of euler, midpoint, heun"):
        integrate(gaussian, draw(1), time_grid(2), "rk4")


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5, 4.0])
def test_guidance_against_its_closed_form(scale):
    """Fields a and b, constant in x, give the sample noise - ((1 - scale) b + scale a)."""
    noise, a, b = draw(5), draw(5, seed=1), draw(5, seed=2)
    field = guide(lambda x, t: a, lambda x, t: b, scale)
    end = integrate(field, noise, time_grid(7))
    assert torch.allclose(end, noise - (1 - scale) * b - scale * a, atol=1e-12)


def test_guidance_acts_in_its_interval_only():
    """Open below and closed above: at t = 1, .75, .5, .25 it acts at .75 and .5."""
    noise, a, b = draw(5), draw(5, seed=1), draw(5, seed=2)
    passes = []

    def unconditional(x, t):
        passes.append(t)
        return b

    field = guide(lambda x, t: a, unconditional, 3.0, (0.25, 0.75))
    end = integrate(field, noise, time_grid(4))
    assert passes == [0.75, 0.5]
    assert torch.allclose(end, noise - a - 0.5 * 2 * (a - b), atol=1e-12)


def test_scale_one_costs_no_second_pass():
    assert guide(gaussian, mixture, 1.0) is gaussian


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -0.5}, r"scale=-0\.5"),
        ({"scale": math.nan}, "scale=nan"),
        ({"scale": 2.0, "interval": (0.5, 0.5)}, r"interval=\(0\.5, 0\.5\)"),
        ({"scale": 2.0, "interval": (0.8, 0.2)}, r"0 <= low < high <= 1"),
        ({"scale": 1.0, "interval": (-0.1, 1.0)}, r"interval=\(-0\.1"),
    ],
    ids=str,
)
def test_guidance_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        guide(gaussian, gaussian, **arguments)


SIZES = {
    "data.resolution": 16,
    "model.hidden_size": 16,
    "model.encoder_hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 1,
}


@pytest.mark.parametrize("group", GROUPS)
def test_sampling_commutes_with_every_element(group):
    """By every method, with guidance, of a model whose layers do: g noise, rho(g) z give g x."""
    planes = {} if GROUPS[group].turns else {"representation.rotation_dims": 0}
    split = {} if len(GROUPS[group]) > 1 else {"representation.chirality_split": 0.0}
    knobs = {**SIZES, "representation.group": group, **planes, **split}
    model = Autoencoder(with_overrides(Config(), knobs))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model = model.double().eval()
    latent, noise = model.encode(draw(2, 3, 16, 16)), draw(2, 3, 16, 16, seed=1)

    def sample(latent, noise, method):
        def conditional(x, t):
            return model.velocity(x, x.new_full((len(x),), t), latent)

        field = guide(conditional, gaussian, 1.5, (0.2, 0.8))
        return integrate(field, noise, time_grid(3, shift=2.0), method)

    with torch.no_grad():
        for method in METHODS:
            plain = sample(latent, noise, method)
            for g in model.group:
                moved = sample(model.act(g, latent), g.act_on_image(noise), method)
                error = (moved - g.act_on_image(plain)).norm() / plain.norm()
                assert error < 1e-10, (method, g)
                if g != model.group.identity:
                    still = sample(latent, g.act_on_image(noise), method)
                    assert (still - g.act_on_image(plain)).norm() / plain.norm() > 1e-3
