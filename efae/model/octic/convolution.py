"""Depthwise convolution of octic tokens, and the block that is built around it.

In the regular basis the group permutes the features of a channel, so a convolution with one filter
per feature commutes with it if the filter of component g is the channel's filter turned by g. The
nonlinearity needs the same basis, so that one visit serves both.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from efae.model.octic.layers import (
    Linear,
    Offset,
    Recomputing,
    normalize,
    zero_linear,
)
from efae.model.octic.layout import (
    embed_invariant,
    from_regular,
    layout_of,
    spread_gains,
    to_regular,
)
from efae.symmetry.group import Group, grid_sources

KERNEL_SIZE = 3


class DepthwiseRelu(nn.Module):
    """A filter per channel, turned with the group, then ReLU, both in the regular basis.

    Stride 1 and zeros around the grid, which keep every symmetry of a grid of any height and width.

    Args:
        group: Group that acts.
        m: Number of channels of the tokens.
    """

    source: Tensor
    fourier: Tensor

    def __init__(self, group: Group, m: int):
        super().__init__()
        self.layout = layout_of(group)
        source = grid_sources(group, KERNEL_SIZE, KERNEL_SIZE)
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("fourier", self.layout.fourier, persistent=False)
        self.filter = nn.Parameter(torch.empty(m, KERNEL_SIZE**2))
        nn.init.uniform_(self.filter, -1 / KERNEL_SIZE, 1 / KERNEL_SIZE)

    def weight(self) -> Float[Tensor, "element*m 1 k k"]:
        """Return the filter of every feature: that of component g is turned by g."""
        turned = self.filter[:, self.source].transpose(0, 1)  # (element, m, k * k)
        return turned.reshape(-1, 1, KERNEL_SIZE, KERNEL_SIZE)

    def forward(
        self, x: Float[Tensor, "slot batch token coset*m"], height: int, width: int
    ) -> Float[Tensor, "slot batch token coset*m"]:
        """Filter the tokens of a height x width grid, row by row."""
        regular = to_regular(self.fourier, x)
        elements, batch, tokens, m = regular.shape
        # Features last in memory, where depthwise convolutions are fastest.
        grid = regular.permute(1, 2, 0, 3).reshape(batch, height, width, elements * m)
        y = F.conv2d(
            grid.permute(0, 3, 1, 2),
            self.weight().to(x.dtype),
            padding=KERNEL_SIZE // 2,
            groups=elements * m,
        )
        y = F.relu(y).permute(0, 2, 3, 1).reshape(batch, tokens, elements, m)
        return from_regular(self.fourier, y.permute(2, 0, 1, 3), len(x))


class ConvolutionBlock(Recomputing):
    """Linear, depthwise convolution with ReLU, Linear; modulated like a transformer block.

    A ConvNeXt block (Liu et al. 2022, arXiv:2201.03545) with its convolution at the wide place,
    where the nonlinearity already pays for the change of basis.

    Args:
        group: Group that acts.
        m: Number of channels of the tokens.
        ratio: Ratio of the hidden channels to m.
        conditioning: Width of the condition; 0 for none.
        shared: Whether the condition is already the modulation, made once for several blocks, of
            `modulation_sizes` in total.
    """

    def __init__(
        self, group: Group, m: int, ratio: int, conditioning: int = 0, shared: bool = False
    ):
        super().__init__()
        self.layout = layout_of(group)
        self.inward = Linear(group, m, ratio * m)
        self.depthwise = DepthwiseRelu(group, ratio * m)
        self.outward = Linear(group, ratio * m, m)
        self.modulation = None
        if conditioning:
            self.sizes = modulation_sizes(group, m)
            total = sum(self.sizes)
            self.modulation = Offset(total) if shared else zero_linear(conditioning, total)

    def apply_block(
        self,
        x: Float[Tensor, "slot batch token coset*m"],
        condition: Float[Tensor, "batch conditioning"] | None,
        *sizes: int,
    ) -> Float[Tensor, "slot batch token coset*m"]:
        """Apply the block to a grid of height and width `sizes`."""
        height, width = sizes
        if self.modulation is None:
            return x + self._change(normalize(x), height, width)
        scale, gate, shift = self.modulation(condition).split(self.sizes, -1)
        scale, gate = (spread_gains(self.layout, part) for part in (scale, gate))
        shift = embed_invariant(self.layout, shift)[:, :, None]
        changed = self._change(torch.addcmul(shift, normalize(x), 1 + scale), height, width)
        return torch.addcmul(x, gate, changed)

    def _change(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.outward(self.depthwise(self.inward(x), height, width))


def modulation_sizes(group: Group, m: int) -> list[int]:
    """Return the sizes of scale, gate and shift in the modulation of a `ConvolutionBlock`."""
    gains = layout_of(group).gains
    return [gains * m, gains * m, m]
