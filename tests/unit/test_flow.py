"""The sign convention, the loss and the sampler, against closed forms."""

import pytest
import torch

from efae.config import FlowConfig
from efae.model import flow

IMAGE, NOISE = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
T = torch.tensor([0.1, 0.4, 0.7, 1.0])


def test_path_goes_from_image_to_noise_at_constant_velocity():
    assert torch.equal(flow.interpolate(IMAGE, NOISE, torch.zeros(4)), IMAGE)
    assert torch.equal(flow.interpolate(IMAGE, NOISE, torch.ones(4)), NOISE)
    step = 1e-3
    moved = flow.interpolate(IMAGE, NOISE, T + step) - flow.interpolate(IMAGE, NOISE, T)
    assert torch.allclose(moved / step, NOISE - IMAGE, atol=1e-2)


def test_loss_of_the_oracle_is_zero_and_has_one_number_per_example():
    x_t = flow.interpolate(IMAGE, NOISE, T)
    for output, prediction in ((IMAGE, "image"), (NOISE - IMAGE, "velocity")):
        loss = flow.flow_loss(flow.velocity_from(output, x_t, T, prediction), IMAGE, NOISE)
        assert loss.shape == (4,)
        assert loss.max() < 1e-9
    wrong = flow.flow_loss(IMAGE - NOISE, IMAGE, NOISE)
    assert torch.allclose(wrong, 4 * (NOISE - IMAGE).square().mean((1, 2, 3)))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_on_the_exact_velocity_returns_the_image(steps):
    sample = flow.sample_euler(lambda x, t: NOISE - IMAGE, NOISE, steps)
    assert torch.allclose(sample, IMAGE, atol=1e-5)


def test_euler_is_of_first_order():
    """dx/dt = x from t = 1 to 0 multiplies by 1/e; halving the step halves the error."""
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = [
        abs(float(flow.sample_euler(lambda x, t: x, start, n)) - torch.e**-1) for n in (64, 128)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


def test_euler_refuses_no_steps():
    with pytest.raises(ValueError, match="steps=0"):
        flow.sample_euler(lambda x, t: x, NOISE, 0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5)])
def test_logit_normal_law(mean, std):
    config = FlowConfig(time_law="logit_normal", time_mean=mean, time_std=std)
    t = flow.draw_time(20_000, config, torch.Generator().manual_seed(0), "cpu")
    logit = torch.logit(t.double())
    assert float(logit.mean()) == pytest.approx(mean, abs=0.03)
    assert float(logit.std()) == pytest.approx(std, rel=0.03)


def test_uniform_law():
    config = FlowConfig(time_law="uniform")
    t = flow.draw_time(20_000, config, torch.Generator().manual_seed(0), "cpu")
    counts = torch.histc(t, 10, 0, 1)
    assert float((counts / 2000 - 1).abs().max()) < 0.1
