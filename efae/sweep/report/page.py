"""Sweep report: which representation a latent should carry, as one self-contained page.

It is a pure function of sweep.json, so that it can be written again from that file.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efae.config.forms import write_option
from efae.report.html import finite, plain, render_page, write_json, write_split
from efae.sweep.report.charts import draw_curves, draw_importance, draw_pareto, draw_surface
from efae.sweep.report.study import FEWEST_TRIALS, rate_hyperparameters
from efae.sweep.report.surface import (
    FEWEST_FINISHED,
    FEWEST_POSITIONS,
    End,
    Surface,
    find_ends,
    find_optimum,
    fit_surface,
)
from efae.sweep.report.trials import (
    MULTIPLICITIES,
    ROTATION,
    SPLIT,
    Trial,
    choose_pairs,
    describe,
    read_trials,
)
from efae.sweep.space import list_overrides

FIGURES = ("surface.png", "pareto.png", "importance.png", "curves.png")
_STATE_ORDER = ("finished", "stopped", "running", "failed")
_METRICS = ("psnr", "held_out_loss", "worst_gap_db", "latent_size")


def write_sweep_report(folder: Path, sweep: Mapping[str, Any]) -> None:
    """Write report.html, sweep.json and those of `FIGURES` that have data.

    Args:
        folder: Folder, created if missing; figures of an earlier report in it are replaced.
        sweep: Facts of the sweep from `jobs/tune.py`, JSON values only: names, data, objectives
            (metric and mode), space, search, trials with their validations, best, pareto, theory,
            closed_form_split (None if not measured; not in those of release 0.1), cost. A number
            that is not finite counts as unknown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        (folder / name).unlink(missing_ok=True)
    sweep = json.loads(json.dumps(finite(sweep)))  # as it will be in sweep.json
    write_json(folder / "sweep.json", sweep)
    trials = read_trials(sweep["trials"])
    objective = sweep["objectives"][0]
    metric, mode = objective["metric"], objective["mode"]
    best = sweep["best"]
    chosen = _best_trials(trials, best, sweep["space"])
    closed_form = sweep.get("closed_form_split")
    # Splits of different numbers of channels have no common axes.
    comparable = "representation.dim" not in sweep["space"]
    theory = sweep["theory"] if comparable else None
    prediction = (theory["rotation_dims"], theory["chirality_split"]) if theory else None
    linear = _place(closed_form["multiplicities"]) if closed_form and comparable else None

    ends = find_ends(trials, metric)
    surface = fit_surface(ends, sweep["dim"]) if comparable else None
    if surface:
        draw_surface(
            trials,
            surface,
            metric,
            mode,
            folder / "surface.png",
            colours=sweep["colours"],
            best=chosen[0].position if chosen else None,
            predicted={
                name: place
                for name, place in (("theory", prediction), ("best linear map", linear))
                if place
            },
        )
    optimum = find_optimum(surface, ends, mode, sweep["colours"]) if surface else None
    pairs = choose_pairs(trials, sweep["objectives"])
    stars = [trial.key for trial in chosen]
    if pairs:
        draw_pareto(trials, pairs, stars, folder / "pareto.png")
    importances = rate_hyperparameters(trials, metric, list(sweep["space"]))
    if importances:
        draw_importance(importances, folder / "importance.png")
    # The latent's size is known before training and has no curve.
    learned = next(
        (m for m in (metric, "psnr") if any(len(trial.curve(m)) > 1 for trial in trials)), None
    )
    if learned:
        draw_curves(trials, learned, stars, sweep["rungs"], folder / "curves.png")

    counts = Counter(trial.state for trial in trials)
    render_page(
        folder,
        Path(__file__).with_name("sweep.html.jinja"),
        title=f"sweep {sweep['sweep_name']}",
        sweep=sweep,
        credits=sweep["credits"],
        trials=_ranked(trials, metric, mode),
        counts={state: counts[state] for state in _STATE_ORDER},
        objective=objective,
        describe=describe,
        best=best,
        best_trial=chosen[0] if chosen else None,
        best_numbers={trial.number for trial in chosen},
        about_channels=any(
            name.startswith((ROTATION, SPLIT, MULTIPLICITIES)) for name in sweep["space"]
        ),
        theory=_compare(trials, surface, sweep, prediction) if best and prediction else None,
        closed_form=closed_form,
        linear=_compare(trials, surface, sweep, linear) if best and linear else None,
        split=write_split,
        command=_command(sweep) if best else "",
        surface=surface,
        optimum=optimum,
        optimum_measured=optimum
        and any(
            trial.finished and (trial.turning, trial.chiral) == (optimum.turning, optimum.chiral)
            for trial in trials
        ),
        estimated=sum(not end.trial.finished for end in ends),
        no_surface=_why_no_surface(ends)
        if comparable
        else "the trials have different numbers of channels",
        pairs=pairs,
        front=[t for t in _ranked(trials, metric, mode) if t.key in sweep["pareto"]],
        importances=importances,
        no_importance=_why_no_importance(trials, metric, sweep["space"]),
        learned=learned,
        metrics=_shown_metrics(trials, sweep["objectives"]),
        other_hyperparameters=[k for k in sweep["space"] if k not in (ROTATION, SPLIT)],
        space={name: _write_range(choices) for name, choices in sweep["space"].items()},
        saved=_saved(sweep["cost"]),
        duration=write_duration,
    )


@dataclass(frozen=True)
class Comparison:
    """Comparison of a predicted representation with the best."""

    invariant: int
    chiral: int
    turning: int
    measured: Sequence[int]
    """Numbers of the finished trials within one plane and one sign of it; empty: by the surface."""
    value: float
    behind: float
    """Deficit to the best, in the metric's unit; negative if better."""
    error: float | None
    """Standard error of `behind`, from seeds and surface; None if unknown."""


def _place(multiplicities: Mapping[str, int]) -> tuple[int, float]:
    """Return (rotation_dims, chirality_split) of a split."""
    chiral = sum(multiplicities[irrep] for irrep in ("a2", "b1", "b2"))
    return 2 * multiplicities["e"], chiral / max(1, multiplicities["a1"] + chiral)


def _compare(
    trials: Sequence[Trial], surface: Surface | None, sweep: Any, place: tuple[float, float]
) -> Comparison | None:
    """Compare a representation with the best; None if nothing is known about it.

    Args:
        trials: Trials of the sweep.
        surface: Surface through their ends in the first objective.
        sweep: Facts of the sweep.
        place: Its (rotation_dims, chirality_split).
    """
    best, dim = sweep["best"], sweep["dim"]
    turning, split = place
    chiral = round(split * (dim - turning))
    near = [
        (trial, value)
        for trial in trials
        if trial.finished
        and trial.multiplicities
        and abs(trial.turning - turning) <= 2
        and abs(trial.chiral - chiral) <= 1
        and (value := trial.measure(best["metric"])) is not None
    ]
    mode = next((o["mode"] for o in sweep["objectives"] if o["metric"] == best["metric"]), None)
    mode = mode or ("max" if best["metric"] == "psnr" else "min")
    if best["metric"] != sweep["objectives"][0]["metric"]:
        surface = fit_surface(find_ends(trials, best["metric"]), dim)
    best_error = (best["spread"] or 0) / math.sqrt(len(best["values"]))
    if near:
        value = sum(value for _, value in near) / len(near)
        noise = best["spread"] or (surface.noise if surface else None)
        error = math.hypot(best_error, noise / math.sqrt(len(near))) if noise else None
    elif surface:
        mean, std = surface.predict(turning, split)
        value, error = float(mean), math.hypot(best_error, float(std))
    else:
        return None
    return Comparison(
        invariant=dim - round(turning) - chiral,
        chiral=chiral,
        turning=round(turning),
        measured=[trial.number for trial, _ in near],
        value=value,
        behind=(best["value"] - value) * (1 if mode == "max" else -1),
        error=error,
    )


def _best_trials(
    trials: Sequence[Trial], best: Mapping[str, Any] | None, space: Mapping[str, Any]
) -> list[Trial]:
    """Return all trials with the best one's hyperparameters, of any seed; the best one first."""
    if not best:
        return []
    hyperparameters = {name: best["config"].get(name) for name in space}
    found = [
        trial
        for trial in trials
        if trial.key == best["key"]
        or (hyperparameters and {name: trial.config.get(name) for name in space} == hyperparameters)
    ]
    return sorted(found, key=lambda trial: (not trial.finished, trial.key != best["key"]))


def _ranked(trials: Sequence[Trial], metric: str, mode: str) -> list[Trial]:
    """Sort by state, then by value, best first."""

    def rank(trial: Trial) -> tuple[int, float, int]:
        value = trial.metrics.get(metric)
        worth = math.inf if value is None else (-value if mode == "max" else value)
        return _STATE_ORDER.index(trial.state), worth, trial.number

    return sorted(trials, key=rank)


def _shown_metrics(trials: Sequence[Trial], objectives: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the measured metrics; the latent's size only if it differs between trials."""
    names = [objective["metric"] for objective in objectives]
    names += [name for name in _METRICS if name not in names]
    if len({trial.metrics.get("latent_size") for trial in trials}) < 2:
        names.remove("latent_size")
    return [name for name in names if any(name in trial.metrics for trial in trials)]


def _why_no_surface(ends: Sequence[End]) -> str:
    places = {end.position for end in ends}
    if len(places) < FEWEST_POSITIONS:
        return (
            f"the ends of {len(places)} representations are known, and it needs"
            f" {FEWEST_POSITIONS} to tell a slope from noise (stopped trials count once"
            f" {FEWEST_FINISHED} have finished)"
        )
    if len({place[0] for place in places}) < 2 or len({place[1] for place in places}) < 2:
        return "its two hyperparameters did not both vary among the trials"
    return "all trials have the same value"


def _why_no_importance(trials: Sequence[Trial], metric: str, space: Mapping[str, Any]) -> str:
    count = sum(trial.finished and metric in trial.metrics for trial in trials)
    if len(space) < 2:
        return "the sweep had only one hyperparameter"
    if count < FEWEST_TRIALS:
        return f"finished trials: {count}, and it needs {FEWEST_TRIALS}"
    return "no two hyperparameters differ among the finished trials, or their values do not"


def _command(sweep: Mapping[str, Any]) -> str:
    """Return a command that trains the best configuration for longer."""
    searched = {k: v for k, v in sweep["best"]["config"].items() if k in sweep["space"]}
    settings = {"representation.dim": sweep["dim"], **list_overrides(searched, sweep["dim"])}
    settings["training.steps"] = 10 * sweep["steps"]
    options = [write_option(key, value) for key, value in settings.items()]
    return " \\\n    ".join(["python jobs/train.py PRESET", *options])


def _write_range(choices: Mapping[str, Any]) -> str:
    if "choices" in choices:
        shown = [
            "(" + plain(choice) + ")" if isinstance(choice, list) else plain(choice)
            for choice in choices["choices"]
        ]
        return "one of " + ", ".join(shown)
    text = f"{plain(choices['low'])} to {plain(choices['high'])}"
    if choices.get("step"):
        text += f", in steps of {plain(choices['step'])}"
    return text + (", on a log scale" if choices.get("log") else "")


def _saved(cost: Mapping[str, Any]) -> float:
    """Return the share of the steps that early stopping saved."""
    return 1 - cost["steps"] / cost["full_steps"] if cost["full_steps"] else 0.0


def write_duration(seconds: float) -> str:
    """Format a duration, such as 45 s, 12.3 min or 4.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
