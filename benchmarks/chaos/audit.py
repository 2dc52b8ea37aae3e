"""Sample logs of a run: the samples of every step, and the cost of every kill.

A log is a file of one training process; see `efae.training.monitoring.sample_log`. Processes that
started together form an attempt.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos.fire import Killed

_SAME_START_SECONDS = 5.0


@dataclass
class Attempt:
    """One group of training processes."""

    world_size: int
    started: float
    """Time of the first line, in seconds since the epoch."""
    first_step: int
    ranks: dict[int, dict[int, list[str]]] = field(default_factory=dict[int, dict[int, list[str]]])
    """Keys by rank and step."""
    ended: float = 0.0
    """Time of the last line."""

    @property
    def steps(self) -> set[int]:
        """Steps that any rank started."""
        return set[int]().union(*self.ranks.values())

    def batches(self) -> dict[int, list[str]]:
        """Return the global batch of each step that every rank started, in the order of ranks."""
        if len(self.ranks) < self.world_size:
            return {}
        return {
            step: [key for rank in sorted(self.ranks) for key in self.ranks[rank][step]]
            for step in self.ranks[0]
            if all(step in steps for steps in self.ranks.values())
        }


def read_attempts(folder: Path) -> list[Attempt]:
    """Read the attempts in the order of their start, without processes that read no batch."""
    attempts: list[Attempt] = []
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: int(path.name.partition("-")[0])):
        # A kill may cut the last line.
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        if not lines:
            continue
        rank = int(path.stem.partition("-")[2])
        started, first_step, world_size, _ = lines[0]
        last = attempts[-1] if attempts else None
        if (
            last is None
            or rank in last.ranks
            or (last.world_size, last.first_step) != (world_size, first_step)
            or started - last.started > _SAME_START_SECONDS
        ):
            last = Attempt(world_size, started, first_step)
            attempts.append(last)
        last.started = min(last.started, started)
        last.ranks[rank] = {step: keys for _, step, _, keys in lines}
        last.ended = max(last.ended, lines[-1][0])
    return attempts


def audit(
    attempts: Sequence[Attempt], keys: Collection[str], steps: int, batch_size: int
) -> dict[str, int]:
    """Count the faults of a run, and the steps that the kills cost.

    Args:
        attempts: All attempts of one run.
        keys: Keys of all samples of the set.
        steps: Number of steps of the run.
        batch_size: Samples per step, over all ranks.

    Returns:
        "missing_steps" that no attempt took; "differing_steps" whose samples changed when they
        were repeated; "wrong_batches" of another size; "lost_samples" that an epoch skipped;
        "repeated_samples" that an epoch repeated; "steps_done_again", the cost.
    """
    found: dict[int, list[list[str]]] = {step: [] for step in range(steps)}
    for attempt in attempts:
        for step, batch in attempt.batches().items():
            found[step].append(batch)
    counts, lost, repeated = dict.fromkeys(keys, 0), 0, 0
    for step, batches in found.items():
        # A batch may hold the end of one epoch and the beginning of the next, in any order.
        first, last = step * batch_size // len(keys), ((step + 1) * batch_size - 1) // len(keys)
        for key in batches[0] if batches else []:
            epoch = counts[key]
            counts[key] += 1
            lost += epoch < first
            repeated += epoch > last
    lost += sum(count < steps * batch_size // len(keys) for count in counts.values())
    return {
        "missing_steps": sum(not batches for batches in found.values()),
        "differing_steps": sum(any(b != batches[0] for b in batches) for batches in found.values()),
        "wrong_batches": sum(
            len(batch) != batch_size for batches in found.values() for batch in batches
        ),
        "lost_samples": lost,
        "repeated_samples": repeated,
        "steps_done_again": sum(max(0, len(batches) - 1) for batches in found.values()),
    }


def measure_recoveries(
    attempts: Sequence[Attempt], kills: Sequence[Killed]
) -> list[dict[str, Any]]:
    """Return a row per kill: kind, moment and cost.

    Returns:
        "recovery_seconds" from the kill to the first step of the next attempt, and "lost_steps",
        started before and repeated after it; both are None if another kill came before that
        attempt, or if no new attempt was needed.
    """
    rows: list[dict[str, Any]] = []
    for index, kill in enumerate(kills):
        until = kills[index + 1].time if index + 1 < len(kills) else float("inf")
        after = next((a for a in attempts if kill.time < a.started < until), None)
        before = [a for a in attempts if a.started <= kill.time]
        row: dict[str, Any] = {"kind": kill.kind, "moment": kill.moment}
        row |= {"recovery_seconds": None, "lost_steps": None}
        if after and before:
            reached = max(before[-1].steps)  # including steps that other ranks started after it
            row["recovery_seconds"] = after.started - kill.time
            row["lost_steps"] = reached - after.first_step + 1
        rows.append(row)
    return rows
