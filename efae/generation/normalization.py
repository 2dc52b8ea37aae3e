"""Scale and shift of latents before diffusion, which commute with the group.

Only invariant channels (A1) are shifted, by their mean, since a mean in any other would not survive
a change of sign. Every irrep has one scale, the root mean square that remains.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from efae.symmetry import Representation

_SMALLEST = 1e-3
"""Least scale: an irrep that no image excites must not become noise of unit scale."""


class Normalization(nn.Module):
    """Maps latents (b, dim, h, w) to unit mean power per irrep, and back.

    Statistics, not weights: as parameters they are saved and averaged with the weights.

    Args:
        representation: Representation of the group on the channels.
    """

    def __init__(self, representation: Representation):
        super().__init__()
        self._blocks = list(representation.blocks.values())
        self._invariant = representation.multiplicities["a1"]
        self._dim = representation.dim
        self.shift = nn.Parameter(torch.zeros(self._invariant), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(len(self._blocks)), requires_grad=False)

    @torch.no_grad()
    def fit(self, latents: Iterable[Float[Tensor, "b dim h w"]]) -> None:
        """Set scale and shift by all these latents."""
        count, total, square = 0, torch.zeros(self._dim).double(), torch.zeros(self._dim).double()
        for latent in latents:
            wide = latent.double()
            total += wide.sum((0, 2, 3))
            square += wide.square().sum((0, 2, 3))
            count += wide[:, 0].numel()
        mean = total / count
        mean[self._invariant :] = 0
        power = square / count - mean.square()  # around the shift
        self.shift.copy_(mean[: self._invariant])
        scale = torch.stack([power[block].mean().clamp(min=0).sqrt() for block in self._blocks])
        self.scale.copy_(scale.clamp(min=_SMALLEST))

    def normalize(self, latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b dim h w"]:
        """Shift, then scale."""
        shift, scale = self._by_channel()
        return (latent - shift) / scale

    def denormalize(self, latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b dim h w"]:
        """Invert `normalize`."""
        shift, scale = self._by_channel()
        return latent * scale + shift

    def _by_channel(self) -> tuple[Tensor, Tensor]:
        shift = torch.cat([self.shift, self.shift.new_zeros(self._dim - self._invariant)])
        sizes = [block.stop - block.start for block in self._blocks]
        scale = torch.cat([s.expand(n) for s, n in zip(self.scale, sizes, strict=True)])
        return shift[:, None, None], scale[:, None, None]
