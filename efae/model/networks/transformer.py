"""The octic transformer: a patch encoder, and a diffusion transformer as decoder.

Encoder: patches are lifted to tokens; blocks alternate with 2 x 2 merges down to the latent grid;
the last tokens are mapped to the representation of the latent. A linear path adds an equivariant
linear map of each cell's pixels: without it, narrow group networks lose colour (15 dB on
photographs).

Decoder (Peebles & Xie 2023, arXiv:2212.09748): the latent enters twice: every token gets its part
of its latent cell, and the invariants of the mean latent join t in the conditioning of adaLN. All
layers commute with the group.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from efae.config import DataConfig, FlowConfig, ModelConfig
from efae.model.networks.conditioning import ConditionedDecoder
from efae.model.networks.linear_path import (
    ENCODER_DAMPING,
    build_linear_path,
    damp,
    patchify,
)
from efae.model.octic.layers import (
    Block,
    Lift,
    Linear,
    latent_action,
    modulation_sizes,
    normalize,
    patch_action,
    zero_linear,
)
from efae.model.octic.token_grid import Resample
from efae.symmetry.group import Group, grid_sources
from efae.symmetry.representation import Representation


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
            # In half precision, torch resamples with antialiasing on GPUs alone.
            grid = grid.to(torch.promote_types(weight.dtype, torch.float32))
            resized = F.interpolate(grid, (height, width), mode="bilinear", antialias=True)
            weight = resized.flatten(-2).mT.to(weight.dtype)
        return weight[:, None]


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
        self.linear_path = build_linear_path(group, representation, data, model)
        self.damping = damp(self.latent, ENCODER_DAMPING) if model.has_linear_start else 1.0

    def receptive_radius(self) -> None:
        """Return None: attention makes every cell depend on all."""

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
        cells = self.damping * self.latent.back(normalize(x)) + self.linear_path(image)
        return cells.mT.unflatten(-1, (height, width))


class Decoder(ConditionedDecoder):
    """Predicts image or velocity from x_t, t and latent, as flow.prediction says.

    Images may have another size than data.image_size: the position embedding is resampled.
    """

    def __init__(
        self,
        group: Group,
        representation: Representation,
        data: DataConfig,
        model: ModelConfig,
        flow: FlowConfig,
    ):
        super().__init__(group, flow)
        self.patch_size, hidden_size = model.patch_size, model.hidden_size
        m = hidden_size // len(group)
        ratio = model.downsampling // model.patch_size
        patch = patch_action(group, model.patch_size, data.channels)
        rho = latent_action(group, representation)
        self.patches = Lift(group, *patch, m, fan_in=patch[0].shape[1])
        height, width = (side // model.patch_size for side in data.image_size)
        self.positions = Positions(group, height, width, m)
        self.latent = Lift(group, *rho, m * ratio**2, fan_in=representation.dim)
        self.resample = Resample(group, ratio)
        self.add_conditioning(representation, m, hidden_size)
        shared = model.modulation == "shared"
        self.shared_modulation = None
        if shared:
            self.shared_modulation = zero_linear(hidden_size, sum(modulation_sizes(group, m)))
        self.blocks = nn.ModuleList(
            Block(group, m, model.num_heads, model.mlp_ratio, hidden_size, shared)
            for _ in range(model.depth)
        )
        self.add_output(representation, m, data, model)

    def receptive_radius(self) -> None:
        """Return None: attention makes every cell depend on all."""

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim latent_h latent_w"],
        keep: Bool[Tensor, "b"] | None = None,
        mean: Float[Tensor, "b dim"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the prediction; where `keep` is false, the null condition replaces the latent.

        t lies in [0, 1]; the latent grid is h / f x w / f cells for images of h x w pixels. If
        these are a part of an image, `mean` is the mean of the whole latent.
        """
        height, width = x_t.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        cells = self.latent(latent.flatten(2).mT)  # (slot, b, cell, ratio^2 coset m)
        tokens = self.resample.split(cells, *grid)  # (slot, b, token, coset m)
        tokens = self.drop(tokens, keep)
        seen, linear = self.see(x_t, t, latent, keep)
        x = self.patches(patchify(seen, self.patch_size)) + tokens
        x = x + self.positions(*grid).to(x.dtype)
        condition = self.condition(t, latent, keep, mean)
        modulation = condition
        if self.shared_modulation is not None:
            modulation = self.shared_modulation(condition)
        for block in self.blocks:
            x = block(x, modulation)
        return self.predict(x, condition, linear, *x_t.shape[-2:])
