"""Charts of the sweep report, each a function from trials to a PNG file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from efae.report.charts import BLUE, ORANGE, begin_charts, name_chart
from efae.report.image_grids import GREY, save
from efae.sweep.report.study import find_front
from efae.sweep.report.surface import Surface
from efae.sweep.report.trials import Trial, describe

Axes = Any
_PALE, _PLAIN = "#b9c2cc", "#7d8894"
# Without the darkest shades, on which black marks are invisible.
_PALETTE = LinearSegmentedColormap.from_list("value", colormaps["YlGnBu"](np.linspace(0, 0.72, 64)))
_UNSURE = LinearSegmentedColormap.from_list("unsure", colormaps["Oranges"](np.linspace(0, 0.6, 64)))


def draw_surface(
    trials: Sequence[Trial],
    surface: Surface,
    metric: str,
    mode: str,
    path: Path,
    *,
    colours: int,
    best: tuple[float, float] | None,
    predicted: Mapping[str, tuple[float, float]],
) -> None:
    """Draw the fitted metric over two hyperparameters, and the fit's standard deviation beside it.

    Args:
        trials: Trials; all with a position are drawn, by state.
        surface: Surface through their ends.
        metric: Metric of the surface.
        mode: Direction, "max" or "min"; dark is good.
        path: Path of the PNG file.
        colours: Channels of an image; fewer invariant channels are infeasible.
        best: Position (rotation_dims, chirality_split) to star.
        predicted: Positions of predictions, by their names in `_PREDICTIONS`.
    """
    placed = [(trial, trial.position) for trial in trials if trial.position]
    marks = [*(position for _, position in placed), *predicted.values()]
    marks += [best] if best else []
    x, y = _range([p[0] for p in marks], surface.dim), _range([p[1] for p in marks], 1)
    grid_x, grid_y = np.meshgrid(np.linspace(*x, 81), np.linspace(*y, 81))
    mean, std = surface.predict(grid_x, grid_y)
    others = surface.dim - grid_x
    feasible = others * (1 - grid_y) > colours - 0.5
    values = [
        v for trial, _ in placed if trial.finished and (v := trial.measure(metric)) is not None
    ]
    shown = [*values, mean[feasible].min(), mean[feasible].max()]
    levels = MaxNLocator(12).tick_values(min(shown), max(shown))
    norm = Normalize(levels[0], levels[-1])
    figure, (left, right) = begin_charts(9.4, 4.3, 2)
    palette = _PALETTE if mode == "max" else _PALETTE.reversed()
    fitted = left.contourf(
        grid_x, grid_y, mean, levels=levels, cmap=palette, norm=norm, extend="both"
    )
    unsure = right.contourf(grid_x, grid_y, std, levels=7, cmap=_UNSURE, vmin=0)
    for axes, drawn in ((left, fitted), (right, unsure)):
        figure.colorbar(drawn, ax=axes, pad=0.02, format="%.4g").ax.tick_params(labelsize=8)
    for axes in (left, right):
        _hatch_infeasible(axes, x, colours, surface.dim)
        _place_trials(axes, placed, metric, norm, palette if axes is left else None)
        for name, place in predicted.items():
            axes.plot(*place, _PREDICTIONS[name], ms=13, mfc="none", mec="black", mew=1.6, zorder=5)
        if best:
            axes.plot(*best, "*", ms=17, mfc=ORANGE, mec="white", mew=1, zorder=6)
        axes.set(xlim=x, ylim=y)
        axes.set_xlabel("rotation_dims: channels that turn in planes")
    left.set_ylabel("chirality_split: share of the others\nthat change sign")
    name_chart(left, f"{describe(metric).label}, fitted")
    name_chart(right, "standard deviation of the fit")
    _add_legend(figure, placed, best, predicted)
    save(figure, path)


def draw_pareto(
    trials: Sequence[Trial],
    pairs: Sequence[tuple[Mapping[str, str], Mapping[str, str]]],
    best: Sequence[str],
    path: Path,
) -> None:
    """Draw the finished trials over pairs of metrics, with the front and its trials' numbers.

    Args:
        trials: Trials; the finished ones are drawn.
        pairs: Pairs of objectives (metric and mode); the first of a pair is the vertical axis.
        best: Keys of the trials to star.
        path: Path of the PNG file.
    """
    figure, charts = begin_charts(9.4, 3.6 if len(pairs) < 3 else 3.2, len(pairs))
    for axes, (up, along) in zip(charts, pairs, strict=True):
        found = {
            trial.number: (a, b)
            for trial in trials
            if trial.finished
            and (a := trial.measure(along["metric"])) is not None
            and (b := trial.measure(up["metric"])) is not None
        }
        front = [trial.number for trial in find_front(trials, (along, up))]
        front.sort(key=lambda number: found[number])
        axes.plot(*zip(*found.values(), strict=True), "o", color=_PALE, mec="white", ms=8)
        edge = [found[number] for number in front]
        axes.step(
            *zip(*edge, strict=True),
            where="post" if along["mode"] == "min" else "pre",
            color=BLUE,
            linewidth=1,
        )
        axes.plot(*zip(*edge, strict=True), "o", color=BLUE, mec="white", ms=8)
        for trial in trials:
            if trial.key in best and trial.number in found:
                axes.plot(*found[trial.number], "*", color=ORANGE, mec="white", ms=17, zorder=4)
        _number(axes, list(zip(front, edge, strict=True)))
        axes.margins(0.13)
        axes.set_xlabel(f"{describe(along['metric']).label} {_BETTER[along['mode']]}")
        name_chart(axes, f"{describe(up['metric']).label} {_BETTER[up['mode']]}")
    save(figure, path)


def draw_importance(importances: Mapping[str, float], path: Path) -> None:
    """Draw one bar per hyperparameter."""
    count = len(importances)
    figure, (axes,) = begin_charts(9.4, 0.7 + 0.32 * count, 1)
    rows = range(count)
    bars = axes.barh(rows, list(importances.values()), height=0.55, color=BLUE)
    axes.bar_label(bars, [f"{share:.0%}" for share in importances.values()], padding=4, fontsize=9)
    axes.set_yticks(rows, list(importances))
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.invert_yaxis()
    name_chart(axes, "share of what the hyperparameters explain")
    save(figure, path)


def draw_curves(
    trials: Sequence[Trial], metric: str, best: Sequence[str], rungs: Sequence[int], path: Path
) -> None:
    """Draw the metric of each trial over steps, with a mark where one ended early.

    Args:
        trials: Trials with validations.
        metric: Metric of the validations.
        best: Keys of the trials to highlight.
        rungs: Steps at which trials were compared, drawn dotted.
        path: Path of the PNG file.
    """
    figure, (axes,) = begin_charts(9.4, 3.6, 1)
    for rung in rungs:
        axes.axvline(rung, color=GREY, linestyle=":", linewidth=1, zorder=0)
    kinds: set[str] = set()
    for trial in sorted(trials, key=lambda trial: (trial.key in best, trial.finished)):
        points = trial.curve(metric)
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        kind = "best" if trial.key in best else trial.state
        colour = {"best": ORANGE, "finished": BLUE}.get(kind) or _ENDS[kind]["color"]
        wide = kind == "best"
        axes.plot(
            steps, values, color=colour, linewidth=2.4 if wide else 1.1, alpha=1 if wide else 0.75
        )
        if kind in _ENDS:
            axes.plot(steps[-1], values[-1], **_ENDS[kind])
        elif len(points) == 1:
            axes.plot(steps, values, "o", color=colour, ms=4)
        kinds.add(kind)
    shown = [kind for kind in ("best", *_STATES) if kind in kinds]
    styles = {"best": {"color": ORANGE, "linewidth": 2.4}, "finished": {"color": BLUE}, **_ENDS}
    figure.legend(
        handles=[_entry({"best": "the best", **_STATES}[kind], **styles[kind]) for kind in shown],
        loc="outside upper right",
        ncols=5,
        frameon=False,
        fontsize=9,
    )
    axes.set_xlabel("step" + (" (dotted: where trials were compared)" if rungs else ""))
    axes.set_xlim(left=0)
    name_chart(axes, describe(metric).label)
    save(figure, path)


_PREDICTIONS = {"theory": "D", "best linear map": "s"}
"""Markers of predicted representations."""
_BETTER = {"max": "↑", "min": "↓"}
_STATES = {
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "running": "running",
}
_ENDS: dict[str, dict[str, Any]] = {
    "stopped": {"marker": "o", "mfc": "white", "ms": 6, "color": _PLAIN},
    "failed": {"marker": "x", "ms": 7, "mew": 1.8, "color": "#a3262a"},
    "running": {"marker": ">", "ms": 6, "color": "#3a434d"},
}


def _range(values: Sequence[float], full: float) -> tuple[float, float]:
    """Return the values' range with a margin, so that no fit is shown far from the trials."""
    margin = 0.08 * max(max(values) - min(values), full / 20)
    return max(-0.03 * full, min(values) - margin), min(1.03 * full, max(values) + margin)


def _hatch_infeasible(axes: Axes, x: tuple[float, float], colours: int, dim: int) -> None:
    rotation = np.linspace(*x, 400)
    highest = 1 - (colours - 0.5) / np.maximum(dim - rotation, 1e-9)
    axes.fill_between(
        rotation, highest, 2, facecolor="white", edgecolor=_PALE, hatch="////", linewidth=0.8
    )


def _place_trials(
    axes: Axes,
    placed: Sequence[tuple[Trial, tuple[float, float]]],
    metric: str,
    norm: Normalize,
    palette: Any,
) -> None:
    """Draw the trials, finished ones last and so on top; in black without a palette."""
    for trial, position in placed:
        if trial.state in _ENDS:
            axes.plot(*position, linestyle="", **_ENDS[trial.state])
    finished: dict[tuple[float, float], list[float]] = {}
    for trial, position in placed:
        value = trial.measure(metric)
        if trial.finished and value is not None:
            finished.setdefault(position, []).append(value)
    if finished:
        means = [sum(values) / len(values) for values in finished.values()]
        axes.scatter(
            *zip(*finished, strict=True),
            s=52,
            c=means if palette else "black",
            cmap=palette,
            norm=norm if palette else None,
            edgecolors="black",
            linewidths=1,
            zorder=3,
        )


def _add_legend(
    figure: Any,
    placed: Sequence[tuple[Trial, tuple[float, float]]],
    best: tuple[float, float] | None,
    predicted: Iterable[str],
) -> None:
    states = {trial.state for trial, _ in placed}
    dot = {"marker": "o", "ms": 7, "mfc": "#7cc0c0", "mec": "black"}
    entries: list[Any] = []
    if best:
        entries.append(_entry("best", linestyle="", marker="*", ms=13, mfc=ORANGE, mec="white"))
    for name in predicted:
        marker = _PREDICTIONS[name]
        entries.append(_entry(name, linestyle="", marker=marker, ms=8, mfc="none", mec="black"))
    for state, word in _STATES.items():
        if state in states:
            entries.append(_entry(word, linestyle="", **_ENDS.get(state, dot)))
    entries.append(Patch(facecolor="white", edgecolor=_PALE, hatch="////", label="infeasible"))
    figure.legend(
        handles=entries, loc="outside upper right", ncols=len(entries), frameon=False, fontsize=9
    )


def _entry(label: str, **style: Any) -> Any:
    """Return one entry of a legend."""
    return Line2D([], [], label=label, **style)


def _number(axes: Axes, front: Sequence[tuple[int, tuple[float, float]]]) -> None:
    """Write trial numbers beside the front's points, except those that would overlap."""
    axes.figure.canvas.draw()
    taken: list[np.ndarray] = []
    for number, point in front:
        place = np.array(axes.transData.transform(point))
        if all((np.abs(place - other) > (62, 26)).any() for other in taken):
            axes.annotate(f"#{number}", point, (5, 5), textcoords="offset points", fontsize=8)
            taken.append(place)
