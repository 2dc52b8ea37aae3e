"""What storage remembers of a sweep: one JSON object for the sweep and one for each trial.

A driver that takes a sweep up again reads these, and nothing that Ray Tune remembers: no pickle is
loaded from storage, and what was decided is never decided again.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from data_pipelines import storage
from data_pipelines.storage import Location, LocationLike

_SWEEP = "sweep.json"


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: in the order of proposal, counted from 1.
        phase: the search itself, or the repetition of its best with other seeds.
        combination: values of the searched keys.
        seed: training.seed.
        latent_size: numbers in the latent of an image.
        state: running also while nobody runs it; stopped is early; failed has a cause.
        looks: what was measured of it at which "step".
        seconds: that its attempts took, together.
        cause: of a failure, else "".
    """

    number: int
    phase: Literal["search", "finalist"]
    combination: dict[str, Any]
    seed: int
    latent_size: int
    state: Literal["running", "finished", "stopped", "failed"] = "running"
    looks: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    seconds: float = 0.0
    cause: str = ""

    @property
    def key(self) -> str:
        """Its name in the sweep."""
        return f"{self.number:03d}"

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last look, and the latent's size; {} where there was no look."""
        if not self.looks:
            return {}
        measured = {name: value for name, value in self.looks[-1].items() if name != "step"}
        return measured | {"latent_size": self.latent_size}

    @property
    def steps(self) -> int:
        """Trained up to the last look."""
        return int(self.looks[-1]["step"]) if self.looks else 0


class Records:
    """The trials of one sweep, by number, here and in storage.

    Args:
        folder: of the sweep; what is there is read.

    Raises:
        StorageError: the storage refuses or does not answer.
        ValueError: an object there is not a record.
    """

    def __init__(self, folder: LocationLike):
        self._folder = Location.parse(folder)
        self.trials: dict[int, TrialRecord] = {}
        for name in sorted(storage.list_files(self._folder)):
            if name == _SWEEP or not name.endswith(".json") or "/" in name:
                continue
            where = self._folder / name
            try:
                record = TrialRecord(**json.loads(storage.read_bytes(where)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: not a trial's record: {error}") from error
            self.trials[record.number] = record

    def add(
        self,
        phase: Literal["search", "finalist"],
        combination: dict[str, Any],
        seed: int,
        latent_size: int,
    ) -> TrialRecord:
        """A new trial, running."""
        number = max(self.trials, default=0) + 1
        return self.write(TrialRecord(number, phase, combination, seed, latent_size))

    def write(self, record: TrialRecord) -> TrialRecord:
        """Keep it in place of the one of that number.

        Raises:
            StorageError: the storage refuses or does not answer.
        """
        text = json.dumps(asdict(record), indent=2)
        storage.write_bytes(self._folder / f"{record.key}.json", text.encode())
        self.trials[record.number] = record
        return record

    def update(self, number: int, **changes: Any) -> TrialRecord:
        """Write a record with some fields replaced."""
        return self.write(replace(self.trials[number], **changes))

    def in_phase(self, phase: str) -> list[TrialRecord]:
        """Those of one phase, by number."""
        return [r for _, r in sorted(self.trials.items()) if r.phase == phase]

    def read_sweep(self) -> dict[str, Any] | None:
        """The sweep's own object, or None where it is new."""
        where = self._folder / _SWEEP
        return json.loads(storage.read_bytes(where)) if storage.exists(where) else None

    def write_sweep(self, facts: dict[str, Any]) -> None:
        """Replace the sweep's own object."""
        text = json.dumps(facts, indent=2)
        storage.write_bytes(self._folder / _SWEEP, text.encode())
