"""Result and cost of sweeps, against a grid of all splits.

    source .local/env; python -m benchmarks.compare_sweeps --level exact --seeds 3

The grid trains every split of the default space to the end, with two seeds. Each sweep is the
default one (Optuna, early stopping, repeated finalists) with a different search seed. The score of
a sweep is the grid's mean over seeds for the split that the sweep chose, relative to that of the
best split. Cost is measured in training steps. Interrupted grids and sweeps resume. They need `make
up` and the preset's shards; on two cores, the grid takes about an hour and a sweep a sixth of that.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

RESULTS = Path(__file__).parent / "results"
EVERYTHING = 1000
"""Number of trials that exceeds the size of the space."""


@dataclass
class Arguments:
    """Options of the comparison."""

    preset: str = "quickstart_trial"
    """Experiment of a trial."""
    level: str = "exact"
    """Level of equivariance of the trials."""
    grid_seeds: int = 2
    """Number of seeds of every split in the grid."""
    seeds: int = 3
    """Number of sweeps, each with a different seed."""


def run(name: str, arguments: Arguments, *options: str) -> dict[str, Any]:
    """Run one sweep as a user starts it, unless it has finished; return its sweep.json."""
    kept = RESULTS / f"{name}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "jobs/tune.py", arguments.preset, f"--sweep.name={name}"]
            command += [f"--model.level={arguments.level}", f"--tracking.report-folder={folder}"]
            command += ["--tracking.registered-model=efae-sweeps", *options]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": "."})
            found = json.loads((Path(folder) / name / "sweep.json").read_text())
        for trial in found["trials"]:  # the learning curves would dominate the file
            del trial["validations"]
        found["hardware"] = f"{platform.machine()}, {os.cpu_count()} cores"
        found["torch"] = torch.__version__
        kept.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(kept.read_text())


def split_of(trial: dict[str, Any]) -> tuple[int, ...]:
    """Return the split of a trial."""
    return tuple(trial["multiplicities"].values())


def main() -> None:
    """Run the missing sweeps, compare them and print the result."""
    arguments = tyro.cli(Arguments, description=__doc__)
    RESULTS.mkdir(exist_ok=True)
    others = arguments.grid_seeds - 1
    stem = f"sweep-{arguments.preset}-{arguments.level}"
    grid = run(
        f"{stem}-grid",
        arguments,
        *("--sweep.search=grid", f"--sweep.trials={EVERYTHING}", "--sweep.no-early-stopping"),
        *(f"--sweep.finalists={EVERYTHING if others else 0}", f"--sweep.finalist-seeds={others}"),
    )
    values: dict[tuple[int, ...], list[float]] = {}
    for trial in grid["trials"]:
        values.setdefault(split_of(trial), []).append(trial["metrics"]["psnr"])
    means = {split: statistics.fmean(found) for split, found in values.items()}
    best = max(means, key=lambda split: means[split])
    print(f"grid: {len(means)} splits, best {best}: {means[best]:.2f} dB")
    print(f"  worst {min(means.values()):.2f} dB")
    if others:
        noise = statistics.fmean(statistics.stdev(found) for found in values.values())
        print(f"  two seeds differ by {noise:.2f} dB (std)")
    for seed in range(arguments.seeds):
        found = run(f"{stem}-{seed}", arguments, f"--sweep.seed={seed}")
        (chosen,) = [t for t in found["trials"] if t["key"] == found["best"]["key"]]
        split, steps = split_of(chosen), found["cost"]["steps"]
        print(
            f"sweep {seed}: {split}: {means[split] - means[best]:+.2f} dB of the best,"
            f" {steps / grid['cost']['steps']:.0%} of the grid's steps"
            f" ({steps / (grid['steps'] * len(means)):.0%} of a grid of one seed)"
        )


if __name__ == "__main__":
    main()
