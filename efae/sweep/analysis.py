"""What a sweep's trials say: a surface over the two knobs, and which knob matters.

Only finished trials are compared by value: a stopped one was measured at an earlier step, where all
trials are worse, so it would pull the surface down wherever the sweep gave up early.
"""

# pyright: reportMissingTypeStubs=false
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from efae.sweep.reported_trials import Trial

FEWEST_POSITIONS = 5
"""Different finished representations that a surface needs."""
FEWEST_TRIALS = 4
"""Finished trials that importances need."""

# Lengths in units of the whole range of either knob; variances in that of the values.
_LENGTHS, _AMPLITUDES, _NOISES = (0.2, 0.35, 0.6, 1.0, 1.7), (0.7, 2.0, 6.0), (0.003, 0.03, 0.3)


@dataclass(frozen=True)
class Surface:
    """Gaussian processes through the finished trials, each as likely as its weight.

    A single process with the likeliest scales is too sure of itself after a dozen trials, so those
    with other scales have their say.
    """

    processes: Sequence[tuple[float, Any]]
    """(weight, process); the weights add up to 1."""
    dim: int
    noise: float
    """Standard deviation between runs of one representation, by the fit, in the metric's unit."""

    def predict(self, rotation_dims: Any, chirality_split: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the surface itself, without the noise of one run.

        Args:
            rotation_dims: any shape.
            chirality_split: the same shape.
        """
        x = np.stack(
            [np.asarray(rotation_dims, float) / self.dim, np.asarray(chirality_split, float)], -1
        )
        mean = square = np.zeros(x.shape[:-1])
        for weight, process in self.processes:
            found, std = process.predict(x.reshape(-1, 2), return_std=True)
            found, std = found.reshape(mean.shape), std.reshape(mean.shape)
            mean = mean + weight * found
            square = square + weight * (found**2 + std**2)
        return mean, np.sqrt(np.maximum(square - mean**2 - self.noise**2, 0))


@dataclass(frozen=True)
class Optimum:
    """Where a surface is best."""

    invariant: int
    chiral: int
    turning: int
    value: float
    std: float


def find_optimum(surface: Surface, trials: Sequence[Trial], mode: str, colours: int) -> Optimum:
    """The representation at which the surface is best, in the range where trials finished.

    Args:
        surface: through the trials.
        trials: those of `fit_surface`.
        mode: "max" or "min".
        colours: invariant channels, at least.
    """
    places = np.array([t.position for t in trials if t.finished and t.position], dtype=float)
    (fewest, lowest), (most, highest) = places.min(0), places.max(0)
    found: list[Optimum] = []
    for turning in range(int(fewest), int(most) + 1, 2):
        others = surface.dim - turning
        chiral = np.arange(others - colours + 1)
        chiral = chiral[(chiral >= lowest * others - 0.5) & (chiral <= highest * others + 0.5)]
        if len(chiral):
            means, stds = surface.predict(np.full(len(chiral), turning), chiral / others)
            found += [
                Optimum(others - int(c), int(c), turning, float(mean), float(std))
                for c, mean, std in zip(chiral, means, stds, strict=True)
            ]
    return (max if mode == "max" else min)(found, key=lambda optimum: optimum.value)


def fit_surface(trials: Sequence[Trial], metric: str, dim: int) -> Surface | None:
    """The metric over (rotation_dims, chirality_split).

    None if fewer than `FEWEST_POSITIONS` representations finished, if one of the knobs is the same
    in all of them, or if all values are equal.

    Args:
        trials: of which the finished ones are used.
        metric: of theirs.
        dim: the latent's channels.
    """
    found = [
        (*trial.position, value)
        for trial in trials
        if trial.finished and trial.position and (value := trial.measure(metric)) is not None
    ]
    if len({point[:2] for point in found}) < FEWEST_POSITIONS:
        return None
    points = np.array(found, dtype=float)
    if not np.ptp(points, axis=0).all():
        return None
    x, y = points[:, :2] / (dim, 1), points[:, 2]
    fitted: list[Any] = []
    as_given: dict[str, Any] = {"optimizer": None, "normalize_y": True}
    for amplitude, length, other_length, noise in product(_AMPLITUDES, _LENGTHS, _LENGTHS, _NOISES):
        lengths: Any = (length, other_length)
        kernel = ConstantKernel(amplitude) * RBF(lengths) + WhiteKernel(noise)
        process: Any = GaussianProcessRegressor(kernel, **as_given)
        fitted.append(process.fit(x, y))
    likelihood = np.array([process.log_marginal_likelihood_value_ for process in fitted])
    weights = np.exp(likelihood - likelihood.max())
    weights[weights < 1e-3] = 0
    weights /= weights.sum()
    variances = np.array([process.kernel_.k2.noise_level for process in fitted])
    return Surface(
        [
            (float(weight), process)
            for weight, process in zip(weights, fitted, strict=True)
            if weight
        ],
        dim,
        noise=float(np.sqrt(weights @ variances) * y.std()),
    )


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
