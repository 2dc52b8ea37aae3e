"""Images that the latent grid does not divide: padded before encoding, cropped after decoding.

Half of the missing pixels go to each side, so that padding commutes with flips and turns. An odd
pixel cannot be halved: it goes to the bottom and to the right.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def pad_to_cells(
    image: Float[Tensor, "b c h w"], side: int
) -> Float[Tensor, "b c padded_h padded_w"]:
    """Repeat the pixels at the edges until `side` divides height and width.

    Args:
        image: Images of at least one pixel.
        side: Side of a latent cell, in pixels.
    """
    top, bottom = _halve(-image.shape[-2] % side)
    left, right = _halve(-image.shape[-1] % side)
    if not top + bottom + left + right:
        return image
    return F.pad(image, (left, right, top, bottom), mode="replicate")


def crop(
    image: Float[Tensor, "b c padded_h padded_w"], size: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    """Remove what `pad_to_cells` added to images of this size."""
    height, width = size
    top, _ = _halve(image.shape[-2] - height)
    left, _ = _halve(image.shape[-1] - width)
    return image[..., top : top + height, left : left + width]


def _halve(missing: int) -> tuple[int, int]:
    return missing // 2, missing - missing // 2
