"""A rectified flow of latents: our decoder over the trivial group, conditioned on the view."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.downstream.settings import ELEMENTS, Settings
from efae.config import FlowConfig, ModelConfig, OptimizerConfig
from efae.model.flow import draw_time, flow_loss, interpolate, quantile_of_time
from efae.model.networks.transformer import Decoder
from efae.model.sampler import integrate, time_grid
from efae.symmetry import TRIVIAL, Representation
from efae.training.ema import MovingAverage
from efae.training.loop import seed_of
from efae.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate

FLOW = FlowConfig(prediction="velocity", time_law="logit_normal")
_SAMPLED_AT_ONCE = 512


@dataclass(frozen=True)
class _Grid:
    """Size of the decoder's images, which are latents here."""

    channels: int
    image_size: tuple[int, int]


class LatentFlow(nn.Module):
    """Network: (x_t (b, dim, h, w), t (b,), view (b,)) -> velocity, with one token per cell.

    The decoder's latent is the view, one-hot in a single cell. It conditions every token by its
    position, and adaLN together with t.
    """

    def __init__(self, shape: tuple[int, int, int], settings: Settings):
        super().__init__()
        dim, height, width = shape
        sizes = ModelConfig(
            hidden_size=settings.hidden_size, depth=settings.depth, patch_size=1, downsampling=width
        )
        view = Representation(TRIVIAL, a1=ELEMENTS)
        grid = _Grid(dim, (height, width))
        self.decoder = Decoder(TRIVIAL, view, grid, sizes, null_condition=False)  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, t: Tensor, view: Tensor) -> Tensor:
        """Predict dx_t / dt."""
        return self.decoder(x_t, t, F.one_hot(view, ELEMENTS).to(x_t.dtype)[:, :, None, None])


def train_flow(
    batches: Iterator[tuple[Tensor, Tensor]],
    shape: tuple[int, int, int],
    settings: Settings,
    seed: int,
) -> LatentFlow:
    """Train for `flow_steps`; return the averaged weights, a function of batches and seed.

    Args:
        batches: Batches of latents and their views' indices.
        shape: Shape of a latent.
        settings: Sizes, steps and learning rate.
        seed: Seed of weights, times and noise.
    """
    optimization = OptimizerConfig(learning_rate=settings.learning_rate, ema_decay=0.995)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LatentFlow(shape, settings)
    optimizer = build_optimizer(model, optimization)
    average = MovingAverage(model, optimization.ema_decay)
    generator = torch.Generator()
    for step in range(settings.flow_steps):
        latent, view = next(batches)
        generator.manual_seed(seed_of(seed, step, 0))
        t = draw_time(len(latent), FLOW, generator, "cpu")
        noise = torch.randn(latent.shape, generator=generator)
        output = model(interpolate(latent, noise, t), t, view)
        flow_loss(output, latent, noise, t, FLOW.prediction).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimization.max_grad_norm)
        set_learning_rate(optimizer, learning_rate_at(step, settings.flow_steps, optimization))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model, step)
    average.copy_to(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure_loss(model: LatentFlow, latent: Tensor) -> float:
    """Return the mean flow loss on latents of the identity's view, at fixed times and noise."""
    generator = torch.Generator().manual_seed(1)
    u = (torch.randperm(len(latent), generator=generator) + 0.5) / len(latent)
    t = quantile_of_time(u, FLOW)
    noise = torch.randn(latent.shape, generator=generator)
    total = 0.0
    for part in torch.arange(len(latent)).split(_SAMPLED_AT_ONCE):
        view = torch.zeros(len(part), dtype=torch.long)
        output = model(interpolate(latent[part], noise[part], t[part]), t[part], view)
        total += float(flow_loss(output, latent[part], noise[part], t[part], "velocity").sum())
    return total / len(latent)


@torch.no_grad()
def sample_latents(
    model: LatentFlow, shape: tuple[int, int, int], count: int, steps: int, seed: int
) -> Tensor:
    """Sample latents (count, dim, h, w) of the identity's view."""
    noise = torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))
    view = torch.zeros(count, dtype=torch.long)
    return torch.cat(
        [
            integrate(
                lambda x, t: model(x, x.new_full((len(x),), t), view[: len(x)]),
                part,
                time_grid(steps),
                "heun",
            )
            for part in noise.split(_SAMPLED_AT_ONCE)
        ]
    )
