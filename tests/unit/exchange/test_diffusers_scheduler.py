"""diffusers' FlowMatch schedulers take our model's velocity as it is: one sign, one path, one t."""

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler

from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.flow import interpolate
from efae.model.sampler import integrate, time_grid

SIZES = {
    "data.resolution": 16,
    "model.hidden_size": 16,
    "model.encoder_hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 1,
}

every_prediction = pytest.mark.parametrize("prediction", ["image", "velocity"])


@pytest.fixture
def decoding(prediction):
    """A model with weights that are random everywhere, a latent and the noise to start from."""
    generator = torch.Generator().manual_seed(0)
    model = Autoencoder(with_overrides(Config(), {**SIZES, "flow.prediction": prediction})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    image, noise = torch.randn(2, 3, 3, 16, 16, generator=generator)
    with torch.no_grad():
        yield model, model.encode(image), noise


def step_through(scheduler, model, latent, noise):
    """The loop of diffusers' pipelines, with our velocity in the place of theirs."""
    x = noise
    for timestep in scheduler.timesteps:
        t = (timestep / scheduler.config.num_train_timesteps).expand(len(x))
        x = scheduler.step(model.velocity(x, t, latent), timestep, x).prev_sample
    return x


def sample(model, latent, noise, times, method):
    def velocity(x, t):
        return model.velocity(x, x.new_full((len(x),), t), latent)

    return integrate(velocity, noise, times, method)


def assert_same(ours, theirs, noise):
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, float(ours.abs().max()))
    assert (ours - noise).abs().max() > 0.1, "the sampler did nothing"


@every_prediction
@pytest.mark.parametrize("grid", [{}, {"shift": 3.0}, {"power": 2.0}], ids=str)
def test_euler_is_theirs_on_our_grid(decoding, grid):
    model, latent, noise = decoding
    times = time_grid(8, **grid)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    theirs = step_through(scheduler, model, latent, noise)
    assert_same(sample(model, latent, noise, times, "euler"), theirs, noise)


@every_prediction
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_our_euler_runs_on_their_grid(decoding, shift):
    model, latent, noise = decoding
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    theirs = step_through(scheduler, model, latent, noise)
    assert_same(sample(model, latent, noise, scheduler.sigmas, "euler"), theirs, noise)


@every_prediction
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_is_theirs_on_their_grid(decoding, shift):
    """Theirs takes no other grid than its own; its last step is Euler's too."""
    model, latent, noise = decoding
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    theirs = step_through(scheduler, model, latent, noise)
    times = scheduler.sigmas.unique().flip(0)
    assert len(times) == 8 + 1
    assert_same(sample(model, latent, noise, times, "heun"), theirs, noise)
    euler = sample(model, latent, noise, times, "euler")
    assert (euler - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_is_theirs(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=time_grid(10)[:-1].tolist())
    assert torch.allclose(scheduler.sigmas.double(), time_grid(10, shift=shift), atol=1e-6)


def test_their_path_is_ours():
    """scale_noise is flow.interpolate."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    image, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    chosen = scheduler.timesteps[[0, 2, 3]]
    theirs = scheduler.scale_noise(image, chosen, noise)
    assert torch.allclose(interpolate(image, noise, chosen / 1000), theirs, atol=1e-6)
