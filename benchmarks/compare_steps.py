"""Time of a whole training step: octic, its dense twin and the original sketch, on one CPU thread.

    python -m benchmarks.compare_steps --widths 128 256 512

All have the same width, depth, heads, batch and 64 tokens of a 32 px image. A step is forward,
backward, clipping, optimizer and moving average (the sketch has no clipping and no average). Rounds
alternate in one process, and the time is that of the CPU. Writes benchmarks/results/steps-cpu.json
and prints a table.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from benchmarks.ablate import RESULTS, Trained
from benchmarks.original_sketch import OriginalSketch, build_optimizer
from efae.config import Config
from efae.config.forms import with_overrides

DEPTH, HEADS, SIDE = 4, 4, 32


@dataclass
class Arguments:
    """Options of the comparison."""

    widths: tuple[int, ...] = (128, 256, 512)
    """Widths of encoder and decoder."""
    batch: int = 32
    """Images per step."""
    rounds: int = 8
    """Steps of each kind at each width, in turn."""


def build_step(level: str, width: int, batch: int) -> Callable[[int], None]:
    """Return one training step of a model at this level, or of the "sketch"."""
    config = with_overrides(
        Config(),
        {
            "data.resolution": SIDE,
            "model.hidden_size": width,
            "model.encoder_hidden_size": width,
            "model.num_heads": HEADS,
            "model.depth": DEPTH,
            "model.encoder_depth": 2,
            "model.level": "exact" if level == "sketch" else level,
            "training.precision": "fp32",
        },
    )
    trained = Trained(level, config)
    if level == "sketch":
        trained.model = trained.objective = OriginalSketch(
            3, SIDE, hidden_size=width, depth=DEPTH, num_heads=HEADS
        )
        trained.optimizer = build_optimizer(trained.model, 1e-3)
    trained.model.train()
    images = torch.rand(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    generator = torch.Generator()
    return lambda number: trained.update(images, number, generator)


def measure(width: int, batch: int, rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of a step by kind."""
    kinds = {"octic": "exact", "dense": "objective", "sketch": "sketch"}
    steps = {kind: build_step(level, width, batch) for kind, level in kinds.items()}
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 2):
        for kind, step in steps.items():
            began = time.process_time()
            step(number)
            if number >= 2:  # the first steps are slower
                spent[kind].append(time.process_time() - began)
    return {kind: statistics.median(seconds) for kind, seconds in spent.items()}


def main() -> None:
    """Measure all widths; write and print the results."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "batch": arguments.batch,
        "hardware": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "cpu_seconds": {},
    }
    print("| width | octic, ms | dense, ms | sketch, ms | dense / octic | sketch / octic |")
    print("|---|---|---|---|---|---|")
    for width in arguments.widths:
        found = measure(width, arguments.batch, arguments.rounds)
        results["cpu_seconds"][width] = found
        times = " | ".join(f"{1000 * seconds:.0f}" for seconds in found.values())
        ratios = " | ".join(f"{found[kind] / found['octic']:.2f}" for kind in ("dense", "sketch"))
        print(f"| {width} | {times} | {ratios} |", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "steps-cpu.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
