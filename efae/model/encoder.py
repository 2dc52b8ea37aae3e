"""The encoder: an octic patch transformer and, in parallel, a linear path.

Patches are lifted to tokens; blocks alternate with 2 x 2 merges down to the latent grid; the last
tokens are mapped to the representation of the latent. The linear path adds an equivariant linear
map of each cell's pixels: without it, narrow group networks lose colour (15 dB on photographs).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from efae.config import DataConfig, ModelConfig
from efae.model.octic.layers import Block, Lift, Linear, latent_action, normalize, patch_action
from efae.model.octic.token_grid import Resample
from efae.symmetry.group import Group, grid_sources
from efae.symmetry.representation import Representation


def patchify(image: Tensor, side: int) -> Tensor:
    """Cut (b, c, h, w) into patches (b, h w / side^2, c side^2): channel, then row, then column."""
    b, c, h, w = image.shape
    patches = image.view(b, c, h // side, side, w // side, side)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * side * side)


def unpatchify(patches: Tensor, side: int, height: int, width: int) -> Tensor:
    """Invert `patchify`."""
    b = patches.shape[0]  # len() would fix the batch size when torch.export traces this
    grid = patches.view(b, height // side, width // side, -1, side, side)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, height, width)


class Positions(nn.Module):
    """A learned position embedding that is equivariant: it moves with the token grid."""

    def __init__(self, group: Group, height: int, width: int, m: int):
        super().__init__()
        self.size = (height, width)
        source = grid_sources(group, height, width)
        self.lift = Lift(group, source, torch.ones(source.shape), m, fan_in=1)
        nn.init.normal_(self.lift.coefficient, std=0.2)

    def forward(self, height: int, width: int) -> Tensor:
        """Return the embedding (slot, 1, height * width, coset * m), resampled if need be.

        Bilinear weights have the symmetries of the grid, so resampling keeps equivariance.
        """
        weight = self.lift.weight()
        if (height, width) != self.size:
            grid = torch.unflatten(weight.mT, -1, self.size)
            resized = F.interpolate(grid, (height, width), mode="bilinear", antialias=True)
            weight = resized.flatten(-2).mT
        return weight[:, None]


class LinearPath(nn.Module):
    """An equivariant linear map from the pixels of a cell to the latent.

    The group average of rho(g) W P(g)^-1 over all g, with W free, reaches every such map.
    """

    rows: Tensor
    columns: Tensor
    signs: Tensor

    def __init__(self, group: Group, representation: Representation, side: int, channels: int):
        super().__init__()
        self.side = side
        latent_source, latent_sign = latent_action(group, representation)
        pixel_source, pixel_sign = patch_action(group, side, channels)
        self.register_buffer("rows", latent_source[:, :, None], persistent=False)
        self.register_buffer("columns", pixel_source[:, None], persistent=False)
        signs = latent_sign[:, :, None] * pixel_sign[:, None] / len(group)
        self.register_buffer("signs", signs, persistent=False)
        fan_in = channels * side * side
        # Averaging over the group shrinks a random matrix by sqrt(len(group)).
        bound = math.sqrt(3 * len(group) / fan_in)
        self.free = nn.Parameter(torch.empty(representation.dim, fan_in).uniform_(-bound, bound))

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (b, c, h, w) to latent cells (b, cell, dim)."""
        weight = (self.free[self.rows, self.columns] * self.signs).sum(0)
        patches = patchify(image, self.side)
        # The mean of each colour is mapped separately. A constant image must give exactly zero
        # outside A1, where the terms of its mean cancel; in fp32 they would leave rounding errors.
        colours = torch.unflatten(patches, -1, (-1, self.side**2))  # (b, cell, c, side^2)
        means = colours.mean(-1, keepdim=True)
        totals = torch.unflatten(weight, -1, (-1, self.side**2)).sum(-1)  # (dim, c)
        centred = (colours - means).flatten(-2)
        dtype = patches.dtype
        return centred @ weight.t().to(dtype) + means[..., 0] @ totals.t().to(dtype)


class Encoder(nn.Module):
    """Maps images (b, c, h, w) in [-1, 1] to latents (b, dim, h / f, w / f), not yet bounded."""

    def __init__(
        self, group: Group, representation: Representation, data: DataConfig, model: ModelConfig
    ):
        super().__init__()
        self.patch_size, self.downsampling = model.patch_size, model.downsampling
        m = model.encoder_hidden_size // len(group)
        patch = patch_action(group, model.patch_size, data.channels)
        self.patches = Lift(group, *patch, m, fan_in=patch[0].shape[1])
        height, width = (side // model.patch_size for side in data.image_size)
        self.positions = Positions(group, height, width, m)
        stages = int(math.log2(model.downsampling // model.patch_size)) + 1
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(group, m, model.num_heads, model.mlp_ratio)
                    for _ in range(model.encoder_depth)
                )
            )
            for _ in range(stages)
        )
        self.resample = Resample(group, 2)
        self.merges = nn.ModuleList(Linear(group, 4 * m, m) for _ in range(stages - 1))
        self.latent = Lift(group, *latent_action(group, representation), m, fan_in=len(group) * m)
        self.linear_path = LinearPath(group, representation, model.downsampling, data.channels)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim latent_h latent_w"]:
        """Return the latent: the transformer's output plus the linear path's."""
        height, width = (size // self.patch_size for size in image.shape[-2:])
        x = self.patches(patchify(image, self.patch_size))
        # The residual stream has autocast's dtype, whatever the group.
        x = x + self.positions(height, width).to(x.dtype)
        for i, stage in enumerate(self.stages):
            if i:
                x = self.merges[i - 1](self.resample.merge(x, height, width))
                height, width = height // 2, width // 2
            x = stage(x)
        latent = self.latent.back(normalize(x)) + self.linear_path(image)  # (b, cell, dim)
        return latent.mT.unflatten(-1, (height, width))
