"""Cost of the platform per step: the bare loop against Ray with MLflow and checkpoints.

    source .local/env; python -m benchmarks.compare_platform --steps 600 --rounds 3

The bare loop is `efae.training.loop.train` in a plain process of one thread, on the same shards
from the same S3, without Ray, MLflow or checkpoints. The platform is `jobs/train.py` with one
worker on the running stack, with curves, system metrics and checkpoints at its intervals. Both
record when each step starts. The result is the median over rounds of the ratio of steps per second
after the warm-up; the order alternates. Needs `make up` and the preset's shards.
"""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from data_pipelines import ShardDataset
from efae.config import Config
from efae.config.forms import with_overrides
from efae.presets import PRESETS
from efae.training.loop import train
from efae.training.process import Process

RESULTS = Path(__file__).parent / "results"
WARM_UP_STEPS = 50


@dataclass
class Arguments:
    """Options of the comparison."""

    preset: str = "quickstart"
    """Experiment to train."""
    steps: int = 600
    """Steps of each run."""
    rounds: int = 3
    """Pairs of runs."""


def train_bare(config: Config) -> None:
    """Run the loop alone, in this process."""
    torch.set_num_threads(1)
    train(config, ShardDataset.open(config.data.uri), Process(torch.device("cpu")))


def train_on_platform(preset: str, overrides: dict[str, Any]) -> None:
    """Run the whole job, as a user starts it."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in overrides.items()]
    subprocess.run(
        [sys.executable, "jobs/train.py", preset, *options],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": "."},
    )


def read_speed(folder: Path, steps: int) -> float:
    """Return the steps per second after the warm-up, from the only sample log in `folder`."""
    (log,) = folder.iterdir()
    times = [json.loads(line)[0] for line in log.read_text().splitlines()]
    assert len(times) == steps, "the run was interrupted: it took several attempts"
    return (steps - 1 - WARM_UP_STEPS) / (times[-1] - times[WARM_UP_STEPS])


def measure(kind: str, arguments: Arguments) -> float:
    """Return the steps per second of one run."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "training.steps": arguments.steps,
            "training.held_out_images": 16,
            "ray.num_workers": 1,
            "tracking.run_name": f"cost-{time.time_ns()}",
            "tracking.registered_model": "efae-cost",
            "tracking.sample_log": folder,
        }
        if kind == "bare":
            config = with_overrides(PRESETS[arguments.preset][1], overrides)
            spawned = multiprocessing.get_context("spawn")
            process = spawned.Process(target=train_bare, args=(config,))
            process.start()
            process.join()
            assert process.exitcode == 0
        else:
            train_on_platform(arguments.preset, overrides)
        return read_speed(Path(folder), arguments.steps)


def main() -> None:
    """Measure; write and print the results."""
    arguments = tyro.cli(Arguments, description=__doc__)
    rows: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        order = ("bare", "platform") if number % 2 == 0 else ("platform", "bare")
        rows.append({kind: measure(kind, arguments) for kind in order})
        row = rows[-1]
        print(
            f"bare {row['bare']:.2f}, platform {row['platform']:.2f} steps/s:"
            f" {row['platform'] / row['bare']:.3f}",
            flush=True,
        )
    ratio = statistics.median(row["platform"] / row["bare"] for row in rows)
    result = {
        "preset": arguments.preset,
        "steps": arguments.steps,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "steps_per_second": rows,
        "platform_over_bare": ratio,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "platform.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"platform over bare: {ratio:.3f} (median of {arguments.rounds})")


if __name__ == "__main__":
    main()
