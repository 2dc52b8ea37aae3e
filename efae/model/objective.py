"""The training loss, from images to a loss per example.

Each example draws t, noise, latent noise, null condition and angle, all from the generator; at the
levels that learn equivariance, also a group element g. The decoder is fitted to p(gx | rho(g) z)
with z = E(x) (level `objective`); `regularized` adds a pair term on the encoder; at level `exact`
every layer commutes with g, so that drawing it would change nothing.
"""

import importlib
import random
from collections.abc import Callable
from math import gcd
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from efae.model import flow
from efae.model.autoencoder import Autoencoder
from efae.symmetry.any_angle import act_by_angle, disk_mask, rotate_image
from efae.symmetry.group import act_on_grid


class Objective(nn.Module):
    """The loss as a module around the model, so that DDP can wrap both.

    Args:
        model: Model to train; in training mode, every batch updates its latent statistics.
        perceptual: Function of (predicted image, image), each (b, c, h, w) in [-1, 1], to a loss
            (b,).
    """

    def __init__(
        self,
        model: Autoencoder,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.model = model
        self.perceptual = perceptual

    def forward(
        self, image: Float[Tensor, "b c h w"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Return the loss and the t of each example.

        Args:
            image: Images in [-1, 1].
            generator: Source of all random draws, on the image's device.
        """
        model = self.model
        config, count, device = model.config, len(image), image.device
        level, prediction = config.model.level, config.flow.prediction
        t = flow.draw_time(count, config.flow, generator, device)
        latent = model.bounded(image)
        if model.training:
            model.bottleneck.update_power(latent)
        extra = torch.zeros(count, device=device)
        if config.model.bottleneck == "kl":
            nats_per_value = model.bottleneck.divergence(latent) / image[0].numel()
            extra = extra + config.loss.kl_weight * nats_per_value
        if level in ("objective", "regularized"):
            chosen = torch.randint(len(model.group), (count,), generator=generator, device=device)
            latent = model.act(chosen, latent)
            image = act_on_grid(model.group, chosen, image)
        if level == "regularized":
            extra = extra + config.loss.pair_weight * pair_error(model.bounded(image), latent)
        mask = None
        if config.loss.rotation_probability:
            image, latent, mask = rotate_some(model, image, latent, generator)
        if config.loss.scaling_probability:
            image, latent = scale_some(model, image, latent, generator)
            mask = None if mask is None else F.interpolate(mask, image.shape[-2:], mode="area")
        latent = model.bottleneck.add_noise(latent, generator)
        keep = None
        if config.flow.condition_drop:
            keep = (
                torch.rand(count, generator=generator, device=device) >= config.flow.condition_drop
            )
        noise = torch.randn(image.shape, generator=generator, device=device)
        x_t = flow.interpolate(image, noise, t)
        output = model.decoder(x_t, t, model.from_irreps(latent), keep)
        if self.perceptual is not None:
            predicted = flow.image_from(output.float(), x_t, t, prediction)
            extra = extra + config.loss.perceptual_weight * self.perceptual(predicted, image)
        return flow.flow_loss(output, image, noise, t, prediction, mask) + extra, t


def pair_error(
    encoded: Float[Tensor, "b dim h w"], acted: Float[Tensor, "b dim h w"]
) -> Float[Tensor, "b"]:
    """Return |E(gx) - rho(g) E(x)|^2 over the latent's variance; no gradient to rho(g) E(x).

    Dividing by the variance keeps the encoder from shrinking the latent instead of aligning it.
    """
    target = acted.detach()
    return (encoded - target).square().mean((1, 2, 3)) / target.var().clamp(min=1e-6)


def rotate_some(
    model: Autoencoder, image: Tensor, latent: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate a share of the examples by any angle; also returns the weights of their pixels."""
    count, device = len(image), image.device
    # In float64, in which quarter turns are exact.
    angle = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    angle = 2 * torch.pi * angle
    turned = torch.rand(count, generator=generator, device=device)
    turned = turned < model.config.loss.rotation_probability
    pick = turned[:, None, None, None]
    disk = disk_mask(image.shape[-2], image.shape[-1], device=device)
    return (
        torch.where(pick, rotate_image(image, angle), image),
        torch.where(pick, act_by_angle(model.representation, angle, latent), latent),
        torch.where(pick, disk, torch.ones_like(disk)),
    )


def scale_some(
    model: Autoencoder, image: Tensor, latent: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Downscale the whole batch, images and latents, in a random share of the steps.

    The scale lies between 1/4 and 1, as in EQ-VAE (Kouzelis et al. 2025, arXiv:2502.09509), here
    rounded to whole latent cells. It is drawn on the host, since it determines shapes.
    """
    drawn = random.Random(generator.initial_seed())
    if drawn.random() >= model.config.loss.scaling_probability:
        return image, latent
    height, width = latent.shape[-2:]
    whole = gcd(height, width)
    part = drawn.randrange(max(1, whole // 4), whole)
    cells = (height * part // whole, width * part // whole)
    pixels = tuple(side * model.config.model.downsampling for side in cells)
    return (
        F.interpolate(image, pixels, mode="bilinear", antialias=True),
        F.interpolate(latent, cells, mode="bilinear", antialias=True),
    )


def load_perceptual(path: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
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
    return lambda predicted, image: cast(Callable[[Tensor, Tensor], Tensor], function)(
        predicted, image
    )
