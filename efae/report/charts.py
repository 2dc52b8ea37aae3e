"""Charts of the report: one function each, from numbers to a PNG file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from efae.report.image_grids import GREY, save

Axes = Any
"""matplotlib's Axes; its own type leaves most arguments unknown."""
IRREP_WORDS = {
    "a1": "A1: invariant",
    "a2": "A2: sign flips under\nevery mirror",
    "b1": "B1: sign flips under\nquarter turns, diagonals",
    "b2": "B2: sign flips under\nquarter turns, flips",
    "e": "E: planes that rotate",
}
SAME_DB = 126.0
"""PSNR, dB, from which images count as equal up to rounding; it is measured up to 126.02 dB."""

BLUE, ORANGE = "#2f5d8a", "#c8642b"
_SERIES = (BLUE, ORANGE, "#5b8f5b", "#8a6fb0", "#b8963e")


def draw_gap(
    gap_db: Mapping[str, float],
    decoder_error_db: Mapping[str, float],
    noise_floor_db: float | None,
    path: Path,
) -> None:
    """Draw the gap on a log scale, and the decoder's agreement with the noise floor, by element.

    A deterministic decoder has no noise floor.
    """
    figure, (left, right) = begin_charts(9.4, 3.5, 2)
    names = list(gap_db)
    smallest = 1e-9
    sizes = [max(abs(gap_db[name]), smallest) for name in names]
    left.barh(names, sizes, color=BLUE)
    left.set_xscale("log")
    left.set_xlim(smallest, 1e2)
    left.set_xticks([10.0**k for k in range(-9, 2, 2)])
    left.axvline(1e-3, color=GREY, linestyle="--", linewidth=1)
    left.text(1.5e-3, -0.62, "0.001", color=GREY)
    for row, (name, size) in enumerate(zip(names, sizes, strict=True)):
        text = f"{gap_db[name]:+.1e}".replace("e-0", "e-") if gap_db[name] else "0"
        left.text(1.5 * size, row, text, va="center")
    name_chart(left, "|gap| to the identity's PSNR, dB")
    agreement = [decoder_error_db[name] for name in names]
    right.barh(names, agreement, color=BLUE)
    if noise_floor_db is not None:
        right.axvline(noise_floor_db, color=ORANGE, linewidth=1.5)
        beside, align = (
            (noise_floor_db + 1, "left") if noise_floor_db < 75 else (noise_floor_db - 1, "right")
        )
        right.text(beside, -0.62, f"noise floor {noise_floor_db:.1f}", color=ORANGE, ha=align)
    for row, value in enumerate(agreement):
        text = f"≥ {SAME_DB:.0f}" if value >= SAME_DB else f"{value:.1f}"
        right.text(value + 1, row, text, va="center")
    right.set_xlim(0, 150)
    right.set_yticklabels([])
    name_chart(right, "decode(act(g, z)) against g · decode(z), dB")
    for axes in (left, right):
        axes.set_ylim(len(names) - 0.5, -0.9)
        axes.tick_params(axis="y", length=0)
    save(figure, path)


def draw_gaps(models: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw gaps by element on a log scale, one bar per model."""
    names = list(next(iter(models.values())))
    figure, (axes,) = begin_charts(9.4, 0.8 + 0.16 * len(names) * (1 + len(models)), 1)
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
    axes.axvline(1e-3, color=GREY, linestyle="--", linewidth=1)
    figure.legend(loc="outside upper right", ncols=len(models), frameon=False, fontsize=9)
    name_chart(axes, "|gap| to the identity's PSNR, dB")
    save(figure, path)


def draw_rotations(models: Mapping[str, Mapping[float, Mapping[str, float]]], path: Path) -> None:
    """Draw PSNR inside the disk and encoder error against the angle, one line per model.

    Args:
        models: Result of `summarize_rotations` by model name; its keys may be strings, from JSON.
        path: Path of the PNG file.
    """
    figure, (left, right) = begin_charts(9.4, 3.4, 2)
    floors: dict[float, float] = {}
    for i, (model, rotations) in enumerate(models.items()):
        found = {float(angle): rotations[angle] for angle in rotations}
        angles, colour = sorted(found), _SERIES[i % len(_SERIES)]
        floors |= {angle: found[angle]["resampling_floor_db"] for angle in angles}
        left.plot(angles, [found[a]["psnr"] for a in angles], "o-", color=colour, label=model)
        right.plot(angles, [found[a]["encoder_error"] for a in angles], "o-", color=colour)
    # Quarter turns do not resample; their floor would compress the scale of all other values.
    resampled = sorted(angle for angle in floors if angle % 90)
    if resampled:
        values = [floors[angle] for angle in resampled]
        left.plot(resampled, values, "s--", color=GREY, label="resampling alone")
    angles = sorted(floors)
    for axes in (left, right):
        axes.set_xticks(angles, [f"{angle:g}°" for angle in angles])
        axes.set_xlabel("angle, counter-clockwise")
        axes.margins(y=0.15)
    right.set_ylim(bottom=0)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    name_chart(left, "PSNR in the disk, dB")
    name_chart(right, "encoder error")
    save(figure, path)


def draw_energy(energy: Mapping[str, float], channels: Mapping[str, int], path: Path) -> None:
    """Draw each irrep's share of the latent's energy and of its channels."""
    figure, (axes,) = begin_charts(4.7, 3.1, 1)
    rows = np.arange(len(energy))
    share = np.array([channels[irrep] for irrep in energy]) / sum(channels.values())
    axes.barh(rows - 0.19, [*energy.values()], height=0.36, color=BLUE, label="of the energy")
    axes.barh(rows + 0.19, share, height=0.36, color="#c9d3de", label="of the channels")
    for row, value in enumerate(energy.values()):
        axes.text(value + 0.01, row - 0.19, f"{value:.1%}", va="center", fontsize=9)
    axes.set_yticks(rows, [IRREP_WORDS[irrep] for irrep in energy])
    axes.set_xlim(0, 1.2 * max(*energy.values(), *share))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="best")
    name_chart(axes, "share of each irrep")
    save(figure, path)


def draw_steps(
    psnr: Mapping[int, float],
    ssim: Mapping[int, float],
    sharpness: Mapping[int, float],
    chosen: int | None,
    path: Path,
) -> None:
    """Draw PSNR, SSIM and sharpness against sampler steps; marks the model's own number."""
    figure, charts = begin_charts(9.4, 2.7, 3)
    for axes, values in zip(charts, (psnr, ssim, sharpness), strict=True):
        counts = [int(count) for count in values]
        axes.plot(counts, [*values.values()], "o-", color=BLUE)
        if chosen is not None:
            axes.axvline(chosen, color=GREY, linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("sampler steps")
        axes.margins(y=0.15)
    for axes, name in zip(charts, ("PSNR, dB", "SSIM", "sharpness"), strict=True):
        name_chart(axes, name)
    charts[-1].axhline(1, color=ORANGE, linewidth=1)
    save(figure, path)


def draw_loss_by_time(losses: Sequence[float], path: Path) -> None:
    """Draw the flow loss in equal bins of t, from image (0) to noise (1)."""
    figure, (axes,) = begin_charts(4.7, 3.1, 1)
    width = 1 / len(losses)
    axes.bar([(i + 0.5) * width for i in range(len(losses))], losses, 0.9 * width, color=BLUE)
    _use_log(axes)
    axes.set_xlim(0, 1)
    axes.set_xlabel("t: image at 0, noise at 1")
    name_chart(axes, "flow loss by t")
    save(figure, path)


def draw_curves(curves: Sequence[tuple[int, float]], path: Path) -> None:
    """Draw the training loss against steps, with its running median if there are many points."""
    figure, (axes,) = begin_charts(9.4, 2.9, 1)
    steps, losses = np.array(curves, dtype=float).T
    window = len(losses) // 20
    axes.plot(steps, losses, color=BLUE, alpha=0.35 if window > 1 else 1, linewidth=1)
    if window > 1:
        median = np.median(np.lib.stride_tricks.sliding_window_view(losses, window), axis=1)
        axes.plot(steps[window // 2 :][: len(median)], median, color=BLUE)
    _use_log(axes)
    axes.set_xlabel("step")
    name_chart(axes, "training loss")
    save(figure, path)


def begin_charts(width: float, height: float, count: int) -> tuple[Any, list[Axes]]:
    """Create a figure with a row of charts; sizes in inches."""
    figure: Any = Figure((width, height), dpi=180, layout="constrained")
    row = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, row


def name_chart(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left")


def _use_log(axes: Axes) -> None:
    """Make the y axis logarithmic, labelled with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
