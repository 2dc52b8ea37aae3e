"""Ranking of trials, and the results of a sweep as plain values."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from efae.config import Config
from efae.experiment.facts import describe_data
from efae.model.representation import build_representation
from efae.preflight.driver_checks import RunData
from efae.sweep.config import OBJECTIVES, SweepConfig
from efae.sweep.phase import REDUCTION, find_first_rung
from efae.sweep.records import Records, TrialRecord
from efae.sweep.report.study import find_front
from efae.sweep.report.trials import read_trials
from efae.sweep.space import Chooser, apply_combination
from efae.symmetry.representation import split_pixels


def rank(found: Sequence[TrialRecord], settings: SweepConfig) -> list[TrialRecord]:
    """Return the finished trials, best in the first objective first."""
    first = settings.objectives[0]
    sign = -1 if OBJECTIVES[first] == "max" else 1
    return sorted(
        (r for r in found if r.state == "finished"),
        key=lambda r: (sign * r.metrics[first], r.number),
    )


def choose_finalists(records: Records, settings: SweepConfig, seed: int) -> list[TrialRecord]:
    """Return the unfinished repetitions of the best trials with other seeds; record new ones."""
    planned = {(json.dumps(r.combination), r.seed) for r in records.in_phase("finalist")}
    for record in rank(records.in_phase("search"), settings)[: settings.finalists]:
        for other in range(seed + 1, seed + 1 + settings.finalist_seeds):
            if (json.dumps(record.combination), other) not in planned:
                records.add("finalist", record.combination, other, record.latent_size)
    return [r for r in records.in_phase("finalist") if r.state == "running"]


def find_best(records: Records, settings: SweepConfig) -> dict[str, Any] | None:
    """Return the best combination by its mean over seeds, of those with most seeds; or None."""
    first = settings.objectives[0]
    groups: dict[str, list[TrialRecord]] = {}
    for record in records.trials.values():
        if record.state == "finished":
            groups.setdefault(json.dumps(record.combination), []).append(record)
    if not groups:
        return None
    most = max(map(len, groups.values()))
    sign = 1 if OBJECTIVES[first] == "max" else -1
    mean, group = max(
        (
            (sign * statistics.fmean(r.metrics[first] for r in group), group)
            for group in groups.values()
            if len(group) == most
        ),
        key=lambda entry: entry[0],
    )
    values = [r.metrics[first] for r in group]
    return {
        "key": group[0].key,
        "number": rank(group, settings)[0].number,
        "config": group[0].combination,
        "metric": first,
        "value": sign * mean,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": [r.seed for r in group],
        "values": values,
    }


def describe_trials(config: Config, records: Records) -> list[dict[str, Any]]:
    """Return the facts of each trial, by number."""
    return [
        asdict(record)
        | {
            "key": record.key,
            "config": record.combination,
            "metrics": record.metrics,
            "steps": record.steps,
            "multiplicities": build_representation(
                apply_combination(config, record.combination)
            ).multiplicities,
        }
        for _, record in sorted(records.trials.items())
    ]


def describe_sweep(
    config: Config,
    settings: SweepConfig,
    chooser: Chooser,
    records: Records,
    data: RunData,
) -> dict[str, Any]:
    """Return the search and the facts of each trial, for sweep.json and the report."""
    steps = config.training.steps
    rungs = [find_first_rung(config, settings)] if settings.early_stopping else []
    while rungs and rungs[-1] * REDUCTION < steps:
        rungs.append(rungs[-1] * REDUCTION)
    trials = describe_trials(config, records)
    objectives = [{"metric": n, "mode": OBJECTIVES[n]} for n in settings.objectives]
    searched = [trial for trial in read_trials(trials) if trial.phase == "search"]
    return {
        "experiment": config.tracking.experiment,
        "level": config.model.level,
        "dim": config.representation.dim,
        "colours": config.data.channels,
        "downsampling": config.model.downsampling,
        **describe_data(data),
        "objectives": objectives,
        "space": chooser.space.describe(),
        "search": settings.search,
        "seed": settings.seed,
        "steps": steps,
        "rungs": rungs,
        "reduction_factor": REDUCTION if rungs else None,
        "trials": trials,
        "infeasible": len(chooser.refused),
        "pareto": [trial.key for trial in find_front(searched, objectives)],
        "theory": predict(config),
    }


def describe_cost(config: Config, records: Records) -> dict[str, float]:
    """Return the seconds and steps of all trials, and their steps without early stopping."""
    found = records.trials.values()
    return {
        "trial_seconds": sum(record.seconds for record in found),
        "steps": sum(record.steps for record in found),
        "full_steps": config.training.steps * len(found),
    }


def predict(config: Config) -> dict[str, float] | None:
    """Return the split of D4's action on the pixels of a latent cell; None for other groups."""
    if config.representation.group != "D4":
        return None
    turning, chiral = split_pixels(config.model.downsampling)
    return {
        "rotation_dims": config.representation.dim * turning,
        "chirality_split": chiral / (1 - turning),
    }
