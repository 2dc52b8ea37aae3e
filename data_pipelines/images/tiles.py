"""Images of any size -> tiles of one size -> one sheet."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

TILE, GAP = 96, 4  # pixels
_BACKGROUND = (236, 236, 236)


def draw_tile(pixels: np.ndarray) -> Image.Image:
    """Draw the whole image, a small one enlarged by an integer factor, a large one resampled.

    Args:
        pixels: RGB image, uint8 (3, H, W).
    """
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    scale = TILE // max(image.size)
    if scale > 1:
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return image


def draw_rows(tiles: Sequence[Image.Image], columns: int, header: int = 0) -> Image.Image:
    """Draw tiles in rows.

    Args:
        tiles: Tiles in reading order, at least one.
        columns: Tiles per row.
        header: Height of the space above the tiles, in pixels.
    """
    rows, step = -(-len(tiles) // columns), TILE + GAP
    size = (columns * step + GAP, header + rows * step + GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    for number, tile in enumerate(tiles):
        left, top = GAP + number % columns * step, header + GAP + number // columns * step
        sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
    return sheet
