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


@pytest.mark.parametrize("prediction", ["image", "velocity"])
def test_loss_of_the_oracle_is_zero_and_has_one_number_per_example(prediction):
    x_t = flow.interpolate(IMAGE, NOISE, T)
    output = IMAGE if prediction == "image" else NOISE - IMAGE
    assert torch.allclose(flow.velocity_from(output, x_t, T, prediction), NOISE - IMAGE, atol=1e-4)
    assert torch.allclose(flow.image_from(output, x_t, T, prediction), IMAGE, atol=1e-4)
    loss = flow.flow_loss(output, IMAGE, NOISE, T, prediction)
    assert loss.shape == (4,)
    assert loss.max() < 1e-9


def test_the_loss_is_the_velocity_error_whatever_is_predicted():
    t, output = torch.linspace(flow.SMALLEST_T, 1, 4), torch.randn(4, 3, 8, 8)
    velocity = flow.velocity_from(output, flow.interpolate(IMAGE, NOISE, t), t, "image")
    by_velocity = flow.flow_loss(velocity, IMAGE, NOISE, t, "velocity")
    assert torch.allclose(flow.flow_loss(output, IMAGE, NOISE, t, "image"), by_velocity, rtol=1e-4)
    expected = (velocity - (NOISE - IMAGE)).square().mean((1, 2, 3))
    assert torch.allclose(by_velocity, expected)


def test_image_errors_are_not_blown_up_where_no_noise_is_left():
    smallest = torch.full((4,), flow.SMALLEST_T)
    losses = [
        flow.flow_loss(IMAGE + 1, IMAGE, NOISE, t, "image") for t in (smallest / 100, smallest)
    ]
    assert torch.equal(*losses)


def test_a_mask_weighs_pixels():
    mask = torch.zeros(4, 1, 8, 8)
    mask[..., :2, :] = 1
    wrong = IMAGE.clone()
    wrong[..., 2:, :] += 5
    assert flow.flow_loss(wrong, IMAGE, NOISE, T, "image", mask).max() < 1e-9
    wrong[..., :1, :] += 1  # half of the pixels that count
    loss = flow.flow_loss(wrong, IMAGE, NOISE, T, "image", mask)
    assert torch.allclose(loss, 0.5 / T.clamp(min=flow.SMALLEST_T).square(), rtol=1e-4)


def draw(count=20_000, **knobs):
    config = FlowConfig(**knobs)
    return flow.draw_time(count, config, torch.Generator().manual_seed(0), "cpu")


both = pytest.mark.parametrize("stratified", [False, True])


@both
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5)])
def test_logit_normal_law(mean, std, stratified):
    t = draw(time_law="logit_normal", time_mean=mean, time_std=std, stratified=stratified)
    logit = torch.logit(t.double())
    assert float(logit.mean()) == pytest.approx(mean, abs=0.03)
    assert float(logit.std()) == pytest.approx(std, rel=0.03)


@both
def test_uniform_law(stratified):
    counts = torch.histc(draw(time_law="uniform", stratified=stratified), 10, 0, 1)
    assert float((counts / 2000 - 1).abs().max()) < 0.1


@both
def test_mixture_starves_no_t(stratified):
    """Far from the mean of a narrow law, what is left is the uniform share."""
    knobs = {"time_mean": 3.0, "time_std": 0.2, "stratified": stratified}
    mixture = draw(time_law="mixture", time_uniform=0.2, **knobs)
    assert float((mixture < 0.5).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert float((draw(time_law="logit_normal", **knobs) < 0.5).float().mean()) == 0


def test_strata_hold_one_draw_each_in_random_order():
    t = draw(count=50, time_law="uniform")
    assert torch.equal((t * 50).floor().sort().values, torch.arange(50.0))
    assert not torch.equal(t.argsort(), torch.arange(50))
