"""Rectified flow (Liu et al. 2022, arXiv:2209.03003): path, time law, loss, sampler.

The one sign convention, that of minRF, SD3, FLUX and diffusers' FlowMatch schedulers:

    x_t = (1 - t) * image + t * noise        velocity = dx_t / dt = noise - image

t = 1 is noise; sampling integrates from t = 1 down to t = 0.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from efae.config import FlowConfig

# An image prediction x becomes the velocity (x_t - x) / t; below this t the division is by it.
SMALLEST_T = 0.05


def draw_time(
    count: int, config: FlowConfig, generator: torch.Generator, device: torch.device | str
) -> Float[Tensor, "b"]:
    """T in (0, 1): logit-normal (Esser et al. 2024, arXiv:2403.03206, eq. 19) or uniform."""
    if config.time_law == "uniform":
        return torch.rand(count, generator=generator, device=device)
    logit = torch.randn(count, generator=generator, device=device)
    return torch.sigmoid(config.time_mean + config.time_std * logit)


def interpolate(image: Tensor, noise: Tensor, t: Float[Tensor, "b"]) -> Tensor:
    """x_t (eq. 1)."""
    t = t[:, None, None, None]
    return (1 - t) * image + t * noise


def velocity_from(output: Tensor, x_t: Tensor, t: Float[Tensor, "b"], prediction: str) -> Tensor:
    """The velocity that a network output means."""
    if prediction == "velocity":
        return output
    return (x_t - output) / t.clamp(min=SMALLEST_T)[:, None, None, None]


def flow_loss(velocity: Tensor, image: Tensor, noise: Tensor) -> Float[Tensor, "b"]:
    """Mean squared error of the velocity over (channel, height, width), per example."""
    return (velocity.float() - (noise - image)).square().mean((1, 2, 3))


def sample_euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 (noise) to t = 0 in equal Euler steps."""
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one")
    x = noise
    for step in range(steps):
        t = torch.full((len(x),), 1 - step / steps, device=x.device)
        x = x - velocity(x, t) / steps
    return x
