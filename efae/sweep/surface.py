"""A sweep's metric as a surface over its two knobs.

A stopped trial was measured at an earlier step, where all trials are worse: as it stands it would
pull the surface down wherever the sweep gave up early. It counts by the end that it was heading
for: its last look, and what the finished trials gained from that step on.
"""

# pyright: reportMissingTypeStubs=false
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from efae.sweep.reported_trials import Trial

FEWEST_POSITIONS = 5
"""Different representations that a surface needs."""
FEWEST_FINISHED = 3
"""Finished trials whose gains say what a stopped one would have gained."""

# Gains differ by this share of how far two trials are apart: over 58 trials of the default space
# (`benchmarks/compare_sweeps.py`), 0.13 from the first rung and 0.05 from the second.
_DRIFT = 0.15
# Lengths in units of the whole range of either knob; variances in that of the values.
_LENGTHS, _AMPLITUDES, _NOISES = (0.2, 0.35, 0.6, 1.0, 1.7), (0.7, 2.0, 6.0), (0.003, 0.03, 0.3)


@dataclass(frozen=True)
class Surface:
    """Gaussian processes through the trials' ends, each as likely as its weight.

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


@dataclass(frozen=True)
class End:
    """Where a trial of a representation ended, or would have."""

    trial: Trial
    position: tuple[float, float]
    value: float
    error: float
    """Standard error of the value; 0 for a finished trial."""


def find_ends(trials: Sequence[Trial], metric: str) -> list[End]:
    """The metric at the end of each trial that has a representation, and how well it is known.

    Of a finished trial it is what was measured. A stopped one would have gained what the finished
    ones gained on average since its last step; its error is their spread, and more the further it
    was from them. Without `FEWEST_FINISHED` finished ones that were looked at in that step, and of
    trials that failed or still run, nothing is known.

    Args:
        trials: of one sweep.
        metric: of theirs.
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
    """The representation at which the surface is best, in the range where trials ended.

    Args:
        surface: through the ends.
        ends: those of `fit_surface`.
        mode: "max" or "min".
        colours: invariant channels, at least.
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
    """The metric over (rotation_dims, chirality_split).

    None if there are fewer than `FEWEST_POSITIONS` representations, if one of the knobs is the same
    in all of them, or if all values are equal.

    Args:
        ends: of trials, those that stopped early with a wider error.
        dim: the latent's channels.
    """
    if len({end.position for end in ends}) < FEWEST_POSITIONS:
        return None
    points = np.array([(*end.position, end.value) for end in ends])
    if not np.ptp(points, axis=0).all():
        return None
    x, y = points[:, :2] / (dim, 1), points[:, 2]
    fitted: list[Any] = []
    # The processes see values in units of their spread; so must the errors be.
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
