"""Patches of pixels, and equivariant linear maps between them and a latent."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from efae.config import DataConfig, ModelConfig
from efae.model.octic.layers import Expanding, Lift, latent_action, patch_action
from efae.symmetry.group import Group
from efae.symmetry.representation import Representation

ENCODER_DAMPING = 0.2
DECODER_DAMPING = 0.1
"""Factors on a network's output beside a linear path that starts in closed form. At rates at which
networks learn well, they would otherwise throw that start away."""


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


class LinearPath(Expanding):
    """An equivariant linear map from the pixels of a cell to the latent.

    The group average of rho(g) W P(g)^-1 over all g, with W free, reaches every such map.

    Attributes:
        starts_in_closed_form: Whether the map is set from the training images before training.
    """

    rows: Tensor
    columns: Tensor
    signs: Tensor

    def __init__(
        self,
        group: Group,
        representation: Representation,
        side: int,
        channels: int,
        starts_in_closed_form: bool = False,
    ):
        super().__init__()
        self.side, self.starts_in_closed_form = side, starts_in_closed_form
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

    def weight(self) -> Float[Tensor, "dim c*side**2"]:
        """Return the map."""
        return self._keep(
            "weight", lambda: (self.free[self.rows, self.columns] * self.signs).sum(0)
        )

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b cell dim"]:
        """Map an image to latent cells."""
        weight = self.weight()
        patches = patchify(image, self.side)
        # The mean of each colour is mapped separately. A constant image must give exactly zero
        # outside A1, where the terms of its mean cancel; in fp32 they would leave rounding errors.
        colours = torch.unflatten(patches, -1, (-1, self.side**2))  # (b, cell, c, side^2)
        means = colours.mean(-1, keepdim=True)
        totals = torch.unflatten(weight, -1, (-1, self.side**2)).sum(-1)  # (dim, c)
        centred = (colours - means).flatten(-2)
        dtype = patches.dtype
        return centred @ weight.t().to(dtype) + means[..., 0] @ totals.t().to(dtype)

    def back(self, latent: Float[Tensor, "b dim lh lw"]) -> Float[Tensor, "b c h w"]:
        """Apply the transposed map, from a latent to an image."""
        cells = latent.flatten(2).mT @ self.weight().to(latent.dtype)
        height, width = (side * self.side for side in latent.shape[-2:])
        return unpatchify(cells, self.side, height, width)


def build_linear_path(
    group: Group, representation: Representation, data: DataConfig, model: ModelConfig
) -> LinearPath:
    """Build the linear path of an encoder, or of a decoder, for a configuration."""
    return LinearPath(
        group, representation, model.downsampling, data.channels, model.has_linear_start
    )


def damp(output: Lift, damping: float) -> float:
    """Set the output layer of a network beside a linear path to zero, and return the damping."""
    nn.init.zeros_(output.coefficient)
    return damping
