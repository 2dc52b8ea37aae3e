"""Trials parsed from sweep.json, and the pairs of metrics to plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from efae.sweep.records import rename_validations

ROTATION, SPLIT = "representation.rotation_dims", "representation.chirality_split"
MULTIPLICITIES = "representation.multiplicities"


@dataclass(frozen=True)
class Measure:
    """Name, unit and precision of a metric."""

    word: str
    unit: str = ""
    digits: int = 2

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.word}, {self.unit}" if self.unit else self.word

    def number(self, value: float) -> str:
        """Format a value without its unit; a small value is not rounded to 0."""
        text = f"{value:,.{self.digits}f}"
        return text if float(text.replace(",", "")) or not value else f"{value:.1e}"

    def write(self, value: float) -> str:
        """Format a value with its unit."""
        return f"{self.number(value)} {self.unit}".rstrip()


_MEASURES = {
    "psnr": Measure("PSNR", "dB"),
    "held_out_loss": Measure("held-out flow loss", digits=4),
    "worst_gap_db": Measure("worst gap", "dB", 3),
    "latent_size": Measure("numbers per image", digits=0),
    "seconds": Measure("trial time", "s", 0),
}


def describe(metric: str) -> Measure:
    """Return name, unit and precision of a trial's metric, or of ``seconds``."""
    return _MEASURES.get(metric) or Measure(metric.replace("_", " "), digits=4)


@dataclass(frozen=True)
class Trial:
    """One trial of sweep.json, without unknown metrics."""

    number: int
    key: str
    phase: str
    config: Mapping[str, Any]
    seed: int
    state: str
    metrics: Mapping[str, float]
    multiplicities: Mapping[str, int]
    validations: Sequence[Mapping[str, Any]]
    steps: int
    seconds: float
    cause: str

    @property
    def finished(self) -> bool:
        """Whether it trained for all its steps."""
        return self.state == "finished"

    @property
    def turning(self) -> int:
        """Number of channels that rotate in planes."""
        return 2 * self.multiplicities.get("e", 0)

    @property
    def chiral(self) -> int:
        """Number of channels that change sign."""
        return sum(self.multiplicities.get(irrep, 0) for irrep in ("a2", "b1", "b2"))

    @property
    def position(self) -> tuple[float, float] | None:
        """(rotation_dims, chirality_split) as trained: the split after rounding to channels."""
        if not self.multiplicities:
            asked = self.config.get(ROTATION), self.config.get(SPLIT)
            return None if None in asked else cast(tuple[float, float], asked)
        others = self.multiplicities.get("a1", 0) + self.chiral
        return self.turning, self.chiral / max(1, others)

    def measure(self, metric: str) -> float | None:
        """Return the metric of the last validation, or ``seconds``."""
        return self.seconds if metric == "seconds" else self.metrics.get(metric)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return (step, metric) of the validations that have it."""
        return [(v["step"], v[metric]) for v in self.validations if v.get(metric) is not None]

    def hyperparameter(self, name: str) -> Any:
        """Return a searched key's value; the two of a split after rounding to channels."""
        if name in (ROTATION, SPLIT) and self.position:
            return self.position[name == SPLIT]
        return self.config.get(name)


def read_trials(trials: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Parse the trials of sweep.json; other keys are ignored."""
    names = [name for name in Trial.__dataclass_fields__ if name != "metrics"]
    return [
        Trial(
            **{name: trial[name] for name in names},
            metrics={name: v for name, v in trial["metrics"].items() if v is not None},
        )
        for trial in map(rename_validations, trials)
    ]


def choose_pairs(
    trials: Sequence[Trial], objectives: Sequence[Mapping[str, str]]
) -> list[tuple[Mapping[str, str], Mapping[str, str]]]:
    """Choose up to three pairs of metrics to plot against each other.

    Several objectives give all pairs, those of the first objective first. A single objective is
    plotted against the first of gap, latent size and time that differs between finished trials.
    """
    finished = [trial for trial in trials if trial.finished]

    def differs(metric: str) -> bool:
        values = [v for trial in finished if (v := trial.measure(metric)) is not None]
        if len(values) < 2:
            return False
        if metric == "seconds":  # smaller differences are noise of the machines
            return max(values) > 1.25 * min(values)
        least = 1e-3 if metric == "worst_gap_db" else 1e-6 * max(abs(v) for v in values)
        return max(values) - min(values) > least

    varied = [objective for objective in objectives if differs(objective["metric"])]
    if len(objectives) > 1:
        return [(a, b) for i, a in enumerate(varied) for b in varied[i + 1 :]][:3]
    for other in ("worst_gap_db", "latent_size", "seconds"):
        if varied and other != varied[0]["metric"] and differs(other):
            return [(varied[0], {"metric": other, "mode": "min"})]
    return []
