"""What both decoders share: the condition of adaLN, and what their networks see and correct.

The condition is made of t and of the latent's invariants. A network beside a linear path sees the
best linear estimate of the image from the latent and x_t, and corrects the path's image.

The null condition (Ho & Salimans 2022, arXiv:2207.12598) is learned, since a latent of zeros is the
code of a symmetric image. It is invariant, so that dropping the latent keeps the symmetry.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from efae.config import DataConfig, FlowConfig, ModelConfig
from efae.model.networks.linear_path import DECODER_DAMPING, build_linear_path, unpatchify
from efae.model.octic.layers import (
    Lift,
    latent_action,
    normalize,
    patch_action,
    zero_linear,
)
from efae.model.octic.layout import embed_invariant, layout_of, spread_gains, take_invariant
from efae.symmetry.group import Group
from efae.symmetry.representation import Representation

SMALLEST_RESIDUAL = 1e-6
"""Least mean square that the residual of a linear path is taken to have, of values in [-1, 1]: an
eighth of a level of 255. A path that loses nothing leaves rounding errors only."""


def embed_time(t: Float[Tensor, "b"], size: int) -> Float[Tensor, "b size"]:
    """Embed t as sinusoids of 1000 t with periods from 2 pi to 2 pi * 10^4."""
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(size // 2, device=t.device) / (size // 2)
    )
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class ConditionedDecoder(nn.Module):
    """A decoder whose blocks are modulated by t and by the invariants of the mean latent.

    Attributes:
        residual_power: Mean square of a pixel value of the residual that the linear path leaves,
            and of one of the images themselves, the residual without a latent.
    """

    def __init__(self, group: Group, flow: FlowConfig):
        super().__init__()
        self.layout = layout_of(group)
        self.has_null_condition = flow.condition_drop > 0
        self.draws_in_one_step = bool(flow.distill_from)

    def add_conditioning(self, representation: Representation, m: int, hidden_size: int) -> None:
        """Add the layers of the condition, `hidden_size` wide, for tokens of `m` channels."""
        group = self.layout.group
        rho = latent_action(group, representation)
        self.pooled = Lift(group, *rho, m, fan_in=representation.dim)
        self.pooled_condition = nn.Linear(m, hidden_size)
        self.null_tokens = nn.Parameter(torch.zeros(m)) if self.has_null_condition else None
        self.null_pooled = nn.Parameter(torch.zeros(m)) if self.has_null_condition else None
        self.time_condition = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def add_output(
        self, representation: Representation, m: int, data: DataConfig, model: ModelConfig
    ) -> None:
        """Add the layers from tokens of `m` channels to pixels, and a linear path beside them."""
        group = self.layout.group
        self.patch_size = model.patch_size
        self.sizes = [self.layout.gains * m, m]
        self.modulation = zero_linear(model.hidden_size, sum(self.sizes))
        patch = patch_action(group, model.patch_size, data.channels)
        self.output = Lift(group, *patch, m, fan_in=len(group) * m)
        # The first prediction is zero, the mean of images in [-1, 1], or the linear path's.
        nn.init.zeros_(self.output.coefficient)
        self.linear_path = None
        if model.has_linear_start:
            self.linear_path = build_linear_path(group, representation, data, model)
            # A statistic, not a weight; as a parameter it is saved with the averaged weights.
            self.residual_power = nn.Parameter(torch.ones(2), requires_grad=False)

    def see(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim latent_h latent_w"],
        keep: Bool[Tensor, "b"] | None,
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"] | None]:
        """Return what the network sees, and the linear path's image; (x_t, None) without a path.

        The linear path maps the latent to an image l, and leaves a residual r = image - l of mean
        square v. Of r, x_t shows y = x_t - (1 - t) l = (1 - t) r + t noise, of mean square
        p = (1 - t)^2 v + t^2. The network sees the best linear estimate of the image, which is
        l + (1 - t) v / p y (Wiener 1949): l at t = 1, and x_t at t = 0. From x_t itself, it would
        first learn to take details at all t alike, and fall behind the linear path, because near
        t = 1 they are noise.

        It corrects l, not this estimate: the estimate holds some noise, of which the network would
        leave a part in the image, more with each step of a sampler.

        In one step, the noise at t = 1 chooses the sample: a student sees l + sqrt(v / p) y, which
        shows y at the scale of r.
        """
        if self.linear_path is None:
            return x_t, None
        t = t.to(torch.promote_types(x_t.dtype, torch.float32))[:, None, None, None]
        power, whole = self.residual_power.to(t.dtype).clamp(min=SMALLEST_RESIDUAL)
        if keep is not None:
            keep = keep[:, None, None, None]
            latent, power = latent * keep, torch.where(keep, power, whole)
        linear = self.linear_path.back(latent)
        share = (power / ((1 - t) ** 2 * power + t**2)).sqrt()  # the root of v / p
        if not self.draws_in_one_step:
            share = (1 - t) * share**2
        return linear + share.to(x_t.dtype) * (x_t - (1 - t).to(x_t.dtype) * linear), linear

    def condition(
        self,
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim latent_h latent_w"],
        keep: Bool[Tensor, "b"] | None,
        mean: Float[Tensor, "b dim"] | None = None,
    ) -> Float[Tensor, "b hidden_size"]:
        """Return the condition; where `keep` is false, that of no latent.

        Args:
            t: Times.
            latent: Latents.
            keep: Whether to use the latent, per example; None: in all.
            mean: Mean of the whole latent where `latent` is a part of it.
        """
        mean = latent.mean((2, 3)) if mean is None else mean
        invariants = take_invariant(self.layout, self.pooled(mean))
        if keep is not None:
            assert self.null_pooled is not None
            null = self.null_pooled.to(invariants.dtype)
            invariants = torch.where(keep[:, None], invariants, null)
        embedded = embed_time(t, self.pooled_condition.out_features).to(latent.dtype)
        time = self.time_condition(embedded)
        return nn.functional.silu(time + self.pooled_condition(invariants))

    def drop(
        self, tokens: Float[Tensor, "slot b token coset*m"], keep: Bool[Tensor, "b"] | None
    ) -> Float[Tensor, "slot b token coset*m"]:
        """Replace the latent's tokens by the null condition's where `keep` is false."""
        if keep is None:
            return tokens
        assert self.null_tokens is not None
        null = embed_invariant(self.layout, self.null_tokens)[:, None, None]
        return torch.where(keep[:, None, None], tokens, null.to(tokens.dtype))

    def predict(
        self,
        x: Float[Tensor, "slot b token coset*m"],
        condition: Float[Tensor, "b hidden_size"],
        linear: Float[Tensor, "b c h w"] | None,
        height: int,
        width: int,
    ) -> Float[Tensor, "b c h w"]:
        """Map the last tokens, modulated by the condition, to pixels.

        Args:
            x: Tokens.
            condition: Condition.
            linear: Image that they correct; None: they are the prediction.
            height: Height of the image in pixels.
            width: Width.
        """
        scale, shift = self.modulation(condition).split(self.sizes, -1)
        x = normalize(x) * (1 + spread_gains(self.layout, scale))
        x = x + embed_invariant(self.layout, shift)[:, :, None]
        pixels = unpatchify(self.output.back(x), self.patch_size, height, width)
        return pixels if linear is None else linear + DECODER_DAMPING * pixels
