"""Levels of equivariance at one budget of CPU seconds: exact, objective, none.

    python -m benchmarks.compare_levels --preset quickstart --cpu-seconds 400

Each level trains a preset in one process on one thread; the number of steps is set so that the
training takes the budget, from the speed of the first steps. Dense levels may be given another
width and learning rate, since an octic layer of equal width has an eighth of the weights. Writes
benchmarks/results/levels-PRESET-LEVELS.json and prints a table.
"""

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from data_pipelines import ShardDataset
from efae.config import Config, with_overrides
from efae.presets import PRESETS
from efae.training.evaluation import evaluate
from efae.training.held_out import read_held_out
from efae.training.loop import train

RESULTS = Path(__file__).parent / "results"
PROBE_STEPS = 100


@dataclass
class Arguments:
    """What to compare on what."""

    preset: str = "quickstart"
    """Experiment to start from; names the result file."""
    train: str = ""
    """Shards to train on, instead of the preset's."""
    held_out: str = ""
    """Shards to measure on, instead of the preset's."""
    cpu_seconds: float = 400.0
    """Training budget of each level."""
    levels: tuple[str, ...] = ("exact", "objective", "none")
    """Levels to compare."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Dotted configuration keys and values, for every level."""


def discard_checkpoint(metrics: dict, folder: Path | None) -> None:
    if folder:
        shutil.rmtree(folder)


def train_for(config: Config, steps: int):
    """Train on this thread; returns the state and the CPU seconds it took."""
    config = with_overrides(
        config, {"training.steps": steps, "training.checkpoint_interval": steps}
    )
    started = time.process_time()
    state = train(
        config,
        ShardDataset.open(config.data.uri),
        device=torch.device("cpu"),
        report=discard_checkpoint,
        say=lambda line: print(f"  {line}", flush=True),
    )
    return state, time.process_time() - started


def measure(config: Config, cpu_seconds: float) -> dict:
    """Train for the budget, then evaluate the averaged weights."""
    train_for(config, PROBE_STEPS)  # the first steps of a process are slower
    _, probe = train_for(config, PROBE_STEPS)
    steps = int(cpu_seconds / probe * PROBE_STEPS)
    state, spent = train_for(config, steps)
    state.average.copy_to(state.model)
    images = read_held_out(config.data, config.training.held_out_images)
    evaluation = evaluate(state.model.eval(), images)
    return {
        "cpu_seconds": spent,
        "steps": steps,
        "images_seen": steps * config.training.global_batch_size,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        **evaluation.numbers(),
    }


def main() -> None:
    """Measure each level, write the results, print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    overrides = {"ray.num_workers": 1, **arguments.overrides}
    if arguments.train:
        overrides["data.uri"] = arguments.train
    if arguments.held_out:
        overrides["data.held_out_uri"] = arguments.held_out
    base = with_overrides(PRESETS[arguments.preset][1], overrides)
    rows = {}
    for level in arguments.levels:
        print(f"{level}: {arguments.cpu_seconds:.0f} CPU seconds", flush=True)
        rows[level] = measure(with_overrides(base, {"model.level": level}), arguments.cpu_seconds)
    result = {
        "preset": arguments.preset,
        "overrides": arguments.overrides,
        "hardware": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "levels": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"levels-{arguments.preset}-{'-'.join(arguments.levels)}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print("| level | CPU s | images | parameters | PSNR dB | worst gap dB |")
    print("|---|---|---|---|---|---|")
    for level, row in rows.items():
        print(
            f"| {level} | {row['cpu_seconds']:.0f} | {row['images_seen']:,} |"
            f" {row['parameters']:,} | {row['psnr']:.2f} | {row['worst_gap_db']:.1e} |"
        )


if __name__ == "__main__":
    main()
