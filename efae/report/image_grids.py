"""Pictures of the report: one function each, from images to a PNG file; charts.py draws charts.

Images are enlarged by a whole factor, so small ones stay crisp. Figures are matplotlib objects,
never pyplot's: no global state is changed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from efae.symmetry import D4

ELEMENT_WORDS = {
    "identity": "unchanged",
    "rot90": "quarter turn left",
    "rot180": "half turn",
    "rot270": "quarter turn right",
    "flip_h": "mirror left–right",  # noqa: RUF001
    "flip_v": "mirror top–bottom",  # noqa: RUF001
    "transpose": "mirror along ╲",
    "anti_transpose": "mirror along ╱",  # noqa: RUF001
}
ERROR_LEVELS = 64
"""Error, in grey levels of 255, at which error maps saturate."""

GREY = "#6b7280"
_LETTER = np.pad(
    [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]], ((1, 1), (2, 1))
)
"""The letter F, on 7 x 7 pixels."""


def draw_reconstructions(
    original: Float[Tensor, "n c h w"], reconstruction: Float[Tensor, "n c h w"], path: Path
) -> None:
    """Draw originals, reconstructions, error maps and PSNR of up to 16 evenly spaced examples."""
    columns, count = 8, min(16, len(original))
    chosen = torch.linspace(0, len(original) - 1, count).long()
    original, reconstruction = original[chosen], reconstruction[chosen]
    tile = _tile(max(original.shape[-2:]), 128)
    step, left, row = tile + 10, 200, tile + 6
    block = 3 * row + 52
    blocks = -(-count // columns)
    figure = _canvas(left + columns * step, blocks * block)
    error = (original - reconstruction.clamp(-1, 1)).float()
    level = error.abs().mean(1) * 127.5 / ERROR_LEVELS  # (n, h, w)
    error_map = (colormaps["Reds"](level.clamp(max=1).numpy())[..., :3] * 255).astype(np.uint8)
    psnr = 10 * (4 / error.square().mean((1, 2, 3)).clamp(min=1e-12)).log10()
    for start in range(0, count, columns):
        top = start // columns * block
        for i, word in enumerate(("original", "reconstruction", "error")):
            _write(figure, 0, top + i * row + tile / 2, word, align="left")
        for i in range(start, min(start + columns, count)):
            x = left + (i - start) * step
            _place(figure, _pixels(original[i]), x, top, tile)
            _place(figure, _pixels(reconstruction[i]), x, top + row, tile)
            _place(figure, error_map[i], x, top + 2 * row, tile)
            _write(figure, x + tile / 2, top + 3 * row + 14, f"{float(psnr[i]):.1f} dB")
    save(figure, path)


def draw_orbit(
    original: Float[Tensor, "n c h w"],
    acted: Mapping[str, Float[Tensor, "n c h w"]],
    path: Path,
    examples: int = 6,
    gap_db: Mapping[str, float] | None = None,
) -> None:
    """Draw one row per example: the original, then decodes of act(g, latent) for every g.

    The n examples are cut into equal runs, and each row shows the least symmetric example of its
    run: on a symmetric drawing the elements could not be told apart. Below each column are the
    largest difference, over all n examples, in grey levels of 255, to g applied to the decode at
    the identity, and the gap of the element, if given.
    """
    elements = [element for element in D4 if element.name in acted]
    square = original.shape[-2] == original.shape[-1]
    changes = [
        (element.act_on_image(original) - original).square().mean((1, 2, 3))
        for element in elements
        if element != D4.identity and (square or not element.swaps_sides)
    ]
    smallest = torch.stack(changes).amin(0) if changes else original.new_zeros(len(original))
    change = smallest / (original.flatten(1).var(1) + 1e-3)
    runs = torch.arange(len(original)).tensor_split(min(examples, len(original)))
    chosen = [int(run[change[run].argmax()]) for run in runs]
    tile = _tile(max(original.shape[-2:]), 160)
    step, header, gutter = tile + 10, 150, 30
    lines = 66 if gap_db is None else 104
    figure = _canvas((1 + len(elements)) * step + gutter, header + len(chosen) * step + lines)
    _write(figure, tile / 2, header - 44, "original", size=18, bold=True)
    for row, i in enumerate(chosen):
        _place(figure, _pixels(original[i]), 0, header + row * step, tile)
    foot = header + len(chosen) * step + 12
    _write(figure, tile / 2, foot + 12, "largest difference", size=17, colour=GREY)
    _write(figure, tile / 2, foot + 36, "to g · decode(z)", size=17, colour=GREY)
    if gap_db is not None:
        _write(figure, tile / 2, foot + 72, "PSNR lost to g", size=17, colour=GREY)
    for column, element in enumerate(elements):
        x = (1 + column) * step + gutter
        letter = np.ascontiguousarray(np.rot90(_letter(element.mirrored), element.quarter_turns))
        _place(figure, letter, x + (tile - 70) / 2, 0, 70)
        _write(figure, x + tile / 2, header - 58, element.name, size=18, bold=True)
        _write(figure, x + tile / 2, header - 28, ELEMENT_WORDS[element.name], size=17)
        for row, i in enumerate(chosen):
            _place(figure, _pixels(acted[element.name][i]), x, header + row * step, tile)
        expected = element.act_on_image(acted["identity"])
        levels = float((acted[element.name] - expected).abs().max()) * 127.5
        _write(
            figure, x + tile / 2, foot + 12, f"{levels:.4f}" if levels < 0.1 else f"{levels:.1f}"
        )
        _write(figure, x + tile / 2, foot + 36, "of 255 levels", size=17, colour=GREY)
        if gap_db is not None:
            gap = gap_db[element.name]
            text = f"{gap:.1f} dB" if abs(gap) >= 0.05 else f"{abs(gap):.4f} dB"
            _write(figure, x + tile / 2, foot + 72, text, bold=abs(gap) >= 0.05)
    save(figure, path)


def _canvas(width: int, height: int) -> Any:
    """Create a bare figure of width x height pixels; coordinates start at its top left."""
    return Figure((width / 100, height / 100), dpi=100)


def _place(figure: Any, image: np.ndarray, x: float, y: float, side: int) -> None:
    width, height = figure.get_size_inches() * 100
    axes = figure.add_axes((x / width, 1 - (y + side) / height, side / width, side / height))
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="#d8dde3", linewidth=0.8)


def _write(
    figure: Any,
    x: float,
    y: float,
    text: str,
    *,
    size: int = 20,
    colour: str = "black",
    bold: bool = False,
    align: Literal["left", "center"] = "center",
) -> None:
    """Write text, `size` pixels high, vertically centred at y."""
    width, height = figure.get_size_inches() * 100
    weight = "bold" if bold else "normal"
    label = figure.text(x / width, 1 - y / height, text, ha=align, va="center", color=colour)
    label.set(fontsize=0.72 * size, fontweight=weight)


def _tile(resolution: int, at_least: int) -> int:
    """Return the smallest multiple of the resolution that is at least `at_least` pixels."""
    return resolution * -(-at_least // resolution)


def _pixels(image: Tensor) -> np.ndarray:
    """Convert (c, h, w) in [-1, 1] to uint8 (h, w, 3), or (h, w) for grey."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _letter(mirrored: int) -> np.ndarray:
    letter = np.where(_LETTER, 70, 235).astype(np.uint8)
    return np.fliplr(letter) if mirrored else letter


def save(figure: Any, path: Path) -> None:
    """Save a figure on white; equal data give equal bytes."""
    # By default, the metadata contain the version of matplotlib.
    figure.savefig(path, facecolor="white", metadata={"Software": None})
