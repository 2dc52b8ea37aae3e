"""Fine-tuning of an autoencoder of diffusers: actions on its channels, at an equal budget.

    python -m benchmarks.compare_fine_tuning --name photographs --train FOLDER/64/train \
        --held-out FOLDER/64/held_out --models MODELS

First, a small AutoencoderKL is trained without equivariance, in the place of one that was
downloaded, and measured. From there every arm trains for a fifth of its FLOPs: the control, which
continues without equivariance; the spatial action, the fitted one and the default split, over all
flips and quarter turns; and the spatial action and the fitted one over the mirror alone. All train
with `efae.training.loop`, on one thread: at every learning rate with the first seed, then at the
arm's best one with the other seeds. A fitted arm is not trained where the fit finds the spatial
action.
Finished runs are kept in benchmarks/results/fine_tuning-NAME-CHANNELS.json, and the autoencoder in
--models, so an interrupted comparison resumes. Prints a table at the end.
"""

import hashlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from benchmarks.ablate import RESULTS
from data_pipelines import ShardDataset
from efae.config import Config, DataConfig
from efae.config.forms import with_overrides
from efae.evaluation.evaluate import evaluate, measure_drift
from efae.evaluation.fitted_action import FittedAction, fit_action
from efae.evaluation.held_out import read_held_out, read_images
from efae.exchange.diffusers_tokenizer import WEIGHTS, read_pretrained
from efae.model.autoencoder import Autoencoder
from efae.presets import PRESETS
from efae.symmetry import Representation
from efae.training.loop import Start, train
from efae.training.monitoring.flops import count_flops
from efae.training.observer import Observer
from efae.training.process import Process
from efae.training.starts.source import adopt_action, adopt_pretrained, load_source
from efae.training.validation import Validation

CPU = torch.device("cpu")
ARMS: dict[str, dict[str, Any]] = {
    "control": {"model.level": "none", "start.action": "spatial"},
    "spatial": {"start.action": "spatial"},
    "fitted": {"start.action": "fitted"},
    "split": {"start.action": "split"},
    "mirror": {"start.action": "spatial", "representation.group": "mirror"},
    "fitted_mirror": {"start.action": "fitted", "representation.group": "mirror"},
}
SYMMETRIZED = "spatial"
"""Arm whose first run is also measured as an average over the group."""
WIDTHS = (24, 48, 96)
"""Channels at the image's grid, at half of it, and at the latent's."""
SHARE = 5
"""FLOPs of the training from scratch in units of an arm's."""
FITTED_IMAGES = 256
"""Training images that the action is fitted to, as many as a run takes."""
SETTINGS: dict[str, Any] = {
    "data.decode_threads": 1,
    "model.patch_size": 2,
    "loss.reconstruction": "l2",
    "optimizer.ema_decay": 0.99,
    "training.precision": "fp32",
    "training.activation_memory": 1.0,
    "ray.use_gpu": False,
}
FROM_SCRATCH: dict[str, Any] = {
    **ARMS["control"],
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 50,
}
FINE_TUNING: dict[str, Any] = {"optimizer.warmup_steps": 20}


@dataclass
class Arguments:
    """Options of the comparison."""

    name: str
    """Name of the images, for the result file."""
    train: str
    """Shards to train on."""
    held_out: str
    """Shards to measure on."""
    models: Path
    """Folder for the autoencoder that all arms start from."""
    channels: Literal[4, 16] = 4
    """Latent channels; a cell has 4 px."""
    resolution: int = 32
    """Side of the images, which are scaled down to it."""
    steps: int = 4000
    """Steps that the autoencoder is trained for."""
    batch_size: int = 16
    """Images per step."""
    images: int = 256
    """Held-out images at most."""
    learning_rates: tuple[float, ...] = (1e-3, 5e-4)
    """Learning rates tried with the first seed."""
    seeds: int = 3
    """Seeds at each arm's best learning rate; they all start from the same autoencoder."""
    arms: tuple[
        Literal["control", "spatial", "fitted", "split", "mirror", "fitted_mirror"], ...
    ] = ()
    """Arms to run; all when empty."""


def configure(arguments: Arguments, settings: dict[str, Any], start: Path) -> Config:
    """Return the configuration of a run that starts from the autoencoder in a folder."""
    chosen = {
        "data.uri": arguments.train,
        "data.held_out_uri": arguments.held_out,
        "data.resolution": arguments.resolution,
        "training.global_batch_size": arguments.batch_size,
        "training.steps": arguments.steps,
        "start.model": f"diffusers:{start}",
        "ray.storage_uri": str(arguments.models / "runs"),
        "tracking.run_name": "fitted",  # the copy with the fitted basis
    }
    config = with_overrides(PRESETS["fine_tune"][1], SETTINGS | chosen | settings)
    return adopt_pretrained(config)


def write_random(folder: Path, channels: int) -> None:
    """Write an AutoencoderKL with cells of 4 px and 1.5 million random weights."""
    architecture: dict[str, Any] = {
        "block_out_channels": WIDTHS,
        "down_block_types": ("DownEncoderBlock2D",) * len(WIDTHS),
        "up_block_types": ("UpDecoderBlock2D",) * len(WIDTHS),
        "norm_num_groups": 8,
        "latent_channels": channels,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoencoderKL(**architecture)
    network.save_pretrained(folder)


def run(config: Config, source: Autoencoder, observer: Observer, process: Process) -> Autoencoder:
    """Train a copy of a model; return it with its averaged weights, in eval mode."""
    dataset = ShardDataset.open(config.data.uri)
    state = train(config, dataset, process, Start(source=source), observer)
    state.average.copy_to(state.model)
    return state.model.eval().requires_grad_(False)


def train_from_scratch(
    arguments: Arguments, folder: Path, images: Tensor, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train the autoencoder that all arms start from, into a folder; return what it took."""
    curve: dict[int, float] = {}

    def note(validation: dict[str, float]) -> None:
        curve[int(validation["step"])] = validation["psnr"]
        say(f"from scratch, step {validation['step']}: PSNR {validation['psnr']:.2f} dB")

    with tempfile.TemporaryDirectory() as start:
        write_random(Path(start), arguments.channels)
        interval = max(1, arguments.steps // 8)
        settings = FROM_SCRATCH | {"training.evaluation_interval": interval}
        config = configure(arguments, settings, Path(start))
        source = Autoencoder.restore(read_pretrained(config))
    began = time.process_time()
    observer = Observer(Validation(images, CPU))
    model = run(config, source, observer, Process(CPU, report=note))
    spent = time.process_time() - began
    model.save_pretrained(folder)
    return {"steps": arguments.steps, "cpu_seconds": spent, "psnr_by_step": curve}


def fine_tune(config: Config, actions: dict[str, FittedAction]) -> tuple[Autoencoder, float]:
    """Train an arm; return its model with the CPU seconds spent."""
    process = Process(CPU)
    if config.start.action == "fitted":
        config = adopt_action(config, actions[config.representation.group])
        source = load_source(config, process)
    else:
        source = Autoencoder.restore(read_pretrained(config))
    began = time.process_time()
    model = run(config, source, Observer(), process)
    return model, time.process_time() - began


def measure(model: Autoencoder, before: Autoencoder, images: Tensor) -> dict[str, Any]:
    """Measure a model on held-out images, under its own action, as jobs/evaluate.py does."""
    numbers = evaluate(model, images).numbers()
    kept = ("representation", "psnr", "ssim", "worst_gap_db", "half_scale_psnr", "gap_db")
    return {name: numbers[name] for name in kept} | {
        "encoder_error": max(numbers["encoder_error"].values()),
        "drift": measure_drift(model, before, images),
    }


def compare(arguments: Arguments, say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is missing; write and return all results."""
    name = f"{arguments.name}-{arguments.channels}"
    path, folder = RESULTS / f"fine_tuning-{name}.json", arguments.models / name
    data = DataConfig(held_out_uri=arguments.held_out, resolution=arguments.resolution)
    images = read_held_out(data, arguments.images)
    facts: dict[str, Any] = {}
    if not (folder / WEIGHTS).exists():
        facts = train_from_scratch(arguments, folder, images, say)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if results.get("weights") != digest:  # runs from another autoencoder do not count
        results = {"weights": digest, "from_scratch": facts, "arms": {}}
    results |= {
        "images": arguments.name,
        "hardware": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }

    def save() -> None:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")

    save()
    control = configure(arguments, FINE_TUNING | ARMS["control"], folder)
    before = Autoencoder.restore(read_pretrained(control))
    results["parameters"] = sum(p.numel() for p in before.parameters())
    if "before" not in results:
        results["before"] = measure(before, before, images)
        save()
        say(f"before: {describe(results['before'])}")
    train_images = read_images(control.data, control.data.uri, FITTED_IMAGES)
    kept = ("representation", "variance_by_irrep", "spatial_error", "representation_error")
    actions: dict[str, FittedAction] = {}
    results["fitted_actions"] = {}
    for arm in ("spatial", "mirror"):
        config = configure(arguments, ARMS[arm], folder)
        model = Autoencoder.restore(read_pretrained(config))
        action = fit_action(model, train_images, arguments.batch_size, invariant=3)
        group, numbers = config.representation.group, action.numbers()
        actions[group] = action
        results["fitted_actions"][group] = {key: numbers[key] for key in kept}
    fitted = {group: action.representation for group, action in actions.items()}
    arms = list_arms(arguments, fitted)

    def run_arm(arm: str, rate: float, seed: int) -> None:
        settings = {"optimizer.learning_rate": rate, "training.seed": seed}
        config = configure(arguments, FINE_TUNING | ARMS[arm] | settings, folder)
        if arm not in results["arms"]:
            steps = count_steps(arguments.steps, control, config)
            results["arms"][arm] = {"overrides": ARMS[arm], "steps": steps, "runs": []}
        entry = results["arms"][arm]
        if any(row["learning_rate"] == rate and row["seed"] == seed for row in entry["runs"]):
            return
        config = with_overrides(config, {"training.steps": entry["steps"]})
        model, spent = fine_tune(config, actions)
        row: dict[str, Any] = {"learning_rate": rate, "seed": seed, "cpu_seconds": spent}
        row |= measure(model, before, images)
        if arm == SYMMETRIZED and seed == 0:
            model.symmetrize = True
            row["symmetrized"] = measure(model, before, images)
        entry["runs"].append(row)
        save()
        say(
            f"{arm}, lr {rate:g}, seed {seed}: {entry['steps']} steps, {spent:.0f} CPU s,"
            f" {describe(row)}"
        )

    for seed in range(arguments.seeds):
        for arm in arms:
            first = seed == 0
            rates = arguments.learning_rates if first else (best_rate(results["arms"][arm]),)
            for rate in rates:
                run_arm(arm, rate, seed)
    save()
    return results


def list_arms(arguments: Arguments, fitted: dict[str, Representation]) -> list[str]:
    """Return the arms to train: not a fitted one, if what was fitted is the spatial action.

    Args:
        arguments: Options of the comparison.
        fitted: Representation that the fit finds, by group.
    """

    def repeats_spatial(arm: str) -> bool:
        found = fitted[ARMS[arm].get("representation.group", "D4")]
        return ARMS[arm]["start.action"] == "fitted" and found.multiplicities["a1"] == found.dim

    return [arm for arm in arguments.arms or ARMS if not repeats_spatial(arm)]


def best_rate(entry: dict[str, Any]) -> float:
    """Return the learning rate with the best PSNR at the first seed."""
    runs = [run for run in entry["runs"] if run["seed"] == 0]
    return max(runs, key=lambda run: run["psnr"])["learning_rate"]


def count_steps(steps: int, control: Config, config: Config) -> int:
    """Return the steps of an arm for a share of the FLOPs of `steps` from scratch."""
    return round(steps / SHARE * count_flops(control).own / count_flops(config).own)


def describe(row: dict[str, Any]) -> str:
    """Return the measures of a run in a few words."""
    return (
        f"PSNR {row['psnr']:.2f} dB, worst gap {row['worst_gap_db']:.2g} dB, encoder error"
        f" {row['encoder_error']:.2g}"
    )


def print_table(results: dict[str, Any]) -> None:
    """Print, in Markdown, mean and deviation over seeds at each arm's best learning rate."""
    for group, action in results["fitted_actions"].items():
        print(f"Over {group}, the fit finds {action['representation']}.")
    print("| trained with | lr | steps | PSNR | worst gap | encoder error | half scale | drift |")
    print("|---|---|---|---|---|---|---|---|")
    rows: dict[str, tuple[str, list[dict[str, Any]]]] = {"before": (" | ", [results["before"]])}
    for arm, entry in results["arms"].items():
        rate = best_rate(entry)
        runs = [run for run in entry["runs"] if run["learning_rate"] == rate]
        rows[arm] = (f"{rate:g} | {entry['steps']}", runs)
        averaged = [run["symmetrized"] for run in runs if "symmetrized" in run]
        if averaged:
            rows[f"{arm}, averaged over the group"] = (" | ", averaged)
    for name, (settings, runs) in rows.items():
        psnr, half = (show(runs, key, ".2f") for key in ("psnr", "half_scale_psnr"))
        gap, error, drift = (
            show(runs, key, ".2g") for key in ("worst_gap_db", "encoder_error", "drift")
        )
        print(f"| {name} | {settings} | {psnr} | {gap} | {error} | {half} | {drift} |")


def show(runs: list[dict[str, Any]], key: str, form: str) -> str:
    """Return the mean of a measure over runs, with the standard deviation if there are several."""
    values = [run[key] for run in runs]
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main() -> None:
    """Compare and print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    print_table(compare(arguments, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    main()
