"""The report's pictures, each one function from data to a PNG file.

Images are drawn at a whole number of pixels per pixel, so small ones stay crisp. Figures are
matplotlib's objects, never pyplot's: nothing global is opened, changed or left behind.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from torch import Tensor

from efae.symmetry import D4

Axes = Any
"""matplotlib's; its own types leave most arguments unknown."""
IRREP_WORDS = {
    "a1": "A1: invariant",
    "a2": "A2: sign flips under\nevery mirror",
    "b1": "B1: sign flips under\nquarter turns, diagonals",
    "b2": "B2: sign flips under\nquarter turns, flips",
    "e": "E: planes that rotate",
}
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
SAME_DB = 126.0
"""PSNR is measured up to 126.02 dB (mean squared error 1e-12): equal but for rounding."""
ERROR_LEVELS = 64
"""Error maps saturate at this many of 255 grey levels."""

_BLUE, _ORANGE, _GREY = "#2f5d8a", "#c8642b", "#6b7280"
_SERIES = (_BLUE, _ORANGE, "#5b8f5b", "#8a6fb0", "#b8963e")
_LETTER = np.pad(
    [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]], ((1, 1), (2, 1))
)
"""The letter F, in a square of 7."""


def draw_reconstructions(
    original: Float[Tensor, "n c h w"], reconstruction: Float[Tensor, "n c h w"], path: Path
) -> None:
    """Originals, reconstructions, error maps and PSNR of up to 16 examples, evenly chosen."""
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
    _save(figure, path)


def draw_orbit(
    original: Float[Tensor, "n c h w"],
    acted: Mapping[str, Float[Tensor, "n c h w"]],
    path: Path,
    examples: int = 6,
    gap_db: Mapping[str, float] | None = None,
) -> None:
    """One row an example: the original, then decodes of act(g, latent) for every g.

    Of the n examples cut into equal runs, each row is the one of its run that looks least like any
    of its images under the group: on a symmetric drawing there would be nothing to see. Under each
    column stands the largest difference of any of the n examples, in grey levels of 255, to g
    applied to the decode at the identity, and the gap of the element, where it is given.
    """
    elements = [element for element in D4 if element.name in acted]
    changes = [
        (element.act_on_image(original) - original).square().mean((1, 2, 3))
        for element in elements
        if element != D4.identity
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
    _write(figure, tile / 2, foot + 12, "largest difference", size=17, colour=_GREY)
    _write(figure, tile / 2, foot + 36, "to g · decode(z)", size=17, colour=_GREY)
    if gap_db is not None:
        _write(figure, tile / 2, foot + 72, "PSNR lost to g", size=17, colour=_GREY)
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
        _write(figure, x + tile / 2, foot + 36, "of 255 levels", size=17, colour=_GREY)
        if gap_db is not None:
            gap = gap_db[element.name]
            text = f"{gap:.1f} dB" if abs(gap) >= 0.05 else f"{abs(gap):.4f} dB"
            _write(figure, x + tile / 2, foot + 72, text, bold=abs(gap) >= 0.05)
    _save(figure, path)


def draw_gap(
    gap_db: Mapping[str, float],
    decoder_error_db: Mapping[str, float],
    noise_floor_db: float | None,
    path: Path,
) -> None:
    """By element: the gap on a log scale, and the decoder's agreement beside the noise floor.

    A deterministic decoder has no noise floor.
    """
    figure, (left, right) = _charts(9.4, 3.5, 2)
    names = list(gap_db)
    smallest = 1e-9
    sizes = [max(abs(gap_db[name]), smallest) for name in names]
    left.barh(names, sizes, color=_BLUE)
    left.set_xscale("log")
    left.set_xlim(smallest, 1e2)
    left.set_xticks([10.0**k for k in range(-9, 2, 2)])
    left.axvline(1e-3, color=_GREY, linestyle="--", linewidth=1)
    left.text(1.5e-3, -0.62, "0.001", color=_GREY)
    for row, (name, size) in enumerate(zip(names, sizes, strict=True)):
        text = f"{gap_db[name]:+.1e}".replace("e-0", "e-") if gap_db[name] else "0"
        left.text(1.5 * size, row, text, va="center")
    _name(left, "|gap| to the identity's PSNR, dB")
    agreement = [decoder_error_db[name] for name in names]
    right.barh(names, agreement, color=_BLUE)
    if noise_floor_db is not None:
        right.axvline(noise_floor_db, color=_ORANGE, linewidth=1.5)
        beside, align = (
            (noise_floor_db + 1, "left") if noise_floor_db < 75 else (noise_floor_db - 1, "right")
        )
        right.text(beside, -0.62, f"noise floor {noise_floor_db:.1f}", color=_ORANGE, ha=align)
    for row, value in enumerate(agreement):
        text = f"≥ {SAME_DB:.0f}" if value >= SAME_DB else f"{value:.1f}"
        right.text(value + 1, row, text, va="center")
    right.set_xlim(0, 150)
    right.set_yticklabels([])
    _name(right, "decode(act(g, z)) against g · decode(z), dB")
    for axes in (left, right):
        axes.set_ylim(len(names) - 0.5, -0.9)
        axes.tick_params(axis="y", length=0)
    _save(figure, path)


def draw_gaps(models: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Gaps by element on a log scale, one bar for each model."""
    names = list(next(iter(models.values())))
    figure, (axes,) = _charts(9.4, 0.8 + 0.16 * len(names) * (1 + len(models)), 1)
    smallest, height = 1e-9, 0.8 / len(models)
    for i, (model, gap_db) in enumerate(models.items()):
        rows = [row + (i - (len(models) - 1) / 2) * height for row in range(len(names))]
        sizes = [max(abs(gap_db[name]), smallest) for name in names]
        axes.barh(rows, sizes, 0.9 * height, color=_SERIES[i % len(_SERIES)], label=model)
        for row, name, size in zip(rows, names, sizes, strict=True):
            axes.text(1.3 * size, row, f"{gap_db[name]:.2g}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(smallest, 1e2)
    axes.set_xticks([10.0**k for k in range(-9, 2, 2)])
    axes.axvline(1e-3, color=_GREY, linestyle="--", linewidth=1)
    figure.legend(loc="outside upper right", ncols=len(models), frameon=False, fontsize=9)
    _name(axes, "|gap| to the identity's PSNR, dB")
    _save(figure, path)


def draw_energy(energy: Mapping[str, float], channels: Mapping[str, int], path: Path) -> None:
    """Share of the latent's energy by irrep, beside its share of the channels."""
    figure, (axes,) = _charts(4.7, 3.1, 1)
    rows = np.arange(len(energy))
    share = np.array([channels[irrep] for irrep in energy]) / sum(channels.values())
    axes.barh(rows - 0.19, [*energy.values()], height=0.36, color=_BLUE, label="of the energy")
    axes.barh(rows + 0.19, share, height=0.36, color="#c9d3de", label="of the channels")
    for row, value in enumerate(energy.values()):
        axes.text(value + 0.01, row - 0.19, f"{value:.1%}", va="center", fontsize=9)
    axes.set_yticks(rows, [IRREP_WORDS[irrep] for irrep in energy])
    axes.set_xlim(0, 1.2 * max(*energy.values(), *share))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="best")
    _name(axes, "share of each irrep")
    _save(figure, path)


def draw_steps(
    psnr: Mapping[int, float],
    ssim: Mapping[int, float],
    sharpness: Mapping[int, float],
    chosen: int | None,
    path: Path,
) -> None:
    """PSNR, SSIM and sharpness against sampler steps; the model's own number is marked."""
    figure, charts = _charts(9.4, 2.7, 3)
    for axes, values in zip(charts, (psnr, ssim, sharpness), strict=True):
        counts = [int(count) for count in values]
        axes.plot(counts, [*values.values()], "o-", color=_BLUE)
        if chosen is not None:
            axes.axvline(chosen, color=_GREY, linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("sampler steps")
        axes.margins(y=0.15)
    for axes, name in zip(charts, ("PSNR, dB", "SSIM", "sharpness"), strict=True):
        _name(axes, name)
    charts[-1].axhline(1, color=_ORANGE, linewidth=1)
    _save(figure, path)


def draw_loss_by_time(losses: Sequence[float], path: Path) -> None:
    """Flow loss in equal bins of t, from image (0) to noise (1)."""
    figure, (axes,) = _charts(4.7, 3.1, 1)
    width = 1 / len(losses)
    axes.bar([(i + 0.5) * width for i in range(len(losses))], losses, 0.9 * width, color=_BLUE)
    _use_log(axes)
    axes.set_xlim(0, 1)
    axes.set_xlabel("t: image at 0, noise at 1")
    _name(axes, "flow loss by t")
    _save(figure, path)


def draw_curves(curves: Sequence[tuple[int, float]], path: Path) -> None:
    """Training loss against steps, with its running median where there are many points."""
    figure, (axes,) = _charts(9.4, 2.9, 1)
    steps, losses = np.array(curves, dtype=float).T
    window = len(losses) // 20
    axes.plot(steps, losses, color=_BLUE, alpha=0.35 if window > 1 else 1, linewidth=1)
    if window > 1:
        median = np.median(np.lib.stride_tricks.sliding_window_view(losses, window), axis=1)
        axes.plot(steps[window // 2 :][: len(median)], median, color=_BLUE)
    _use_log(axes)
    axes.set_xlabel("step")
    _name(axes, "training loss")
    _save(figure, path)


def _charts(width: float, height: float, count: int) -> tuple[Any, list[Axes]]:
    """A row of charts; sizes in inches."""
    figure: Any = Figure((width, height), dpi=180, layout="constrained")
    row = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, row


def _name(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left")


def _use_log(axes: Axes) -> None:
    """A log scale upwards, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _canvas(width: int, height: int) -> Any:
    """A bare figure of width x height pixels; `_place` and `_write` count from its top left."""
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
    """Text, `size` pixels high, in the middle of height y."""
    width, height = figure.get_size_inches() * 100
    weight = "bold" if bold else "normal"
    label = figure.text(x / width, 1 - y / height, text, ha=align, va="center", color=colour)
    label.set(fontsize=0.72 * size, fontweight=weight)


def _tile(resolution: int, at_least: int) -> int:
    """A side in pixels that is a multiple of the resolution."""
    return resolution * -(-at_least // resolution)


def _pixels(image: Tensor) -> np.ndarray:
    """(c, h, w) in [-1, 1] to uint8 (h, w, 3), or (h, w) for grey."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _letter(mirrored: int) -> np.ndarray:
    letter = np.where(_LETTER, 70, 235).astype(np.uint8)
    return np.fliplr(letter) if mirrored else letter


def _save(figure: Any, path: Path) -> None:
    # Without the version of matplotlib in it, the same data give the same bytes.
    figure.savefig(path, facecolor="white", metadata={"Software": None})
