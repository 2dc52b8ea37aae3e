"""Records of a sweep in storage: one JSON object for the sweep and one for each trial.

A driver that resumes a sweep reads only these, not the state of Ray Tune: no pickle is loaded from
storage, and no decision is made twice.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from data_pipelines import storage
from data_pipelines.storage import Location, LocationLike
from efae.checkpoints.run_folder import SWEEP


@dataclass(frozen=True)
class TrialRecord:
    """Record of one trial.

    Attributes:
        number: Position in the order of proposal, from 1.
        phase: Search, or repetition of the best trials with other seeds.
        combination: Values of the searched keys.
        seed: Setting training.seed.
        latent_size: Numbers in the latent of an image.
        state: State of the trial; "running" also covers an interrupted one, "stopped" means early.
        validations: Metrics of each validation, with its "step".
        seconds: Duration of all its attempts together.
        cause: Cause of a failure, else "".
    """

    number: int
    phase: Literal["search", "finalist"]
    combination: dict[str, Any]
    seed: int
    latent_size: int
    state: Literal["running", "finished", "stopped", "failed"] = "running"
    validations: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    seconds: float = 0.0
    cause: str = ""

    @property
    def key(self) -> str:
        """Name in the sweep."""
        return f"{self.number:03d}"

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last validation, and the latent's size; {} before the first validation."""
        if not self.validations:
            return {}
        measured = {name: value for name, value in self.validations[-1].items() if name != "step"}
        return measured | {"latent_size": self.latent_size}

    @property
    def steps(self) -> int:
        """Steps trained until the last validation."""
        return int(self.validations[-1]["step"]) if self.validations else 0


def rename_validations(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored trial with the key of release 0.1, "looks", renamed to "validations"."""
    return {("validations" if key == "looks" else key): value for key, value in trial.items()}


class Records:
    """Trials of one sweep, by number, in memory and in storage.

    Args:
        folder: Folder of the sweep; existing records are read.

    Raises:
        StorageError: The storage refuses or does not answer.
        ValueError: An object there is not a record.
    """

    def __init__(self, folder: LocationLike):
        self._folder = Location.parse(folder)
        self.trials: dict[int, TrialRecord] = {}
        for name in sorted(storage.list_files(self._folder)):
            if name == SWEEP or not name.endswith(".json") or "/" in name:
                continue
            where = self._folder / name
            try:
                record = TrialRecord(**rename_validations(json.loads(storage.read_bytes(where))))
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
        """Record a new, running trial."""
        number = max(self.trials, default=0) + 1
        return self.write(TrialRecord(number, phase, combination, seed, latent_size))

    def write(self, record: TrialRecord) -> TrialRecord:
        """Write a record, replacing the one with its number.

        Raises:
            StorageError: The storage refuses or does not answer.
        """
        text = json.dumps(asdict(record), indent=2)
        storage.write_bytes(self._folder / f"{record.key}.json", text.encode())
        self.trials[record.number] = record
        return record

    def update(self, number: int, **changes: Any) -> TrialRecord:
        """Write a record with some fields replaced."""
        return self.write(replace(self.trials[number], **changes))

    def in_phase(self, phase: str) -> list[TrialRecord]:
        """Return the trials of one phase, by number."""
        return [r for _, r in sorted(self.trials.items()) if r.phase == phase]

    def read_sweep(self) -> dict[str, Any] | None:
        """Return the sweep's own object; None if the sweep is new."""
        where = self._folder / SWEEP
        return json.loads(storage.read_bytes(where)) if storage.exists(where) else None

    def write_sweep(self, facts: dict[str, Any]) -> None:
        """Replace the sweep's own object."""
        text = json.dumps(facts, indent=2)
        storage.write_bytes(self._folder / SWEEP, text.encode())
