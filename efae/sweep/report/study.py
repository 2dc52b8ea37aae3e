"""Optuna's view of a sweep's finished trials: Pareto fronts, and importances."""

# pyright: reportMissingTypeStubs=false
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection

from efae.sweep.report.trials import Trial

FEWEST_TRIALS = 4
"""Finished trials that importances need."""
_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}


def find_front(trials: Sequence[Trial], objectives: Sequence[Mapping[str, str]]) -> list[Trial]:
    """Return the Pareto front of the finished trials.

    Args:
        trials: Trials in any state.
        objectives: Metric and mode ("max" or "min") of each objective.
    """
    # Optuna refuses nan.
    points = [
        (t, [np.nan if (v := t.measure(o["metric"])) is None else v for o in objectives])
        for t in trials
        if t.finished
    ]
    found = [(trial, values) for trial, values in points if not np.isnan(values).any()]
    study = optuna.create_study(
        directions=[_DIRECTIONS[objective["mode"]] for objective in objectives]
    )
    study.add_trials([optuna.create_trial(values=values) for _, values in found])
    return [found[best.number][0] for best in study.best_trials]


def rate_hyperparameters(
    trials: Sequence[Trial], metric: str, names: Sequence[str]
) -> dict[str, float]:
    """Return the importance (fANOVA) of each hyperparameter, largest first.

    Empty if there are fewer than `FEWEST_TRIALS` finished trials, fewer than two hyperparameters
    that differ between them, or nothing to explain.

    Args:
        trials: Trials in any state; only finished ones count.
        metric: Metric to explain.
        names: Dotted names of the hyperparameters.
    """
    found = [t for t in trials if t.finished and t.measure(metric) is not None]
    values = np.array([t.measure(metric) for t in found], dtype=float)
    columns = {name: [t.hyperparameter(name) for t in found] for name in names}
    distributions = {
        name: _distribution(column)
        for name, column in columns.items()
        if len(set(map(str, column))) > 1
    }
    if len(found) < FEWEST_TRIALS or len(distributions) < 2 or not np.ptp(values):
        return {}
    study = optuna.create_study(directions=[StudyDirection.MINIMIZE])
    for i, value in enumerate(values.tolist()):
        params = {
            name: float(columns[name][i])
            if isinstance(kind, FloatDistribution)
            else str(columns[name][i])
            for name, kind in distributions.items()
        }
        study.add_trial(
            optuna.create_trial(params=params, distributions=distributions, value=value)
        )
    evaluator = FanovaImportanceEvaluator(n_trees=24, seed=0)
    try:
        return get_param_importances(study, evaluator=evaluator)
    except RuntimeError:  # no tree of the forest finds a split
        return {}


def _distribution(values: Sequence[Any]) -> Any:
    """Return an ordered distribution for numbers, a categorical one for anything else."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return FloatDistribution(float(min(values)), float(max(values)))
    return CategoricalDistribution(sorted({str(value) for value in values}))
