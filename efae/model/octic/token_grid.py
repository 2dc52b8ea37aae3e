"""Lossless, equivariant resampling of a grid of octic tokens."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from efae.model.octic.layout import from_regular, layout_of, to_regular
from efae.symmetry.group import Group, grid_sources


class Resample(nn.Module):
    """Merges ratio x ratio tokens into one (space to depth), or splits one into as many.

    In the regular basis, component g of the token at offset p moves to the channel of the offset q
    with p = g q. So arranged, the ratio^2 tokens are ratio^2 * m regular channels of one token.

    Args:
        group: Group that acts.
        ratio: Side of the square of tokens that become one.
    """

    goes_to: Tensor
    fourier: Tensor

    def __init__(self, group: Group, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.layout = layout_of(group)
        # grid_sources gives, for a cell p, the cell that g moves there; its inverse gives g q.
        goes_to = grid_sources(group, ratio, ratio).argsort(-1)
        self.register_buffer("goes_to", goes_to, persistent=False)
        self.register_buffer("fourier", self.layout.fourier, persistent=False)

    def merge(
        self, x: Float[Tensor, "slot batch token coset*m"], height: int, width: int
    ) -> Float[Tensor, "slot batch token/ratio**2 ratio**2*coset*m"]:
        """Merge the tokens of a height x width grid, row by row; `ratio` divides both sides."""
        r, batch = self.ratio, x.shape[1]
        grid = to_regular(self.fourier, x).view(
            -1, batch, height // r, r, width // r, r, x.shape[-1] // self.layout.cosets
        )
        offsets = grid.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5)  # (g, b, h, w, r * r, m)
        # By position: an exported loop takes the items of an iterated buffer for aliases.
        filed = torch.stack([part[..., self.goes_to[i], :] for i, part in enumerate(offsets)])
        return from_regular(self.fourier, filed.flatten(-2).flatten(2, 3), len(x))

    def split(
        self,
        x: Float[Tensor, "slot batch token/ratio**2 ratio**2*coset*m"],
        height: int,
        width: int,
    ) -> Float[Tensor, "slot batch token coset*m"]:
        """Invert `merge`; height and width are those of the fine grid."""
        r, batch = self.ratio, x.shape[1]
        filed = to_regular(self.fourier, x).view(
            -1, batch, height // r, width // r, r * r, self._m(x)
        )
        sources = self.goes_to.argsort(-1)
        offsets = torch.stack([part[..., i, :] for part, i in zip(filed, sources, strict=True)])
        grid = torch.unflatten(offsets, 4, (r, r)).permute(0, 1, 2, 4, 3, 5, 6)
        return from_regular(
            self.fourier, grid.reshape(-1, batch, height * width, self._m(x)), len(x)
        )

    def _m(self, x: Tensor) -> int:
        return x.shape[-1] // self.layout.cosets // self.ratio**2
