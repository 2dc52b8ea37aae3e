"""Which knob of a sweep matters: importances over its finished trials."""

# pyright: reportMissingTypeStubs=false
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from efae.sweep.reported_trials import Trial

FEWEST_TRIALS = 4
"""Finished trials that importances need."""


@dataclass(frozen=True)
class Importance:
    """Share of what the knobs, one at a time, explain."""

    share: float
    low: float
    high: float
    """The middle 80 % when the trials are drawn again with replacement."""


def rate_knobs(
    trials: Sequence[Trial], metric: str, knobs: Sequence[str], resamples: int = 12
) -> dict[str, Importance]:
    """Importances (fANOVA) of the knobs by name, largest first.

    Empty if there are fewer than `FEWEST_TRIALS` finished trials, fewer than two knobs that differ
    between them, or nothing to explain.

    Args:
        trials: of which the finished ones are used.
        metric: of theirs.
        knobs: dotted names.
        resamples: draws for the range.
    """
    found = [t for t in trials if t.finished and t.measure(metric) is not None]
    values = np.array([t.measure(metric) for t in found], dtype=float)
    rows = [{knob: t.knob(knob) for knob in knobs} for t in found]
    varied = [knob for knob in knobs if len({str(row[knob]) for row in rows}) > 1]
    if len(found) < FEWEST_TRIALS or len(varied) < 2 or not np.ptp(values):
        return {}
    distributions = {knob: _distribution([row[knob] for row in rows]) for knob in varied}
    params = [
        {
            knob: float(row[knob]) if isinstance(kind, FloatDistribution) else str(row[knob])
            for knob, kind in distributions.items()
        }
        for row in rows
    ]
    generator = np.random.default_rng(0)
    draws = [np.arange(len(found))]
    draws += [generator.integers(0, len(found), len(found)) for _ in range(resamples)]
    rated = [_fanova([params[i] for i in draw], values[draw], distributions) for draw in draws]
    if not rated[0]:
        return {}
    shares = [share for share in rated if share]
    ranges = {
        knob: np.quantile([share[knob] for share in shares], (0.1, 0.9)).tolist() for knob in varied
    }
    return {knob: Importance(share, *ranges[knob]) for knob, share in shares[0].items()}


def _distribution(values: Sequence[Any]) -> Any:
    """Numbers keep their order; anything else is a choice."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return FloatDistribution(float(min(values)), float(max(values)))
    return CategoricalDistribution(sorted({str(value) for value in values}))


def _fanova(
    params: Sequence[dict[str, Any]], values: np.ndarray, distributions: dict[str, Any]
) -> dict[str, float]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
    finally:
        optuna.logging.set_verbosity(verbosity)
    study.add_trials(
        [
            optuna.create_trial(params=chosen, distributions=distributions, value=float(value))
            for chosen, value in zip(params, values, strict=True)
        ]
    )
    evaluator = FanovaImportanceEvaluator(n_trees=24, seed=0)
    try:
        shares = get_param_importances(study, evaluator=evaluator)
    except RuntimeError:  # no tree of the forest finds anything to split
        return {}
    return {knob: float(share) for knob, share in shares.items()}
