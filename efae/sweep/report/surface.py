"""Fit of a sweep's metric as a surface over its two hyperparameters.

A stopped trial was measured at an earlier step, where all trials are worse: its raw value would
pull the surface down wherever trials were stopped. It counts by an estimate of its end instead: its
last validation plus the average gain of the finished trials from that step on.
"""

# pyright: reportMissingTypeStubs=false
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from efae.sweep.report.trials import Trial

FEWEST_POSITIONS = 5
"""Minimum number of different representations for a surface."""
FEWEST_FINISHED = 3
"""Minimum number of finished trials for extrapolating a stopped one."""

# Gains of two trials differ by this share of the distance between their values: over 58 trials of
# the default space (`benchmarks/compare_sweeps.py`), 0.13 from the first rung, 0.05 from
# the second.
_DRIFT = 0.15
# Lengths in units of a hyperparameter's whole range; variances in units of the values' variance.
_LENGTHS, _AMPLITUDES, _NOISES = (0.2, 0.35, 0.6, 1.0, 1.7), (0.7, 2.0, 6.0), (0.003, 0.03, 0.3)


@dataclass(frozen=True)
class Surface:
    """Mixture of Gaussian processes through the trials' ends, weighted by likelihood.

    A single process with the likeliest scales is overconfident after a dozen trials, so others with
    different scales contribute.
    """

    processes: Sequence[tuple[float, Any]]
    """Pairs (weight, process); the weights add up to 1."""
    dim: int
    noise: float
    """Fitted standard deviation between runs of one representation, in the metric's unit."""

    def predict(self, rotation_dims: Any, chirality_split: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of the surface, without the noise of a single run.

        Args:
            rotation_dims: Numbers of rotating channels, of any shape.
            chirality_split: Splits, of the same shape.
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
    """Representation at which a surface is best."""

    invariant: int
    chiral: int
    turning: int
    value: float
    std: float


@dataclass(frozen=True)
class End:
    """Measured or extrapolated end of a trial with a representation."""

    trial: Trial
    position: tuple[float, float]
    value: float
    error: float
    """Standard error of the value; 0 for a finished trial."""


def find_ends(trials: Sequence[Trial], metric: str) -> list[End]:
    """Return the metric at the end of each trial with a representation, and its standard error.

    A finished trial has its measured value. A stopped one is given the average gain of the finished
    ones since its last step; its error is the spread of those gains, plus a share of its distance
    from them. Trials that failed or still run have no end; neither have stopped ones unless at
    least `FEWEST_FINISHED` finished trials were validated at that step.

    Args:
        trials: Trials of one sweep.
        metric: Metric of the trials.
    """
    measured = [(trial, value) for trial in trials if (value := trial.measure(metric)) is not None]
    placed = [(trial, trial.position, value) for trial, value in measured if trial.position]
    found = [End(trial, place, value, 0) for trial, place, value in placed if trial.finished]
    curves = [(dict(trial.curve(metric)), value) for trial, value in measured if trial.finished]
    for trial, place, _ in placed:
        if trial.state != "stopped" or not trial.curve(metric):
            continue
        step, value = trial.curve(metric)[-1]
        ends = np.array([(curve[step], end) for curve, end in curves if step in curve])
        if len(ends) >= FEWEST_FINISHED:
            gains = ends[:, 1] - ends[:, 0]
            spread = gains.std(ddof=1) * np.sqrt(1 + 1 / len(gains))
            error = np.hypot(spread, _DRIFT * (value - ends[:, 0].mean()))
            found.append(End(trial, place, value + float(gains.mean()), float(error)))
    return found


def find_optimum(surface: Surface, ends: Sequence[End], mode: str, colours: int) -> Optimum:
    """Return the representation at which the surface is best, within the range of the ends.

    Args:
        surface: Surface through the ends.
        ends: Ends that `fit_surface` got.
        mode: Direction, "max" or "min".
        colours: Minimum number of invariant channels.
    """
    places = np.array([end.position for end in ends])
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


def fit_surface(ends: Sequence[End], dim: int) -> Surface | None:
    """Fit the metric over (rotation_dims, chirality_split).

    Return None for fewer than `FEWEST_POSITIONS` representations, if a hyperparameter is the same
    in all of them, or if all values are equal.

    Args:
        ends: Ends of trials, with a larger error for those that were stopped early.
        dim: Number of latent channels.
    """
    if len({end.position for end in ends}) < FEWEST_POSITIONS:
        return None
    points = np.array([(*end.position, end.value) for end in ends])
    if not np.ptp(points, axis=0).all():
        return None
    x, y = points[:, :2] / (dim, 1), points[:, 2]
    fitted: list[Any] = []
    # The processes normalise the values by their standard deviation, so the errors must be too.
    errors = np.array([end.error for end in ends]) / y.std()
    as_given: dict[str, Any] = {"optimizer": None, "normalize_y": True, "alpha": errors**2 + 1e-10}
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
