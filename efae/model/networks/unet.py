"""The octic U-ViT: an encoder and a decoder of convolutions, for images of any size.

Blocks are depthwise convolutions between octic linear maps; attention is only at the latent's grid,
the coarsest. The decoder is a U-Net around that grid (Hoogeboom et al. 2023, arXiv:2301.11093):
the latent joins the tokens there, and invariants of t and of the mean latent modulate every block.
Nothing knows the size of the grid, so a model runs on every height and width that the
downsampling divides.
"""

import itertools
import math
from collections.abc import Iterable
from typing import cast

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
from efae.model.octic.convolution import (
    KERNEL_SIZE,
    ConvolutionBlock,
    DepthwiseRelu,
    modulation_sizes,
)
from efae.model.octic.layers import (
    Block,
    Lift,
    Linear,
    latent_action,
    normalize,
    patch_action,
    zero_linear,
)
from efae.model.octic.layout import spread_gains
from efae.model.octic.token_grid import Resample
from efae.symmetry.group import Group
from efae.symmetry.representation import Representation


def list_widths(model: ModelConfig, coarsest: int) -> list[int]:
    """Return the width of the tokens of each grid, from the finest to the latent's.

    A geometric sequence from model.fine_hidden_size to `coarsest`, in multiples of 8.
    """
    grids = int(math.log2(model.downsampling // model.patch_size)) + 1
    ratio = coarsest / model.fine_hidden_size
    return [
        coarsest
        if i == grids - 1
        else 8 * round(model.fine_hidden_size * ratio ** (i / (grids - 1)) / 8)
        for i in range(grids)
    ]


class Encoder(nn.Module):
    """Maps images (b, c, h, w) in [-1, 1] to latents (b, dim, h / f, w / f), not yet bounded."""

    def __init__(
        self, group: Group, representation: Representation, data: DataConfig, model: ModelConfig
    ):
        super().__init__()
        self.patch_size = model.patch_size
        channels = [width // len(group) for width in list_widths(model, model.encoder_hidden_size)]
        patch = patch_action(group, model.patch_size, data.channels)
        self.patches = Lift(group, *patch, channels[0], fan_in=patch[0].shape[1])
        depths = [model.fine_depth] * (len(channels) - 1) + [model.encoder_depth]
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvolutionBlock(group, m, 2) for _ in range(depth))
            for m, depth in zip(channels, depths, strict=True)
        )
        self.resample = Resample(group, 2)
        self.merges = nn.ModuleList(
            Linear(group, 4 * fine, coarse) for fine, coarse in itertools.pairwise(channels)
        )
        self.latent = Lift(
            group,
            *latent_action(group, representation),
            channels[-1],
            fan_in=len(group) * channels[-1],
        )
        self.linear_path = build_linear_path(group, representation, data, model)
        self.damping = damp(self.latent, ENCODER_DAMPING) if model.has_linear_start else 1.0

    def receptive_radius(self) -> int:
        """Return on how many cells of the image beyond its own, to each side, a cell depends."""
        tokens = 0
        for stage in reversed(self.stages):
            tokens = 2 * tokens + _radius(stage)
        return math.ceil(tokens / 2 ** len(self.merges))

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim latent_h latent_w"]:
        """Return the latent: the network's output plus the linear path's."""
        height, width = (size // self.patch_size for size in image.shape[-2:])
        x = self.patches(patchify(image, self.patch_size))
        for i, stage in enumerate(self.stages):
            if i:
                x = self.merges[i - 1](self.resample.merge(x, height, width))
                height, width = height // 2, width // 2
            for block in cast(Iterable[nn.Module], stage):
                x = block(x, None, height, width)
        cells = self.damping * self.latent.back(normalize(x)) + self.linear_path(image)
        return cells.mT.unflatten(-1, (height, width))


class Decoder(ConditionedDecoder):
    """Predicts image or velocity from x_t, t and latent, as flow.prediction says."""

    def __init__(
        self,
        group: Group,
        representation: Representation,
        data: DataConfig,
        model: ModelConfig,
        flow: FlowConfig,
    ):
        super().__init__(group, flow)
        self.patch_size, size = model.patch_size, model.hidden_size
        channels = [width // len(group) for width in list_widths(model, size)]
        *fine, m = channels
        patch = patch_action(group, model.patch_size, data.channels)
        self.patches = Lift(group, *patch, channels[0], fan_in=patch[0].shape[1])
        rho = latent_action(group, representation)
        self.latent = Lift(group, *rho, m, fan_in=representation.dim)
        self.add_conditioning(representation, m, size)
        shared = model.modulation == "shared"
        self.shared_sizes: list[list[int]] = []
        if shared:
            self.shared_sizes = [modulation_sizes(group, m) for m in channels]
        self.shared_modulations = nn.ModuleList(
            zero_linear(size, sum(sizes)) for sizes in self.shared_sizes
        )

        def build_stage(m: int, depth: int) -> nn.ModuleList:
            return nn.ModuleList(ConvolutionBlock(group, m, 2, size, shared) for _ in range(depth))

        self.down = nn.ModuleList(build_stage(m, model.fine_depth) for m in fine)
        self.middle = build_stage(m, model.depth)
        self.attention = nn.ModuleList(
            Block(group, m, model.num_heads, model.mlp_ratio, size)
            for _ in range(model.attention_depth)
        )
        self.up = nn.ModuleList(build_stage(m, 2 * model.fine_depth) for m in fine)
        self.resample = Resample(group, 2)
        pairs = list(itertools.pairwise(channels))
        self.merges = nn.ModuleList(Linear(group, 4 * a, b) for a, b in pairs)
        self.splits = nn.ModuleList(Linear(group, b, 4 * a) for a, b in pairs)
        # At t = 1 what a skip carries is noise: its gain must be able to close.
        self.skips = nn.ModuleList(zero_linear(size, self.layout.gains * a) for a in fine)
        self.add_output(representation, channels[0], data, model)

    def receptive_radius(self) -> int | None:
        """Return on how many cells beyond its own, to each side, the pixels of a cell depend.

        None if attention makes them depend on all.
        """
        if self.attention:
            return None
        tokens = 0
        for stage in self.up:
            tokens = math.ceil((tokens + _radius(stage)) / 2)
        tokens += _radius(self.middle)
        for stage in reversed(self.down):
            tokens = 2 * tokens + _radius(stage)
        return math.ceil(tokens / 2 ** len(self.down))

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
        height, width = (side // self.patch_size for side in x_t.shape[-2:])
        condition = self.condition(t, latent, keep, mean)
        seen, linear = self.see(x_t, t, latent, keep)
        x = self.patches(patchify(seen, self.patch_size))
        skips: list[Tensor] = []
        for i, blocks in enumerate(self.down):
            x = self._apply_stage(blocks, i, x, condition, (height, width))
            gain = spread_gains(self.layout, self.skips[i](condition))
            skips.append(x * (1 + gain))
            x = self.merges[i](self.resample.merge(x, height, width))
            height, width = height // 2, width // 2
        x = x + self.drop(self.latent(latent.flatten(2).mT), keep)
        x = self._apply_stage(self.middle, len(self.down), x, condition, (height, width))
        for i in reversed(range(len(self.up))):
            height, width = 2 * height, 2 * width
            x = self.resample.split(self.splits[i](x), height, width) + skips.pop()
            x = self._apply_stage(self.up[i], i, x, condition, (height, width))
        return self.predict(x, condition, linear, *x_t.shape[-2:])

    def _apply_stage(
        self, stage: nn.Module, grid: int, x: Tensor, condition: Tensor, sizes: tuple[int, int]
    ) -> Tensor:
        """Apply the blocks of one grid; attention is spread among those of the middle."""
        modulation = condition
        if self.shared_modulations:
            modulation = self.shared_modulations[grid](condition)
        for i, block in enumerate(cast(Iterable[nn.Module], stage)):
            x = block(x, modulation, *sizes)
            if stage is self.middle:
                count, depth = len(self.attention), len(self.middle)
                for j in range(i * count // depth, (i + 1) * count // depth):
                    x = self.attention[j](x, condition)
        return x


def _radius(stage: nn.Module) -> int:
    """Return on how many tokens beyond its own, to each side, a token depends after a stage."""
    return sum(KERNEL_SIZE // 2 for layer in stage.modules() if isinstance(layer, DepthwiseRelu))
