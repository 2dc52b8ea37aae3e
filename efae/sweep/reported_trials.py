"""The trials of a sweep as its mapping has them, and which of them are worth comparing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

ROTATION, SPLIT = "representation.rotation_dims", "representation.chirality_split"
MULTIPLICITIES = "representation.multiplicities"


@dataclass(frozen=True)
class Measure:
    """How a metric is written."""

    word: str
    unit: str = ""
    digits: int = 2

    @property
    def label(self) -> str:
        """Word and unit."""
        return f"{self.word}, {self.unit}" if self.unit else self.word

    def number(self, value: float) -> str:
        """A value without its unit; a small one is not rounded to 0."""
        text = f"{value:,.{self.digits}f}"
        return text if float(text.replace(",", "")) or not value else f"{value:.1e}"

    def write(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.number(value)} {self.unit}".rstrip()


_MEASURES = {
    "psnr": Measure("PSNR", "dB"),
    "held_out_loss": Measure("held-out flow loss", digits=4),
    "worst_gap_db": Measure("worst gap", "dB", 3),
    "latent_size": Measure("numbers per image", digits=0),
    "seconds": Measure("trial time", "s", 0),
}


def describe(metric: str) -> Measure:
    """How a metric is written; any metric of a trial, or ``seconds``."""
    return _MEASURES.get(metric) or Measure(metric.replace("_", " "), digits=4)


@dataclass(frozen=True)
class Trial:
    """One trial of the sweep, as its mapping says; metrics that are unknown are not there."""

    number: int
    key: str
    phase: str
    config: Mapping[str, Any]
    seed: int
    state: str
    metrics: Mapping[str, float]
    multiplicities: Mapping[str, int]
    looks: Sequence[Mapping[str, Any]]
    steps: int
    seconds: float
    cause: str

    @property
    def finished(self) -> bool:
        """Trained for all its steps."""
        return self.state == "finished"

    @property
    def turning(self) -> int:
        """Channels that turn in planes."""
        return 2 * self.multiplicities.get("e", 0)

    @property
    def chiral(self) -> int:
        """Channels that change sign."""
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
        """The metric at its last look, or its ``seconds``."""
        return self.seconds if metric == "seconds" else self.metrics.get(metric)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, metric) of the looks that have it."""
        looks = self.looks
        return [(look["step"], look[metric]) for look in looks if look.get(metric) is not None]

    def knob(self, name: str) -> Any:
        """A knob's value; of the two that name a representation, as trained."""
        if name in (ROTATION, SPLIT) and self.position:
            return self.position[name == SPLIT]
        return self.config.get(name)


def read_trials(trials: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """The trials of a sweep's mapping; extra keys are left out."""
    names = [name for name in Trial.__dataclass_fields__ if name != "metrics"]
    return [
        Trial(
            **{name: trial[name] for name in names},
            metrics={name: v for name, v in trial["metrics"].items() if v is not None},
        )
        for trial in trials
    ]


def choose_pairs(
    trials: Sequence[Trial], objectives: Sequence[Mapping[str, str]]
) -> list[tuple[Mapping[str, str], Mapping[str, str]]]:
    """Up to three pairs of measures worth drawing against each other.

    Of several objectives all pairs, the first objective's first; of a single one, the gap, the
    latent's size or the time against it: the first of them that differs between finished trials.
    """
    finished = [trial for trial in trials if trial.finished]

    def differs(metric: str) -> bool:
        values = [v for trial in finished if (v := trial.measure(metric)) is not None]
        if len(values) < 2:
            return False
        if metric == "seconds":  # machines are not as even as that
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
