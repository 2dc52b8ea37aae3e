"""What both decoders share: the condition of adaLN, and a linear path from latent to pixels.

The condition is made of t and of the latent's invariants.

The null condition (Ho & Salimans 2022, arXiv:2207.12598) is learned, since a latent of zeros is the
code of a symmetric image. It is invariant, so that dropping the latent keeps the symmetry.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from efae.config import DataConfig, ModelConfig
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


def embed_time(t: Float[Tensor, "b"], size: int) -> Float[Tensor, "b size"]:
    """Embed t as sinusoids of 1000 t with periods from 2 pi to 2 pi * 10^4."""
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(size // 2, device=t.device) / (size // 2)
    )
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class ConditionedDecoder(nn.Module):
    """A decoder whose blocks are modulated by t and by the invariants of the mean latent."""

    def __init__(self, group: Group):
        super().__init__()
        self.layout = layout_of(group)

    def add_conditioning(
        self, representation: Representation, m: int, hidden_size: int, null_condition: bool
    ) -> None:
        """Add the layers of the condition, `hidden_size` wide, for tokens of `m` channels."""
        group = self.layout.group
        rho = latent_action(group, representation)
        self.pooled = Lift(group, *rho, m, fan_in=representation.dim)
        self.pooled_condition = nn.Linear(m, hidden_size)
        self.null_tokens = nn.Parameter(torch.zeros(m)) if null_condition else None
        self.null_pooled = nn.Parameter(torch.zeros(m)) if null_condition else None
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
        latent: Float[Tensor, "b dim latent_h latent_w"],
        keep: Bool[Tensor, "b"] | None,
        size: tuple[int, int],
    ) -> Float[Tensor, "b c h w"]:
        """Map the last tokens to pixels, as a correction of the linear path's if there is one.

        Args:
            x: Tokens.
            condition: Condition that modulates them.
            latent: Latents.
            keep: Whether to use the latent, per example; None: in all.
            size: Height and width in pixels.
        """
        scale, shift = self.modulation(condition).split(self.sizes, -1)
        x = normalize(x) * (1 + spread_gains(self.layout, scale))
        x = x + embed_invariant(self.layout, shift)[:, :, None]
        pixels = unpatchify(self.output.back(x), self.patch_size, *size)
        if self.linear_path is None:
            return pixels
        if keep is not None:
            latent = latent * keep[:, None, None, None]
        return DECODER_DAMPING * pixels + self.linear_path.back(latent)
