"""The states of a sampler, from noise to images: an animated GIF, or a filmstrip for print.

    states = []
    integrate(field, noise, times, visit=lambda t, x: states.append((t, x)))
    draw_trajectory(states, Path("trajectory.gif"))

Images are enlarged by a whole factor.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FRAME_MILLISECONDS, FIRST_MILLISECONDS, LAST_MILLISECONDS = 120, 600, 2500
"""Durations for which the GIF shows a state, the first state and the last."""

States = Sequence[tuple[float, Tensor]]
"""States (t, x (n, c, h, w)) from noise to image; c is 1 or 3, images are in [-1, 1]."""

_TILE = 96
"""Smallest side of a drawn image, pixels."""
_GAP, _LINE = 8, 24
_INK = "#374151"


def draw_trajectory(states: States, path: Path, examples: int = 6, frames: int = 24) -> None:
    """Draw up to `frames` states as a GIF, the first `examples` side by side; pauses on the last.

    States are evenly spaced, from the first to the last. Frames are reduced to 64 colours, the last
    one to the 256 of GIF, which is exact for grey images.

    Raises:
        ValueError: There are no states, they are not images of one shape, or frames is below 2.
    """
    drawn: list[Image.Image] = []
    for t, images in _pixels(_choose(states, frames), examples):
        count, height, width = images.shape[:3]
        frame = _blank(images, count * (width + _GAP) + _GAP, height + _LINE + 2 * _GAP)
        for i, image in enumerate(images):
            frame.paste(Image.fromarray(image), (_GAP + i * (width + _GAP), _LINE + _GAP))
        ImageDraw.Draw(frame).text((_GAP, _GAP), f"t = {t:.2f}", _INK, font=_font())
        drawn.append(frame)
    # Noise compresses badly, and 64 colours are enough for it. Dithering would break up the
    # enlarged pixels.
    drawn[:-1] = [frame.quantize(64, dither=Image.Dither.NONE) for frame in drawn[:-1]]
    if drawn[-1].mode == "RGB":
        drawn[-1] = drawn[-1].quantize(
            256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
        )
    pauses = [FRAME_MILLISECONDS] * len(drawn)
    pauses[0], pauses[-1] = FIRST_MILLISECONDS, LAST_MILLISECONDS
    drawn[0].save(
        path, format="GIF", save_all=True, append_images=drawn[1:], duration=pauses, loop=0
    )


def draw_filmstrip(states: States, path: Path, examples: int = 6, columns: int = 8) -> None:
    """Draw up to `columns` states as a PNG: one column each, one row for each of `examples`.

    States are evenly spaced, from the first to the last.

    Raises:
        ValueError: There are no states, they are not images of one shape, or columns is below 2.
    """
    strip = _pixels(_choose(states, columns), examples)
    first = strip[0][1]
    rows, height, width = first.shape[:3]
    page = _blank(first, len(strip) * (width + _GAP) - _GAP, _LINE + rows * (height + _GAP) - _GAP)
    pen = ImageDraw.Draw(page)
    for column, (t, images) in enumerate(strip):
        x = column * (width + _GAP)
        pen.text((x + width / 2, 0), f"t = {t:.2f}", _INK, font=_font(), anchor="ma")
        for row, image in enumerate(images):
            page.paste(Image.fromarray(image), (x, _LINE + row * (height + _GAP)))
    page.save(path, format="PNG", optimize=True)


def _choose(states: States, count: int) -> States:
    """Choose up to `count` states, evenly spaced from the first to the last."""
    if count < 2:
        raise ValueError(f"{count} states to draw: the first and the last make two")
    if len(states) <= count:
        return states
    return [states[round(i * (len(states) - 1) / (count - 1))] for i in range(count)]


def _pixels(states: States, examples: int) -> list[tuple[float, np.ndarray]]:
    """Return t and enlarged images of each state, uint8 (n, h, w, 3), or (n, h, w) for grey."""
    shapes = {tuple(x.shape) for _, x in states}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape or examples < 1:
        raise ValueError(
            f"{len(states)} states of shapes {sorted(shapes)}, {examples} examples: needs at least"
            " one state, all of one shape (n, 1 or 3, h, w), and at least one example"
        )
    scale = -(-_TILE // max(shape[2:]))
    pixels: list[tuple[float, np.ndarray]] = []
    for t, x in states:
        image = x[:examples].detach().float().cpu().clamp(-1, 1)
        grey = ((image + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        large = grey.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        pixels.append((t, (large[..., 0] if large.shape[-1] == 1 else large).numpy()))
    return pixels


def _blank(images: np.ndarray, width: int, height: int) -> Image.Image:
    return Image.new("RGB" if images.ndim == 4 else "L", (width, height), "white")


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=16)
