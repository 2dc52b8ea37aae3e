"""Crop and resample an image of any size to fill a row of a batch."""

import numpy as np


def cover(pixels: np.ndarray, height: int, width: int, crop_at: tuple[float, float]) -> np.ndarray:
    """Resample the largest part of `pixels` with the target's aspect ratio, on whole pixels.

    Args:
        pixels: Image, uint8 (H, W, C), of any size.
        height: Target height.
        width: Target width.
        crop_at: Place of the crop, (vertical, horizontal): 0 for top or left, 1 for the other end.
    """
    rows, columns = pixels.shape[:2]
    scale = max(height / rows, width / columns)
    box_rows = min(rows, max(1, round(height / scale)))
    box_columns = min(columns, max(1, round(width / scale)))
    top, left = round((rows - box_rows) * crop_at[0]), round((columns - box_columns) * crop_at[1])
    part = pixels[top : top + box_rows, left : left + box_columns]
    return part if part.shape[:2] == (height, width) else _resample(part, height, width)


def _resample(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample bicubically with antialiasing: within 1 of Pillow, and several times as fast."""
    import torch  # here, because building and indexing do not need it

    # A flipped axis of one pixel has a negative stride, which numpy calls contiguous.
    pixels = np.require(pixels, requirements=["C", "W"])
    image = torch.from_numpy(pixels if min(pixels.strides) > 0 else pixels.copy())
    image = image.view(1, *pixels.shape).permute(0, 3, 1, 2)  # keeps the strides: no copy
    resized = torch.nn.functional.interpolate(
        image, (height, width), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()
