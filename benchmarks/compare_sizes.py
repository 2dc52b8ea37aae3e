"""Photographs at sizes that a model was not trained at, and in few sampler steps.

    python -m benchmarks.photographs --output FOLDER --side 64 96 128 256
    python -m benchmarks.compare_sizes --photographs FOLDER --cpu-seconds 300

First, the preset and its transformer are trained at the preset's size and measured at all sizes,
each time beside the preset trained at that size. Then the preset's model is distilled into
decoders of one step, and teacher and students are measured in 1, 2 and 4 steps. Every model trains
with `efae.training.loop`, on one thread and for equal CPU time: the cost of a step, measured first,
sets the number of steps. Writes benchmarks/results/sizes-PRESET-SECONDS.json after every model and
prints both tables at the end.
"""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.ablate import RESULTS, list_variants
from data_pipelines import ShardDataset
from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.flow_measures import measure_steps
from efae.evaluation.held_out import read_held_out
from efae.evaluation.measures import Totals, draw_noise, psnr, to_float
from efae.model.autoencoder import Autoencoder
from efae.model.closed_form import Moments, fit_linear_map
from efae.presets import PRESETS
from efae.training.loop import Start, train
from efae.training.observer import Observer
from efae.training.process import Process

Size = tuple[int, int]
CPU = torch.device("cpu")
STEP_COUNTS = (1, 2, 4)
PIXELS_PER_BATCH = 2**18
"""Pixels that a batch of the measurement holds, about; bounds memory."""
TRIAL_STEPS, WINDOW = 40, 10
"""Steps that are timed before a model trains, and how many of them in a row are one measurement."""
DISTILLATION = {"optimizer.learning_rate": 2e-3}


@dataclass
class Arguments:
    """Options of the comparison."""

    photographs: Path
    """Folder of shard sets, SIDE/train and SIDE/held_out, as benchmarks.photographs makes them."""
    preset: str = "photographs_64"
    """Experiment; its model.kind is unet."""
    sizes: tuple[Size, ...] = ((48, 80), (64, 64), (96, 96), (128, 128), (256, 256))
    """Heights and widths to measure at, from the smallest set that covers each; the preset's is
    always among them."""
    cpu_seconds: float = 300.0
    """Training budget of each model."""
    distill_cpu_seconds: float = 100.0
    """Training budget of each student."""
    distill_steps: tuple[int, ...] = (4, 8)
    """Sampler steps of the teacher, one student for each."""
    images: int = 240
    """Held-out images at each size."""


class Stopwatch(Observer):
    """Notes the CPU time at the end of every step."""

    def __init__(self):
        super().__init__()
        self.times: list[float] = []

    def end_step(self) -> None:
        self.times.append(time.process_time())

    def measure_step(self) -> float:
        """Return the CPU seconds of a step: the least of all windows, as other programs interfere.

        The first window is left out, because the first steps of a process are slower.
        """
        ends = range(2 * WINDOW, len(self.times))
        return min(self.times[end] - self.times[end - WINDOW] for end in ends) / WINDOW


def train_for(
    config: Config, cpu_seconds: float, teacher: Autoencoder | None = None
) -> tuple[Autoencoder, dict[str, Any]]:
    """Train a model for a CPU time.

    Args:
        config: Configuration of the experiment; its number of steps is replaced.
        cpu_seconds: Budget of all steps together.
        teacher: Model that flow.distill_from names.

    Returns:
        The model with its averaged weights, in eval mode; and what its training took.
    """
    dataset, start = ShardDataset.open(config.data.uri), Start(source=teacher)

    def run(steps: int) -> tuple[Autoencoder, Stopwatch]:
        stopwatch = Stopwatch()
        chosen = with_overrides(config, {"training.steps": steps})
        state = train(chosen, dataset, Process(CPU), start, stopwatch)
        state.average.copy_to(state.model)
        return state.model.eval(), stopwatch

    steps = max(2, round(cpu_seconds / run(TRIAL_STEPS)[1].measure_step()))
    model, stopwatch = run(steps)
    spent = (stopwatch.times[-1] - stopwatch.times[0]) * steps / (steps - 1)
    return model, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "batch": config.training.global_batch_size,
        "cpu_seconds": spent,
    }


@torch.no_grad()
def measure(model: Autoencoder, images: Tensor, counts: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return PSNR, SSIM and sharpness on held-out images by number of sampler steps."""
    totals = Totals()
    for first, image in _split(images):
        noise = draw_noise(range(first, first + len(image)), tuple(image.shape[1:]), seed=0)
        measure_steps(model, image, noise, model.encode(image), totals, counts)

    def mean(name: str) -> float:
        return float(totals.mean(name))

    return {
        count: {
            "psnr": mean(f"steps psnr {count}"),
            "ssim": mean(f"steps ssim {count}"),
            "sharpness": mean(f"steps gradient {count}") / mean("gradient"),
        }
        for count in counts
    }


@torch.no_grad()
def measure_linear_map(model: Autoencoder, images: Tensor) -> float:
    """Return the PSNR of the best linear map with the model's latent, fitted to these images."""
    side, image = model.config.model.downsampling, to_float(images)
    fitted = fit_linear_map(Moments.of(images, side), model.representation, side)
    return float(psnr(fitted.reconstruct(image, side).clamp(-1, 1), image).mean())


def _split(images: Tensor) -> list[tuple[int, Tensor]]:
    """Return batches in [-1, 1], each with the position of its first image."""
    batch_size = max(1, PIXELS_PER_BATCH // (images.shape[-2] * images.shape[-1]))
    starts = range(0, len(images), batch_size)
    return [(start, to_float(images[start : start + batch_size])) for start in starts]


@torch.no_grad()
def measure_speed(model: Autoencoder, size: Size, counts: Sequence[int]) -> dict[int, float]:
    """Return images decoded per CPU second by number of sampler steps: the best of five rounds."""
    images, rounds = 16, 5
    latent = model.encode(torch.zeros(images, model.config.data.channels, *size))
    seconds = dict.fromkeys(counts, float("inf"))
    for count in [*counts] * rounds:
        began = time.process_time()
        model.decode(latent, count, seed=0)
        seconds[count] = min(seconds[count], time.process_time() - began)
    return {count: images / seconds[count] for count in counts}


def choose_data(base: Config, folder: Path, size: Size) -> Config:
    """Return an experiment on images of a size, with as many pixels per batch.

    Raises:
        ValueError: No set of the folder covers the size.
    """
    sides = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    covering = [side for side in sides if side >= max(size)]
    if not covering:
        raise ValueError(f"--photographs {folder}: no set of {max(size)} px or more")
    (height, width), (rows, columns) = base.data.image_size, size
    batch = base.training.global_batch_size * height * width / (rows * columns)
    shards = folder / str(min(covering))
    return with_overrides(
        base,
        {
            "data.uri": str(shards / "train"),
            "data.held_out_uri": str(shards / "held_out"),
            "data.resolution": size,
            "data.decode_threads": 1,
            "training.global_batch_size": max(1, round(batch)),
            "ray.num_workers": 1,
        },
    )


def compare(base: Config, arguments: Arguments, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and measure all models; write and return the results.

    Raises:
        ValueError: No set covers a size.
    """
    own = base.data.image_size
    experiments = {
        size: choose_data(base, arguments.photographs, size)
        for size in sorted({own, *arguments.sizes}, key=math.prod)
    }
    held_out = {
        size: read_held_out(config.data, arguments.images) for size, config in experiments.items()
    }
    path = RESULTS / f"sizes-{arguments.preset}-{arguments.cpu_seconds:.0f}.json"
    commit = ["git", "rev-parse", "--short", "HEAD"]
    results: dict[str, Any] = {
        "preset": arguments.preset,
        "hardware": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": subprocess.run(
            commit, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "linear_map": {},
        "sizes": {},
        "steps": {},
    }

    def add(section: str, name: str, row: dict[str, Any]) -> None:
        results[section][name] = row
        path.write_text(json.dumps(results, indent=1) + "\n")
        say(f"{name}: {row['steps']} steps, {row['cpu_seconds']:.0f} CPU s")

    def measure_at(model: Autoencoder, sizes: Sequence[Size]) -> dict[str, float]:
        count = base.flow.default_steps
        return {
            show(size): measure(model, held_out[size], (count,))[count]["psnr"] for size in sizes
        }

    def measure_decoder(model: Autoencoder) -> dict[int, dict[str, Any]]:
        rows = measure(model, held_out[own], STEP_COUNTS)
        speeds = measure_speed(model, own, STEP_COUNTS)
        return {count: rows[count] | {"images_per_second": speeds[count]} for count in rows}

    RESULTS.mkdir(exist_ok=True)
    teacher, facts = train_for(experiments[own], arguments.cpu_seconds)
    teacher.requires_grad_(False)
    results["linear_map"] = {
        show(size): measure_linear_map(teacher, images) for size, images in held_out.items()
    }
    add("sizes", f"unet, {show(own)}", facts | {"psnr": measure_at(teacher, [*held_out])})
    add("steps", "teacher", facts | {"decodes": measure_decoder(teacher)})
    for count in arguments.distill_steps:
        overrides = {"flow.distill_from": "teacher", "flow.distill_steps": count} | DISTILLATION
        config = with_overrides(experiments[own], overrides)
        student, facts = train_for(config, arguments.distill_cpu_seconds, teacher)
        name = f"student of {count} steps"
        add("steps", name, facts | {"decodes": measure_decoder(student)})
    overrides = list_variants(base)["exact, transformer"]
    config = with_overrides(experiments[own], overrides)
    transformer, facts = train_for(config, arguments.cpu_seconds)
    add(
        "sizes", f"transformer, {show(own)}", facts | {"psnr": measure_at(transformer, [*held_out])}
    )
    for size in held_out:
        if size != own:
            model, facts = train_for(experiments[size], arguments.cpu_seconds)
            add("sizes", f"unet, {show(size)}", facts | {"psnr": measure_at(model, [size])})
    return results


def show(size: Size) -> str:
    """Return a size as text, such as "48 x 80"."""
    return f"{size[0]} x {size[1]}"


def print_tables(results: dict[str, Any]) -> None:
    """Print both tables, in Markdown."""
    sizes = list(results["linear_map"])
    print("| network, trained at | " + " | ".join(sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    found = {name: row["psnr"] for name, row in results["sizes"].items()}
    rows = {"best linear map of these images": results["linear_map"]}
    rows |= {name: scores for name, scores in found.items() if len(scores) == len(sizes)}
    rows["unet, that size"] = {size: found[f"unet, {size}"][size] for size in sizes}
    for name, scores in rows.items():
        print(f"| {name} | " + " | ".join(f"{scores[size]:.2f}" for size in sizes) + " |")
    print("\n| decoder | steps | PSNR | SSIM | sharpness | images/s |\n|---|---|---|---|---|---|")
    for name, row in results["steps"].items():
        for count, decode in row["decodes"].items():
            print(
                f"| {name} | {count} | {decode['psnr']:.2f} | {decode['ssim']:.3f} |"
                f" {decode['sharpness']:.3f} | {decode['images_per_second']:.0f} |"
            )


def main() -> None:
    """Compare and print the tables."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    base = PRESETS[arguments.preset][1]
    print_tables(compare(base, arguments, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    main()
