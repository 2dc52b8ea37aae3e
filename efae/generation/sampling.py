"""Sampling of latents: from noise to the scale that the tokenizer decodes, guided by the label."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from efae.config import FlowConfig
from efae.generation.network import Generator
from efae.model import flow
from efae.model.octic.layers import expanded_once
from efae.model.sampler import Field, guide, integrate, time_grid


@dataclass(frozen=True)
class Guidance:
    """Sampler steps and classifier-free guidance.

    Attributes:
        steps: Number of sampler steps.
        scale: Scale of guidance; 1 is none.
        interval: Range of t in which it is applied.
    """

    steps: int
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def of(cls, settings: FlowConfig) -> "Guidance":
        """The defaults of a configuration."""
        return cls(settings.default_steps, settings.guidance_scale, settings.guidance_interval)


@torch.no_grad()
def sample_latents(
    model: Generator,
    noise: Float[Tensor, "b dim h w"],
    label: Int[Tensor, "b"] | None,
    guidance: Guidance,
) -> Float[Tensor, "b dim h w"]:
    """Sample latents at the identity's view, at the scale of their set.

    Args:
        model: Generator, in evaluation mode.
        noise: Standard normal noise; one sample per entry.
        label: Classes; None samples all of them as the training data do.
        guidance: Sampler steps and guidance.

    Raises:
        ValueError: Guidance is given a scale other than 1, and no null condition was trained; or a
            value is out of range.
    """
    settings = model.config.flow
    check_guidance(model, label is not None, guidance)

    def given(label: Tensor | None) -> Field:
        def velocity(x: Tensor, t: float) -> Tensor:
            times = x.new_full((len(x),), t)
            output = model.call_filled(model, x, times, label).to(x.dtype)
            return flow.velocity_from(output, x, times, settings.prediction)

        return velocity

    field = guide(given(label), given(None), guidance.scale, guidance.interval)
    times = time_grid(guidance.steps, power=settings.sampler_power, shift=settings.sampler_shift)
    with nullcontext() if model.compiled else expanded_once(model):
        return model.normalization.denormalize(integrate(field, noise, times, settings.sampler))


def check_guidance(model: Generator, has_labels: bool, guidance: Guidance) -> None:
    """Check that samples can be guided, and the values.

    Raises:
        ValueError: Guidance is given a scale other than 1, and there are no labels or no null
            condition was trained; or a value is out of range.
    """
    settings = model.config
    trained = settings.data.classes and settings.flow.condition_drop
    if guidance.scale != 1 and not (has_labels and trained):
        raise ValueError(
            f"guidance {guidance.scale}: it needs labels, and a generator trained with data.classes"
            " and flow.condition_drop above 0; set it to 1"
        )
    time_grid(guidance.steps, power=settings.flow.sampler_power, shift=settings.flow.sampler_shift)
    guide(_stand_still, _stand_still, guidance.scale, guidance.interval)


def _stand_still(x: Tensor, t: float) -> Tensor:
    return x
