"""The training loss, from images to a loss per example.

Each example draws t, noise, latent noise, null condition and angle; at the levels that learn
equivariance, also a group element g. The decoder is fitted to p(gx | rho(g) z) with z = E(x) (level
`objective`); `regularized` adds a pair term on the encoder; at level `exact` every layer commutes
with g, so that drawing it would change nothing. All draws are made before the loss is computed, so
that a compiler sees no generator, and parts of a batch can share the draws of the whole.
"""

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import gcd
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from efae.config import Config
from efae.model import flow
from efae.model.autoencoder import Autoencoder
from efae.symmetry import GROUPS
from efae.symmetry.any_angle import act_by_angle, disk_mask, rotate_image
from efae.symmetry.group import act_on_grid

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Function of (predicted image, image), each (b, c, h, w) in [-1, 1], to a loss (b,)."""
Teacher = Callable[[Tensor, Tensor], Tensor]
"""Function of (latent from `encode`, noise) to the image that a teacher samples."""


@dataclass(frozen=True)
class BatchDraws:
    """The random draws of a batch of any kind: tensors with one row per example, or other values.

    Attributes:
        t: Flow times, in (0, 1).
    """

    t: Float[Tensor, "b"]

    def split(self, size: int) -> "list[Self]":
        """Return the draws of consecutive parts of `size` examples; the last may be smaller."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}

        def cut(part: slice) -> dict[str, Any]:
            return {k: v[part] if isinstance(v, Tensor) else v for k, v in values.items()}

        starts = range(0, len(self.t), size)
        return [type(self)(**cut(slice(start, start + size))) for start in starts]


@dataclass(frozen=True)
class Draws(BatchDraws):
    """The random draws of a batch, in the order in which they are made; None is not drawn.

    Attributes:
        element: Positions in the group of the elements that act.
        angle: Angles of rotation in radians, in float64, in which quarter turns are exact.
        rotated: Whether the example is rotated by its angle.
        latent_noise: Standard normal noise of the bottleneck.
        keep: Whether the decoder sees the latent, not the null condition.
        noise: Standard normal noise that the flow starts from.
        cells: Height and width of the latents if the whole batch is downscaled.
    """

    element: Int[Tensor, "b"] | None
    angle: Float[Tensor, "b"] | None
    rotated: Bool[Tensor, "b"] | None
    latent_noise: Float[Tensor, "b dim lh lw"]
    keep: Bool[Tensor, "b"] | None
    noise: Float[Tensor, "b c h w"]
    cells: tuple[int, int] | None


def draw(config: Config, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
    """Draw everything random that the loss of a batch needs.

    Args:
        config: Configuration of the model and its loss.
        shape: Shape (b, c, h, w) of the images.
        generator: Source of the draws, on the images' device.
    """
    count, channels, device = shape[0], shape[1], generator.device
    t = flow.draw_time(count, config.flow, generator, device)
    element = angle = rotated = keep = None
    if config.model.level in ("objective", "regularized"):
        order = len(GROUPS[config.representation.group])
        element = torch.randint(order, (count,), generator=generator, device=device)
    if config.loss.rotation_probability:
        angle = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        angle = 2 * torch.pi * angle
        rotated = torch.rand(count, generator=generator, device=device)
        rotated = rotated < config.loss.rotation_probability
    f = config.model.downsampling
    height, width = shape[-2] // f, shape[-1] // f
    cells, dim = None, config.representation.dim
    grid = height, width
    if config.loss.scaling_probability:
        cells = draw_cells(config, (height, width), generator)
        height, width = cells or (height, width)
    if config.model.bottleneck != "posterior":  # whose noise comes before the scaling
        grid = height, width
    latent_noise = torch.randn(count, dim, *grid, generator=generator, device=device)
    if config.flow.condition_drop:
        keep = torch.rand(count, generator=generator, device=device) >= config.flow.condition_drop
    noise = torch.randn(count, channels, height * f, width * f, generator=generator, device=device)
    return Draws(t, element, angle, rotated, latent_noise, keep, noise, cells)


def draw_cells(
    config: Config, cells: tuple[int, int], generator: torch.Generator
) -> tuple[int, int] | None:
    """Draw the latent size of a downscaled batch; None, in most steps, leaves it as it is.

    The scale lies between 1/4 and 1, as in EQ-VAE (Kouzelis et al. 2025, arXiv:2502.09509), here
    rounded to whole latent cells. It is drawn on the host, since it determines shapes: from the
    generator's state, which other draws move on, and which lies on the host for a GPU's, too.
    """
    drawn = random.Random(generator.get_state().numpy().tobytes())
    if drawn.random() >= config.loss.scaling_probability:
        return None
    height, width = cells
    whole = gcd(height, width)
    part = drawn.randrange(_least_part(whole), whole)
    return height * part // whole, width * part // whole


def _least_part(whole: int) -> int:
    return max(1, whole // 4)


def find_smallest_side(config: Config) -> int:
    """Return the shorter side, in pixels, of the smallest images that the loss can see."""
    f = config.model.downsampling
    smallest: list[int] = []
    for size in config.data.buckets or (config.data.image_size,):
        side, whole = min(size), gcd(size[0] // f, size[1] // f)
        if config.loss.scaling_probability:
            side = side // f * _least_part(whole) // whole * f
        smallest.append(side)
    return min(smallest)


class Objective(nn.Module):
    """The loss as a module around the model, so that DDP can wrap both.

    Args:
        model: Model to train; in training mode, every batch updates its latent statistics.
        perceptual: Perceptual loss of the one-step prediction; None for none.
        teacher: Teacher to distil into one step; None learns the flow from the images.
    """

    def __init__(
        self,
        model: Autoencoder,
        perceptual: Perceptual | None = None,
        teacher: Teacher | None = None,
    ):
        super().__init__()
        self.model = model
        self.perceptual = perceptual
        self.teacher = teacher

    def forward(
        self, image: Float[Tensor, "b c h w"], draws: Draws | torch.Generator
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Return the loss and the t of each example.

        Args:
            image: Images in [-1, 1].
            draws: Draws of these images, or a generator to make them with, on the images' device.
        """
        model = self.model
        config = model.config
        prediction = config.flow.prediction
        if isinstance(draws, torch.Generator):
            draws = draw(config, tuple(image.shape), draws)
        extra = torch.zeros(len(image), device=image.device)
        if model.bottleneck.kind == "posterior":
            encoded, latent, nats = sample_posterior(model, image, draws.latent_noise)
            extra = extra + config.loss.kl_weight * nats
        else:
            latent = encoded = model.bounded(image)
        acted = encoded
        if draws.element is not None:
            acted = model.act(draws.element, encoded)
            latent = acted if latent is encoded else model.act(draws.element, latent)
            image = act_on_grid(model.group, draws.element, image)
        if self.teacher is None:
            extra = extra + self._regularize(encoded, acted, image)
            if model.training and not config.freezes_latent:
                model.bottleneck.update_power(encoded)
        mask = None
        if draws.angle is not None and draws.rotated is not None:
            image, latent, mask = rotate_some(model, image, latent, draws.angle, draws.rotated)
        if draws.cells is not None:
            image, latent = scale(image, latent, draws.cells)
            mask = None if mask is None else F.interpolate(mask, image.shape[-2:], mode="area")
        latent = model.bottleneck.add_noise(latent, draws.latent_noise)
        t = draws.t
        if self.teacher is not None:
            image = self.teacher(model.normalize(latent), draws.noise)
            t = torch.ones_like(t)
        x_t = flow.interpolate(image, draws.noise, t)
        output = model.predict(x_t, t, latent, draws.keep)
        if self.perceptual is not None:
            predicted = flow.image_from(output.float(), x_t, t, prediction)
            extra = extra + config.loss.perceptual_weight * self.perceptual(predicted, image)
        loss = flow.flow_loss(output, image, draws.noise, t, prediction, mask)
        return loss + extra, t

    def _regularize(self, encoded: Tensor, acted: Tensor, image: Tensor) -> Tensor:
        """Return the terms (b,) of the latent: of `encoded`, and of `acted` to fit `image`."""
        model = self.model
        config, bottleneck = model.config, model.bottleneck
        terms = torch.zeros(len(image), device=image.device)
        if bottleneck.kind == "kl":
            nats_per_value = bottleneck.divergence(encoded) / image[0].numel()
            terms = terms + config.loss.kl_weight * nats_per_value
        if bottleneck.kind == "running":
            terms = terms + bottleneck.scale_penalty(encoded)
        if config.model.level == "regularized" and not config.freezes_latent:
            pair = pair_error(model.bounded(image), acted, bottleneck.mean_power())
            terms = terms + config.loss.pair_weight * pair
        return terms


def sample_posterior(
    model: Autoencoder, image: Float[Tensor, "b c h w"], noise: Float[Tensor, "b dim h w"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode with a pretrained encoder, and draw from its posterior N(mean, spread^2).

    Args:
        model: Model whose bottleneck has the kind "posterior".
        image: Images in [-1, 1].
        noise: Standard normal noise.

    Returns:
        Bounded means and samples (b, dim, h, w), in the basis of the irreps; and
        KL(posterior || N(0, 1)) in nats per pixel value (b,), 0 for an encoder without posterior.
    """
    mean, spread = model.posterior(image)
    if spread is None:
        return mean, mean, torch.zeros(len(image), device=image.device)
    nats = mean.square() + spread.square() - 1 - 2 * spread.log()
    sample = mean + model.to_irreps(spread * noise)
    return mean, sample, nats.sum((1, 2, 3)) / (2 * image[0].numel())


def pair_error(
    encoded: Float[Tensor, "b dim h w"], acted: Float[Tensor, "b dim h w"], power: Float[Tensor, ""]
) -> Float[Tensor, "b"]:
    """Return |E(gx) - rho(g) E(x)|^2 over the latent's power; no gradient to rho(g) E(x).

    Dividing by the power keeps the encoder from shrinking the latent instead of aligning it. The
    power is a running mean, so that the loss of an example does not depend on its batch.
    """
    return (encoded - acted.detach()).square().mean((1, 2, 3)) / power.clamp(min=1e-6)


def rotate_some(
    model: Autoencoder, image: Tensor, latent: Tensor, angle: Tensor, rotated: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the chosen examples by their angles; also returns the weights of the pixels."""
    pick = rotated[:, None, None, None]
    disk = disk_mask(image.shape[-2], image.shape[-1], device=image.device)
    return (
        torch.where(pick, rotate_image(image, angle), image),
        torch.where(pick, act_by_angle(model.representation, angle, latent), latent),
        torch.where(pick, disk, torch.ones_like(disk)),
    )


def scale(image: Tensor, latent: Tensor, cells: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Downscale images and latents to `cells` latent cells."""
    f = image.shape[-1] // latent.shape[-1]
    pixels = (cells[0] * f, cells[1] * f)
    return (
        F.interpolate(image, pixels, mode="bilinear", antialias=True),
        F.interpolate(latent, cells, mode="bilinear", antialias=True),
    )


def load_perceptual(path: str, device: torch.device) -> Perceptual:
    """Import the function that "package.module:name" names, for instance LPIPS.

    Only training calls this: loading a model from a registry never runs code that its
    configuration names.

    Args:
        path: Path of a function of (predicted image, image), each (b, c, h, w) in [-1, 1], to
            a loss (b,); a torch module is moved to the device and frozen.
        device: Device of the images.

    Raises:
        ValueError: There is no such function.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"loss.perceptual={path!r}: {error}; name an importable function as"
            " package.module:function, and ship its package to the workers"
        ) from error
    if not callable(function):
        raise ValueError(f"loss.perceptual={path!r}: not a function")  # noqa: TRY004
    if isinstance(function, nn.Module):
        function.to(device).eval().requires_grad_(False)
    # The lambda keeps a module from being registered, and so out of weights and checkpoints.
    return lambda predicted, image: cast(Perceptual, function)(predicted, image)
