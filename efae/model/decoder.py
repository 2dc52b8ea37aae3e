"""The decoder: a diffusion transformer (Peebles & Xie 2023, arXiv:2212.09748) of octic layers.

The latent enters twice: every token gets its part of its latent cell, and the invariants of the
mean latent join t in the conditioning of adaLN. All layers commute with the group. The null
condition (Ho & Salimans 2022, arXiv:2207.12598) is learned, since a latent of zeros is the code of
a symmetric image. It is invariant, so that dropping the latent keeps the symmetry.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from efae.config import DataConfig, ModelConfig
from efae.model.encoder import Positions, patchify, unpatchify
from efae.model.octic.layers import (
    Block,
    Lift,
    latent_action,
    modulation_sizes,
    normalize,
    patch_action,
    zero_linear,
)
from efae.model.octic.layout import embed_invariant, layout_of, spread_gains, take_invariant
from efae.model.octic.token_grid import Resample
from efae.symmetry.group import Group
from efae.symmetry.representation import Representation


def embed_time(t: Float[Tensor, "b"], size: int) -> Float[Tensor, "b size"]:
    """Embed t as sinusoids of 1000 t with periods from 2 pi to 2 pi * 10^4."""
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(size // 2, device=t.device) / (size // 2)
    )
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class Decoder(nn.Module):
    """Predicts image or velocity from x_t, t and latent, as flow.prediction says.

    Images may have another size than data.image_size: the position embedding is resampled.
    """

    def __init__(
        self,
        group: Group,
        representation: Representation,
        data: DataConfig,
        model: ModelConfig,
        *,
        null_condition: bool,
    ):
        super().__init__()
        self.patch_size, hidden_size = model.patch_size, model.hidden_size
        self.layout = layout_of(group)
        m = hidden_size // len(group)
        ratio = model.downsampling // model.patch_size
        patch = patch_action(group, model.patch_size, data.channels)
        rho = latent_action(group, representation)
        self.patches = Lift(group, *patch, m, fan_in=patch[0].shape[1])
        height, width = (side // model.patch_size for side in data.image_size)
        self.positions = Positions(group, height, width, m)
        self.latent = Lift(group, *rho, m * ratio**2, fan_in=representation.dim)
        self.resample = Resample(group, ratio)
        self.pooled = Lift(group, *rho, m, fan_in=representation.dim)
        self.pooled_condition = nn.Linear(m, hidden_size)
        self.null_tokens = nn.Parameter(torch.zeros(m)) if null_condition else None
        self.null_pooled = nn.Parameter(torch.zeros(m)) if null_condition else None
        self.time_condition = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        shared = model.modulation == "shared"
        self.shared_modulation = None
        if shared:
            self.shared_modulation = zero_linear(hidden_size, sum(modulation_sizes(group, m)))
        self.blocks = nn.ModuleList(
            Block(group, m, model.num_heads, model.mlp_ratio, hidden_size, shared)
            for _ in range(model.depth)
        )
        self.sizes = [self.layout.gains * m, m]
        self.modulation = zero_linear(hidden_size, sum(self.sizes))
        self.output = Lift(group, *patch, m, fan_in=len(group) * m)
        # The first prediction is zero, the mean of images in [-1, 1].
        nn.init.zeros_(self.output.coefficient)

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim latent_h latent_w"],
        keep: Bool[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the prediction; where `keep` is false, the null condition replaces the latent.

        t lies in [0, 1]; the latent grid is h / f x w / f cells for images of h x w pixels.
        """
        height, width = x_t.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        cells = self.latent(latent.flatten(2).mT)  # (slot, b, cell, ratio^2 coset m)
        tokens = self.resample.split(cells, *grid)  # (slot, b, token, coset m)
        invariants = take_invariant(self.layout, self.pooled(latent.mean((2, 3))))
        if keep is not None:
            assert self.null_tokens is not None
            assert self.null_pooled is not None
            null = embed_invariant(self.layout, self.null_tokens)[:, None, None]
            tokens = torch.where(keep[:, None, None], tokens, null.to(tokens.dtype))
            null = self.null_pooled.to(invariants.dtype)
            invariants = torch.where(keep[:, None], invariants, null)
        x = self.patches(patchify(x_t, self.patch_size)) + tokens
        x = x + self.positions(*grid).to(x.dtype)
        time = self.time_condition(embed_time(t, self.pooled_condition.out_features).to(x_t.dtype))
        condition = nn.functional.silu(time + self.pooled_condition(invariants))
        modulation = condition
        if self.shared_modulation is not None:
            modulation = self.shared_modulation(condition)
        for block in self.blocks:
            x = block(x, modulation)
        scale, shift = self.modulation(condition).split(self.sizes, -1)
        x = normalize(x) * (1 + spread_gains(self.layout, scale))
        x = x + embed_invariant(self.layout, shift)[:, :, None]
        return unpatchify(self.output.back(x), self.patch_size, height, width)
