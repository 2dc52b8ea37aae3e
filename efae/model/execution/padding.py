"""Images that the latent grid does not divide: padded before encoding, cropped after decoding.

Half of the missing pixels go to each side, so that padding commutes with flips and turns. An odd
pixel cannot be halved: it goes to the bottom and to the right.
"""

import operator
from typing import Any

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


def check_size(size: Any, grid: tuple[int, int], side: int) -> None:
    """Check that images of this size are encoded to a grid of cells.

    Args:
        size: Height and width, as the user gave them.
        grid: Rows and columns of the grid.
        side: Side of a latent cell, in pixels.

    Raises:
        ValueError: These are not two whole numbers, or images of this size have another grid.
    """
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"size={size!r}: give height and width, two whole numbers") from error
    rows, columns = grid
    if (-(-height // side), -(-width // side)) != (rows, columns):
        raise ValueError(
            f"size={height, width}: a latent of {rows} x {columns} cells of {side} pixels decodes"
            f" to {rows * side} x {columns * side} pixels, less at most {side - 1} of padding per"
            " side; give the size of the image that was encoded, with height and width exchanged"
            " if a quarter turn acted on its latent"
        )


def _halve(missing: int) -> tuple[int, int]:
    return missing // 2, missing - missing // 2
