"""Measures of a decoder that follows a velocity field: loss, symmetry, sampler steps."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from efae.evaluation.measures import Totals, gradient_energy, psnr, ssim
from efae.evaluation.protocol import FlowTokenizer
from efae.model import flow

STEP_COUNTS = (1, 2, 4, 8, 16, 50)
"""Numbers of sampler steps to compare."""
TIME_BINS = 10
"""Equal bins of t over [0, 1], each measured at its middle."""


def measure_loss(
    model: FlowTokenizer,
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    latent: Float[Tensor, "b dim lh lw"],
    totals: Totals,
) -> None:
    """Measure the flow loss at the middle of each bin of t."""
    for i in range(TIME_BINS):
        t = torch.full((len(image),), (i + 0.5) / TIME_BINS, device=image.device)
        velocity = model.velocity(flow.interpolate(image, noise, t), t, latent)
        totals.add(f"loss {i}", flow.flow_loss(velocity, image, noise, t, "velocity"))


def measure_velocity(
    model: FlowTokenizer,
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    latent: Float[Tensor, "b dim lh lw"],
    totals: Totals,
) -> None:
    """Measure how far the velocity field is from commuting with each element, by bin of t."""
    for i in range(TIME_BINS):
        t = torch.full((len(image),), (i + 0.5) / TIME_BINS, device=image.device)
        x_t = flow.interpolate(image, noise, t)
        velocity = model.velocity(x_t, t, latent)
        totals.add(f"velocity {i}", velocity.square().mean((1, 2, 3)))
        for g in model.group:
            turned = model.velocity(g.act_on_image(x_t), t, model.act(g, latent))
            error = (turned - g.act_on_image(velocity)).square().mean((1, 2, 3))
            totals.add(f"velocity {i} {g}", error)


def measure_steps(
    model: FlowTokenizer,
    image: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    latent: Float[Tensor, "b dim lh lw"],
    totals: Totals,
    counts: Sequence[int] = STEP_COUNTS,
) -> None:
    """Measure PSNR, SSIM and gradient energy of decodes, by number of sampler steps."""
    totals.add("gradient", gradient_energy(image))
    for count in counts:
        sample = model.decode(latent, steps=count, noise=noise).clamp(-1, 1)
        totals.add(f"steps psnr {count}", psnr(sample, image))
        totals.add(f"steps ssim {count}", ssim(sample, image))
        totals.add(f"steps gradient {count}", gradient_energy(sample))
