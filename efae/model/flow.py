"""Rectified flow (Liu et al. 2022, arXiv:2209.03003): path, distribution of t, loss.

The sign convention everywhere is that of minRF, SD3, FLUX and diffusers' FlowMatch schedulers:

    x_t = (1 - t) * image + t * noise        velocity = dx_t / dt = noise - image

t = 1 is noise; sampling integrates from t = 1 down to t = 0 (efae/model/sampler.py).
"""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from efae.config import FlowConfig

# The error of an image prediction is divided by t, which makes it an error of the velocity; below
# this t the loss divides by the constant. With 0.05 a tenth of uniform t dominated all gradients:
# 22 dB after 600 steps, against 25.5 dB with 0.5, and the same at 1 to 50 sampler steps.
SMALLEST_T = 0.5
_ndtri = cast(Callable[[Tensor], Tensor], torch.special.ndtri)  # untyped in torch


def draw_time(
    count: int, config: FlowConfig, generator: torch.Generator, device: torch.device | str
) -> Float[Tensor, "b"]:
    """Draw t in (0, 1), one per example.

    Logit-normal (Esser et al. 2024, arXiv:2403.03206, eq. 19), uniform, or a mixture of the two.
    Stratified sampling draws one number from each of `count` equal slices, in random order: the
    same distribution with less variance from batch to batch.
    """
    u = torch.rand(count, generator=generator, device=device)
    if config.stratified:
        slices = torch.randperm(count, generator=generator, device=device)
        u = (slices + u) / count
    return quantile_of_time(u, config)


def quantile_of_time(u: Float[Tensor, "b"], config: FlowConfig) -> Float[Tensor, "b"]:
    """Map uniform u in [0, 1) to t; in a mixture, u below the uniform share gives uniform t."""
    if config.time_law == "uniform":
        return u
    share = config.time_uniform if config.time_law == "mixture" else 0.0
    normal = ((u - share) / (1 - share)).clamp(1e-6, 1 - 1e-6)
    t = torch.sigmoid(config.time_mean + config.time_std * _ndtri(normal))
    return torch.where(u < share, u / max(share, 1e-6), t)


def interpolate(
    image: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Float[Tensor, "b"]
) -> Float[Tensor, "b c h w"]:
    """Return x_t, the path of Liu et al., eq. 1, with t reversed."""
    t = t[:, None, None, None]
    return (1 - t) * image + t * noise


def velocity_from(
    output: Float[Tensor, "b c h w"],
    x_t: Float[Tensor, "b c h w"],
    t: Float[Tensor, "b"],
    prediction: str,
) -> Float[Tensor, "b c h w"]:
    """Convert a network output to a velocity; for an image prediction it has a pole at t = 0."""
    if prediction == "velocity":
        return output
    return (x_t - output) / t.clamp(min=1e-5)[:, None, None, None]


def image_from(
    output: Float[Tensor, "b c h w"],
    x_t: Float[Tensor, "b c h w"],
    t: Float[Tensor, "b"],
    prediction: str,
) -> Float[Tensor, "b c h w"]:
    """Convert a network output to an image; for a velocity, by one Euler step to t = 0."""
    if prediction == "image":
        return output
    return x_t - t[:, None, None, None] * output


def flow_loss(
    output: Float[Tensor, "b c h w"],
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    t: Float[Tensor, "b"],
    prediction: str,
    mask: Float[Tensor, "b 1 h w"] | None = None,
) -> Float[Tensor, "b"]:
    """Return the loss of Liu et al., eq. 1, per example: the mean squared error of the velocity.

    The mean is over (channel, height, width). An image prediction is compared with the image, and
    its squared error divided by max(t, SMALLEST_T)^2.

    Args:
        output: Output of the network at x_t.
        image: Images, the data.
        noise: Standard normal noise.
        t: Flow time, in (0, 1].
        prediction: Quantity that `output` predicts, "image" or "velocity".
        mask: Weight of each pixel in the mean; None weighs all alike.
    """
    if prediction == "velocity":
        error = (output.float() - (noise - image)).square()
    else:
        error = (output.float() - image).square() / t.clamp(min=SMALLEST_T).square()[
            :, None, None, None
        ]
    if mask is None:
        return error.mean((1, 2, 3))
    return (error * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * error.shape[1])
