"""The loss of a generator, from latents to a loss per example.

Each example draws t, noise, and whether the null condition replaces its label; a chosen share is
acted on by a drawn element of the group, which the network is told (Karras et al. 2022,
arXiv:2206.00364, appendix F), so that every latent serves as all its views. An element only moves
and negates numbers, so views are made on the device, where they cost nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from efae.config import GeneratorConfig
from efae.generation.network import Generator
from efae.model import flow
from efae.model.objective import BatchDraws
from efae.symmetry import GROUPS


@dataclass(frozen=True)
class LatentDraws(BatchDraws):
    """The random draws of a batch of latents, with its labels.

    Attributes:
        noise: Standard normal noise that the flow starts from.
        label: Classes, data.classes where the label is dropped; None without labels.
        element: Positions in the group of the elements that act; None without views.
    """

    noise: Float[Tensor, "b dim h w"]
    label: Int[Tensor, "b"] | None = None
    element: Int[Tensor, "b"] | None = None


def draw(
    config: GeneratorConfig,
    shape: tuple[int, ...],
    label: Int[Tensor, "b"] | None,
    group: str,
    generator: torch.Generator,
) -> LatentDraws:
    """Draw everything random that the loss of a batch needs.

    Args:
        config: Configuration of the run.
        shape: Shape (b, dim, h, w) of the latents.
        label: Classes of the latents, on the generator's device; None without labels.
        group: Name of the group that acts on the latents.
        generator: Source of the draws, on the latents' device.
    """
    count, device = shape[0], generator.device
    t = flow.draw_time(count, config.flow, generator, device)
    element = None
    if config.data.views:
        element = torch.randint(len(GROUPS[group]), (count,), generator=generator, device=device)
        acts = torch.rand(count, generator=generator, device=device) < config.data.views
        element = element * acts  # the identity is first
    if label is not None and config.flow.condition_drop:
        drops = torch.rand(count, generator=generator, device=device) < config.flow.condition_drop
        label = torch.where(drops, config.data.classes, label)
    noise = torch.randn(shape, generator=generator, device=device)
    return LatentDraws(t, noise, label, element)


class GeneratorObjective(nn.Module):
    """The loss as a module around the network, so that DDP can wrap both.

    Args:
        model: Network to train.
    """

    def __init__(self, model: Generator):
        super().__init__()
        self.model = model

    def forward(
        self, latent: Float[Tensor, "b dim h w"], draws: LatentDraws
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Return the loss and the t of each example.

        Args:
            latent: Latents, as their set stores them, in float32.
            draws: Draws of these latents.
        """
        model, prediction = self.model, self.model.config.flow.prediction
        latent = model.normalization.normalize(latent)
        if draws.element is not None:
            latent = model.representation.act(draws.element, latent)
        x_t = flow.interpolate(latent, draws.noise, draws.t)
        output = model(x_t, draws.t, draws.label, draws.element)
        return flow.flow_loss(output, latent, draws.noise, draws.t, prediction), draws.t
