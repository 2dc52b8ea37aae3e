"""Networks of an autoencoder of diffusers: its encoder with its posterior, and its decoder.

Both keep the names of diffusers for their parts, so that weights move to and from a folder of
diffusers by a prefix alone.
"""

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
"""Classes of diffusers that can be fine-tuned."""


@dataclass(frozen=True)
class Factors:
    """Shift and scale by channel: what diffusion models see is (z - shift) * scale.

    Attributes:
        shift: Shift by channel.
        scale: Scale by channel.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def apply(self, z: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b dim h w"]:
        """Map what an encoder returns to the latents of diffusion models."""
        return (z - like(z, self.shift)) * like(z, self.scale)

    def undo(self, latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b dim h w"]:
        """Invert `apply`."""
        return latent / like(latent, self.scale) + like(latent, self.shift)

    def with_one_scale(self) -> "Factors":
        """Return factors with one scale for all channels, from the mean of their variances."""
        one = fmean(scale**-2 for scale in self.scale) ** -0.5
        return Factors(self.shift, (one,) * len(self.scale))


def like(latent: Tensor, values: tuple[float, ...]) -> Float[Tensor, "dim 1 1"]:
    """Return one number per channel in the dtype of a latent, on its device."""
    return torch.tensor(values, dtype=latent.dtype, device=latent.device)[:, None, None]


class _Half(nn.Module):
    """Encoder or decoder of an autoencoder of diffusers."""

    def train(self, mode: bool = True) -> Self:
        """Set the mode; batch normalisation keeps the statistics that it was pretrained with.

        The loss of an example then depends on no other, and a frozen half stays as it is.
        """
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self

    def receptive_radius(self) -> int:
        """Raise ValueError: tiles are not known to be seamless here."""
        raise ValueError(
            "tile: the networks of diffusers have attention and normalisation over the whole image;"
            " load the folder in diffusers and call enable_tiling()"
        )


class Encoder(_Half):
    """Maps images (b, c, h, w) in [-1, 1] to the means (b, dim, h / f, w / f) of their posteriors.

    Args:
        architecture: Configuration of the autoencoder, as JSON.
        recomputes: Whether to compute activations again in the backward pass.

    Attributes:
        has_posterior: Whether a posterior has a spread.
        factors: Factors by which pipelines of diffusers map the means.
    """

    def __init__(self, architecture: str, recomputes: bool = False):
        super().__init__()
        self.has_posterior = json.loads(architecture)["_class_name"] == "AutoencoderKL"
        network = build(architecture, recomputes)
        self.factors = read_factors(network.config)  # with the defaults of its class
        self.encoder: nn.Module = network.encoder
        self.quant_conv: nn.Module | None = getattr(network, "quant_conv", None)
        self.train()

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Return the means."""
        return self.posterior(image)[0]

    def posterior(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor | None]:
        """Return means and logarithms of variances (b, dim, lh, lw); None for a point."""
        encoded: Tensor = self.encoder(image)
        if not self.has_posterior:
            return encoded, None
        if self.quant_conv is not None:
            encoded = self.quant_conv(encoded)
        mean, log_variance = encoded.chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)  # the bounds of diffusers


class Decoder(_Half):
    """Maps latents to images; takes what a flow decoder takes, and ignores all but the latent."""

    def __init__(self, architecture: str, recomputes: bool = False):
        super().__init__()
        network = build(architecture, recomputes)
        self.decoder: nn.Module = network.decoder
        self.post_quant_conv: nn.Module | None = getattr(network, "post_quant_conv", None)
        self.train()

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim lh lw"],
        keep: Bool[Tensor, "b"] | None = None,
        mean: Float[Tensor, "b dim"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the images."""
        del x_t, t, keep, mean
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        image: Tensor = self.decoder(latent)
        return image


def describe(architecture: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return colours, latent channels and pixels per cell of an autoencoder.

    Raises:
        ValueError: It is of another class, or describes no such autoencoder.
    """
    name = architecture.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"describes {name}, and only {', '.join(CLASSES)} can be used")
    try:
        blocks = (
            architecture["block_out_channels"]
            if name == "AutoencoderKL"
            else architecture["encoder_block_out_channels"]
        )
        colours, channels = int(architecture["in_channels"]), int(architecture["latent_channels"])
        read_factors(architecture)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"describes no {name}: {error!r}") from error
    if architecture.get("out_channels", colours) != colours:
        raise ValueError(
            f"describes {name} from {colours} to {architecture['out_channels']} colours, which"
            " reconstructs no image"
        )
    return colours, channels, 2 ** (len(blocks) - 1)


def read_size(architecture: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of an autoencoder's `sample_size`, one side or two; None: none."""
    found: Any = architecture.get("sample_size")
    sides = cast(list[Any], found) if isinstance(found, list | tuple) else [found, found]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    return sides[0], sides[1]


def read_factors(architecture: Mapping[str, Any]) -> Factors:
    """Return the factors by which the pipelines of diffusers map latents.

    These are `scaling_factor` and `shift_factor`, as in the pipelines of SD3 and FLUX; or, instead
    of the shift, `latents_mean` and `latents_std` if both are given, as in that of SDXL.

    Raises:
        ValueError: A value is no finite number, a scale not positive, or there is not one per
            channel.
    """
    channels = int(architecture["latent_channels"])
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    scaling, shift, means, stds = map(architecture.get, names)
    shifts: Any = [shift or 0.0] * channels
    deviations: Any = [1.0] * channels
    if means is not None and stds is not None:
        shifts, deviations = means, stds
    try:
        scales = tuple(float(scaling or 1.0) / float(each) for each in deviations)
        found = Factors(tuple(map(float, shifts)), scales)
    except (TypeError, ValueError, ArithmeticError):
        found = None
    if not (
        found
        and len(found.shift) == len(found.scale) == channels
        and all(map(math.isfinite, (*found.shift, *found.scale)))
        and min(found.scale) > 0
    ):
        given = zip(names, (scaling, shift, means, stds), strict=True)
        shown = ", ".join(f"{name}={value!r}" for name, value in given if value is not None)
        raise ValueError(
            f"{shown}: need finite numbers and positive scales, for each of {channels} channels"
        )
    return found


def build(architecture: str, recomputes: bool = False) -> Any:
    """Build an autoencoder with random weights.

    Args:
        architecture: Its configuration, as JSON.
        recomputes: Whether to compute activations again in the backward pass.

    Raises:
        ValueError: diffusers is missing, or refuses the configuration.
    """
    settings = json.loads(architecture)
    describe(settings)
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(
            "start.model: the package diffusers is missing; pip install diffusers"
        ) from error
    try:
        network = getattr(diffusers, settings["_class_name"]).from_config(settings)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"start.architecture: refused by diffusers: {error}") from error
    if recomputes:
        _recompute(network, settings["_class_name"])
    return network


def _recompute(network: Any, name: str) -> None:
    """Have an autoencoder of the class compute activations again in the backward pass."""
    if name == "AutoencoderKL":
        network.enable_gradient_checkpointing()
    elif name == "AutoencoderTiny":
        # In diffusers 0.42, its own way encodes another range of pixels.
        for half in (network.encoder, network.decoder):
            half.layers = _Recomputed(*half.layers)
    else:
        for stages in (network.encoder.down_blocks, network.decoder.up_blocks):
            for place, stage in enumerate(stages):
                stages[place] = _Recomputed(*stage)


class _Recomputed(nn.Sequential):
    """Layers in sequence, whose blocks keep their input alone for the backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layers."""
        for layer in self:
            is_leaf = next(layer.children(), None) is None
            if is_leaf or not torch.is_grad_enabled():
                input = layer(input)
            else:
                input = cast(Tensor, checkpoint(layer, input, use_reentrant=False))
        return input


def name_in_diffusers(name: str) -> str | None:
    """Return the name that diffusers has for a weight of an `Autoencoder`; None if it has none."""
    network, _, rest = name.partition(".")
    return rest if network in ("encoder", "decoder") else None


def name_in_efae(name: str) -> str:
    """Invert `name_in_diffusers`."""
    network = "encoder" if name.partition(".")[0] in ("encoder", "quant_conv") else "decoder"
    return f"{network}.{name}"
