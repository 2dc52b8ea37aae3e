"""Large images: a network sees one window of the image at a time, so that the window bounds memory.

Windows overlap, and the outputs of windows that share a cell are blended there with weights that
rise linearly from the edges of each. Where a network is convolutional, a cell depends only on cells
within a radius. Nearer than that to an edge inside the image a window's weight is zero, so that the
result is that of the whole image, to rounding. Edges of the image are edges of windows too: zeros
around the grid are the same there. Where attention spans the image, blended windows are an
approximation: a window attends only to itself.

All windows of an image have one shape, and those of a flipped or turned image are the flipped or
turned ones. So both kinds commute with the group, to rounding.
"""

import itertools
import math
import operator
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from efae.model.networks import diffusers_vae, transformer, unet

BLENDED_CELLS = 4
"""Least overlap of the windows of a network with attention, in latent cells.

Photographs of 256 px, models trained at 64 px, one step, tiles of 64: the decoded images differ by
0.6 to 0.7 levels of 255 (root mean square) from those decoded whole, at the same PSNR, and the
worst columns of pixels show steps of 1.1 levels where the median has 0.7. Six cells do not lower
that; two give 1.2, none 1.3 to 3.4. Larger tiles lower all of these.
"""

Compute = Callable[[slice, slice], Tensor]
"""Function of the rows and columns of latent cells of a window that returns the output there."""


def encode_in_tiles(
    encoder: transformer.Encoder | unet.Encoder | diffusers_vae.Encoder,
    image: Float[Tensor, "b c h w"],
    tile: int,
    downsampling: int,
) -> Float[Tensor, "b dim lh lw"]:
    """Apply an encoder to windows of an image.

    Args:
        encoder: Encoder.
        image: Images whose sides `downsampling` divides.
        tile: Side of a window, in pixels.
        downsampling: Side of a latent cell, in pixels.

    Raises:
        ValueError: No window of this size is possible.
    """

    def compute(rows: slice, columns: slice) -> Tensor:
        return encoder(_cut(image, rows, columns, downsampling))

    cells = image.shape[-2] // downsampling, image.shape[-1] // downsampling
    plan = plan_windows(tile, downsampling, encoder.receptive_radius())
    return _blend(compute, cells, 1, plan)


def decode_in_tiles(
    decoder: transformer.Decoder | unet.Decoder | diffusers_vae.Decoder,
    x_t: Float[Tensor, "b c h w"],
    t: Float[Tensor, "b"],
    latent: Float[Tensor, "b dim lh lw"],
    keep: Bool[Tensor, "b"] | None,
    tile: int,
) -> Float[Tensor, "b c h w"]:
    """Evaluate a decoder once, on windows of an image; the mean latent is that of the whole.

    Args:
        decoder: Decoder.
        x_t: Noisy images.
        t: Times.
        latent: Latents.
        keep: Whether to use the latent instead of the null condition, as `decoder` takes it.
        tile: Side of a window, in pixels.

    Raises:
        ValueError: No window of this size is possible.
    """
    height, width = latent.shape[-2:]
    side, mean = x_t.shape[-2] // height, latent.mean((2, 3))
    plan = plan_windows(tile, side, decoder.receptive_radius())

    def compute(rows: slice, columns: slice) -> Tensor:
        return decoder(_cut(x_t, rows, columns, side), t, latent[..., rows, columns], keep, mean)

    return _blend(compute, (height, width), side, plan)


def place_windows(cells: int, most: int, overlap: int) -> tuple[list[int], int]:
    """Return where the windows along one axis begin, and their common length.

    Windows are as few as possible and then as short as possible; they lie symmetrically.

    Args:
        cells: Length of the axis.
        most: Greatest length of a window, above `overlap`.
        overlap: Least overlap of neighbours.
    """
    if cells <= most:
        return [0], cells
    steps = math.ceil((cells - most) / (most - overlap))
    while (length := _shorten(cells, steps, overlap)) > most:
        steps += 1
    span = cells - length
    near = [(2 * i * span + steps) // (2 * steps) for i in range(steps // 2 + 1)]
    far = [span - start for start in near[: (steps + 1) // 2]]
    return near + far[::-1], length


def _shorten(cells: int, steps: int, overlap: int) -> int:
    """Return the least length of `steps` + 1 windows that cover an axis symmetrically."""
    length = math.ceil((cells + steps * overlap) / (steps + 1))
    # A window in the middle leaves the same number of cells on both sides.
    return length + (cells - length) % 2 if steps % 2 == 0 else length


def weigh_windows(
    starts: list[int], length: int, margin: int, pixels: int
) -> Float[Tensor, "window length*pixels"]:
    """Return the weights of the windows along one axis; those of every pixel sum to 1.

    Weights are in proportion to the distance from the ends of a window that lie inside the axis,
    and zero within `margin` cells of them.

    Args:
        starts: First cell of each window.
        length: Cells of a window.
        margin: Cells at each end that other windows must cover.
        pixels: Pixels of a cell, on this axis.
    """
    cells = starts[-1] + length
    centre = (torch.arange(cells * pixels, dtype=torch.float64) + 0.5) / pixels
    first, last = torch.tensor(starts[1:]), torch.tensor(starts[:-1]) + length
    after = torch.full((len(starts), len(centre)), float(cells), dtype=torch.float64)
    before = after.clone()
    after[1:] = centre - first[:, None] - margin
    before[:-1] = last[:, None] - margin - centre
    distance = torch.minimum(after, before).clamp(min=0)
    weight = distance / distance.sum(0)
    return torch.stack(
        [
            row[start * pixels : (start + length) * pixels]
            for row, start in zip(weight, starts, strict=True)
        ]
    )


def plan_windows(tile: int, side: int, radius: int | None) -> tuple[int, int, int]:
    """Return, in cells: greatest length of a window, least overlap, margin of weight zero.

    Args:
        tile: Side of a window, in pixels.
        side: Side of a latent cell, in pixels.
        radius: Receptive radius of the network; None: attention spans the window.

    Raises:
        ValueError: The tile is no whole number, or no window of this size is possible.
    """
    try:
        tile = operator.index(tile)
    except TypeError as error:
        raise ValueError(f"tile={tile!r}: give a whole number of pixels") from error
    margin = radius or 0
    overlap = BLENDED_CELLS if radius is None else 2 * margin
    if tile % side or tile // side <= overlap:
        raise ValueError(
            f"tile={tile}: must be a multiple of model.downsampling={side} and at least"
            f" {side * (overlap + 1)}, since the tiles of this model overlap by"
            f" {side * overlap} pixels"
        )
    return tile // side, overlap, margin


def _blend(
    compute: Compute, cells: tuple[int, int], pixels: int, plan: tuple[int, int, int]
) -> Tensor:
    """Add up the weighted outputs, of `pixels` per cell and side, of all windows of a grid."""
    most, overlap, margin = plan
    if max(cells) <= most:
        return compute(slice(0, cells[0]), slice(0, cells[1]))
    (tops, tall), (lefts, wide) = (place_windows(count, most, overlap) for count in cells)
    down = weigh_windows(tops, tall, margin, pixels)
    across = weigh_windows(lefts, wide, margin, pixels)
    total: Tensor | None = None
    for (i, top), (j, left) in itertools.product(enumerate(tops), enumerate(lefts)):
        rows, columns = slice(top, top + tall), slice(left, left + wide)
        part = compute(rows, columns)
        if total is None:
            shape = *part.shape[:-2], cells[0] * pixels, cells[1] * pixels
            total = part.new_zeros(shape, dtype=torch.promote_types(part.dtype, torch.float32))
        weight = down[i].to(total)[:, None] * across[j].to(total)
        _cut(total, rows, columns, pixels).add_(part * weight)
    assert total is not None
    return total


def _cut(grid: Tensor, rows: slice, columns: slice, pixels: int) -> Tensor:
    """Return the view of a window, given in cells, of a grid with `pixels` per cell and side."""
    return grid[
        ...,
        rows.start * pixels : rows.stop * pixels,
        columns.start * pixels : columns.stop * pixels,
    ]
