"""Ablation: variants of one experiment, compared at an equal budget of CPU seconds.

    python -m benchmarks.ablate --preset fashion_mnist --cpu-seconds 100
    python -m benchmarks.ablate --preset quickstart --variants exact none --learning-rates 0.003
    python -m benchmarks.ablate --preset photographs_64 --train FOLDER/64/train \
        --held-out FOLDER/64/held_out

Every variant trains on one thread. Its cost per step, measured first, sets its number of steps, so
that compute is equal and every seed takes the same steps. Each variant runs at every learning rate
with the first seed, then at its best rate with the other seeds. Finished runs are kept in
benchmarks/results/ablation-PRESET-SECONDS.json, so an interrupted comparison resumes. Prints a
table at the end.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from benchmarks.original_sketch import OriginalSketch
from benchmarks.original_sketch import build_optimizer as build_sketch_optimizer
from data_pipelines import ShardDataset
from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.held_out import read_held_out
from efae.evaluation.measures import gradient_energy, psnr, ssim, to_float
from efae.model.closed_form import Moments, fit_linear_map, set_linear_paths
from efae.model.objective import Objective
from efae.model.representation import build_representation
from efae.presets import PRESETS
from efae.symmetry import Element, Representation
from efae.symmetry.representation import irrep_matrix
from efae.training.loop import seed_of
from efae.training.optimizer import learning_rate_at, set_learning_rate
from efae.training.state import TrainState

RESULTS = Path(__file__).parent / "results"
IMAGES = 256
NARROW = {"model.hidden_size": 96, "model.encoder_hidden_size": 64}
NARROW_UNET = {
    "model.hidden_size": 96,
    "model.encoder_hidden_size": 96,
    "model.fine_hidden_size": 32,
}
UNET = {"model.kind": "unet", "model.patch_size": 4, "model.depth": 3}
CLOSED_FORM = {"model.start": "closed_form", "model.bottleneck": "running"}
RANDOM_START = {"model.start": "random", "model.bottleneck": "rms"}
SKETCH_RATES = (1e-3, 2e-3, 4e-3)
SKETCH_STEPS = 50


class NonRepresentation(Representation):
    """The action of the sketch's README: mirrors flip signs but do not reflect the planes."""

    def matrix(self, element: Element) -> Tensor:
        """Return a matrix that violates h r h = r^-1 on the planes."""
        matrix, turn = super().matrix(element), Element(element.quarter_turns, 0)
        planes = self.blocks["e"]
        for start in range(planes.start, planes.stop, 2):
            matrix[start : start + 2, start : start + 2] = irrep_matrix("e", turn)
        return matrix


def list_variants(base: Config) -> dict[str, dict[str, Any]]:
    """Return the overrides by name; narrow is half as wide, and the sketch has its own sizes."""
    if base.model.kind == "unet":
        return _list_unet_variants()
    dim, colours = base.representation.dim, base.data.channels
    cells = (base.data.image_size[0] // base.model.downsampling) ** 2
    eighth = dim // 8

    def split(*multiplicities: int) -> dict[str, Any]:
        return {"representation.multiplicities": multiplicities}

    regular = split(eighth, eighth, eighth, eighth, 2 * eighth)
    variants: dict[str, dict[str, Any]] = {
        "exact": {},
        "exact, narrow": NARROW,
        "none": {"model.level": "none"},
        "none, narrow": {"model.level": "none"} | NARROW,
        "objective, narrow": {"model.level": "objective"} | NARROW,
        "regularized, narrow": {"model.level": "regularized"} | NARROW,
        "sketch": {},
        "objective, narrow, non-representation": {"model.level": "objective"} | NARROW,
        "exact, narrow, all invariant": NARROW | split(dim, 0, 0, 0, 0),
        "exact, narrow, no planes": NARROW | split(dim - 3 * eighth, eighth, eighth, eighth, 0),
        "exact, narrow, regular split": NARROW | regular,
        "exact, closed form": CLOSED_FORM,
        "exact, unet": UNET,
        "exact, unet, closed form": UNET | CLOSED_FORM,
        "exact, narrow, vector latent": NARROW
        | {"model.downsampling": base.data.image_size[0], "representation.dim": dim * cells},
    }
    if eighth < colours:
        del variants["exact, narrow, regular split"]
    return variants


def _list_unet_variants() -> dict[str, dict[str, Any]]:
    sizes = asdict(PRESETS["quickstart"][1].model)
    names = ("kind", "patch_size", "hidden_size", "depth", "encoder_hidden_size", "encoder_depth")
    transformer = {f"model.{name}": sizes[name] for name in names}
    dense = {"model.level": "none"} | NARROW_UNET
    small = {"representation.dim": 16}
    return {
        "exact": {},
        "none, narrow": dense,
        "exact, random start": RANDOM_START,
        "exact, transformer": transformer,
        "exact, transformer, random start": transformer | RANDOM_START,
        "exact, 16 channels": small,
        "none, narrow, 16 channels": dense | small,
        "exact, transformer, 16 channels": transformer | small,
        "exact, attention": {"model.attention_depth": 1},
        "exact, patch 2": {"model.patch_size": 2},
    }


@dataclass
class Experiment:
    """Preset and shards."""

    preset: str = "quickstart"
    """Experiment to start from."""
    train: str = ""
    """Shards to train on; the preset's by default."""
    held_out: str = ""
    """Shards to measure on; the preset's by default."""


def choose_experiment(chosen: Experiment) -> Config:
    """Return the preset with the chosen shards, for one process."""
    overrides: dict[str, Any] = {"ray.num_workers": 1}
    if chosen.train:
        overrides["data.uri"] = chosen.train
    if chosen.held_out:
        overrides["data.held_out_uri"] = chosen.held_out
    return with_overrides(PRESETS[chosen.preset][1], overrides)


@dataclass
class Arguments(Experiment):
    """Options of the comparison."""

    cpu_seconds: float = 100.0
    """Training budget of each run."""
    variants: tuple[str, ...] = ()
    """Variants to run; all when empty."""
    learning_rates: tuple[float, ...] = (3e-3, 6e-3)
    """Learning rates tried with the first seed."""
    seeds: int = 3
    """Number of seeds at the best learning rate."""


class Trained:
    """A variant's model, objective and optimizer."""

    def __init__(self, name: str, config: Config):
        self.name, self.config = name, config
        self.average = None
        if name == "sketch":
            torch.manual_seed(config.training.seed)
            self.model: Any = OriginalSketch(config.data.channels, config.data.image_size[0])
            self.objective: nn.Module = self.model
            self.optimizer: torch.optim.Optimizer = build_sketch_optimizer(
                self.model, config.optimizer.learning_rate
            )
            return
        state = TrainState.create(config, torch.device("cpu"))
        self.model, self.optimizer, self.average = state.model, state.optimizer, state.average
        self.objective = Objective(self.model)
        if name.endswith("non-representation"):
            rho = self.model.representation
            self.model.representation = NonRepresentation(rho.group, **rho.multiplicities)

    def update(self, image: Tensor, step: int, generator: torch.Generator) -> None:
        """Take one step on a batch in [-1, 1]."""
        config = self.config
        generator.manual_seed(seed_of(config.training.seed, step, 0))
        loss, _ = self.objective(image, generator)
        loss.mean().backward()
        if self.average is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.max_grad_norm)
            rate = learning_rate_at(step, config.training.steps, config.optimizer)
            set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, step)

    def decode(self, latent: Tensor, steps: int, noise: Tensor) -> Tensor:
        """Sample an image, clamped to [-1, 1]."""
        return self.model.decode(latent, steps=steps, noise=noise).clamp(-1, 1)


def train(name: str, config: Config, images: Tensor, steps: int) -> tuple[Trained, float]:
    """Train a variant; return it with the CPU seconds spent."""
    trained = Trained(name, with_overrides(config, {"training.steps": steps}))
    trained.model.train()
    if config.model.has_linear_start:
        moments = Moments.of(images, config.model.downsampling)
        rho = trained.model.representation
        set_linear_paths(trained.model, fit_linear_map(moments, rho, config.model.downsampling))
        trained.average.load(dict(trained.model.named_parameters()))
    batch = config.training.global_batch_size
    generator, shuffle = torch.Generator(), torch.Generator().manual_seed(config.training.seed)
    started, order = time.process_time(), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=shuffle)
        chosen, order = order[:batch], order[batch:]
        trained.update(to_float(images[chosen]), step, generator)
    spent = time.process_time() - started
    if trained.average is not None:
        trained.average.copy_to(trained.model)
    trained.model.eval()
    return trained, spent


def measure_cost(name: str, config: Config, images: Tensor) -> float:
    """Return the CPU seconds of one step: the minimum of five, as other programs interfere."""
    train(name, config, images, 10)  # the first steps of a process are slower
    return min(train(name, config, images, 15)[1] for _ in range(5)) / 15


@torch.no_grad()
def measure(trained: Trained, images: Tensor) -> dict[str, Any]:
    """Measure the averaged weights on held-out images and on their two halves by symmetry."""
    image = to_float(images)
    usual = SKETCH_STEPS if trained.name == "sketch" else trained.config.flow.default_steps
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    asymmetry = (image - image.flip(-1)).square().mean((1, 2, 3)) / image.var((1, 2, 3))
    symmetric = asymmetry <= asymmetry.median()
    latent = trained.model.encode(image)
    row: dict[str, Any] = {"sampler_steps": usual, "psnr": {}, "ssim": {}, "sharpness": {}}
    for steps in (1, 2, usual):
        sample = trained.decode(latent, steps, noise)
        scores = psnr(sample, image)
        row["psnr"][steps] = float(scores.mean())
        row["ssim"][steps] = float(ssim(sample, image).mean())
        row["sharpness"][steps] = float(
            gradient_energy(sample).mean() / gradient_energy(image).mean()
        )
        if steps == usual:
            row["psnr_symmetric_half"] = float(scores[symmetric].mean())
            row["psnr_asymmetric_half"] = float(scores[~symmetric].mean())
    few = slice(0, 64)
    base = psnr(trained.decode(latent[few], 4, noise[few]), image[few]).mean()
    gaps: list[float] = []
    for g in trained.model.group:
        acted = trained.decode(trained.model.act(g, latent[few]), 4, g.act_on_image(noise[few]))
        gaps.append(abs(float(base - psnr(acted, g.act_on_image(image[few])).mean())))
    row["worst_gap_db"] = max(gaps)
    return row


def measure_linear_map(config: Config, images: Tensor, held_out: Tensor) -> float:
    """Return the PSNR of the best equivariant linear map to a latent of this size and back."""
    side, rho = config.model.downsampling, build_representation(config)
    fitted = fit_linear_map(Moments.of(images, side), rho, side)
    linear = fitted.reconstruct(to_float(held_out), side).clamp(-1, 1)
    return float(psnr(linear, to_float(held_out)).mean())


def compare(arguments: Arguments, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the missing variants; return all results."""
    base = choose_experiment(arguments)
    variants = list_variants(base)
    path = RESULTS / f"ablation-{arguments.preset}-{arguments.cpu_seconds:.0f}.json"
    results = json.loads(path.read_text()) if path.exists() else {"variants": {}}
    results |= {
        "preset": arguments.preset,
        "cpu_seconds": arguments.cpu_seconds,
        "hardware": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    images, held_out = read_all(base), read_held_out(base.data, IMAGES)
    results["linear_map_psnr"] = measure_linear_map(base, images, held_out)

    def run(name: str, rate: float, seed: int) -> None:
        entry = results["variants"].setdefault(name, {"overrides": variants[name], "runs": []})
        if any(r["learning_rate"] == rate and r["seed"] == seed for r in entry["runs"]):
            return
        config = with_overrides(
            base,
            variants[name] | {"optimizer.learning_rate": rate, "training.seed": seed},
        )
        if "representation.dim" in variants[name]:
            entry["linear_map_psnr"] = measure_linear_map(config, images, held_out)
        if "seconds_per_step" not in entry:
            entry["seconds_per_step"] = measure_cost(name, config, images)
        steps = round(arguments.cpu_seconds / entry["seconds_per_step"])
        trained, spent = train(name, config, images, steps)
        entry["parameters"] = sum(p.numel() for p in trained.model.parameters())
        entry["steps"] = steps
        entry["images_seen"] = steps * config.training.global_batch_size
        row = measure(trained, held_out)
        entry["runs"].append({"learning_rate": rate, "seed": seed, "cpu_seconds": spent} | row)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        say(
            f"{name}, lr {rate:g}, seed {seed}: {steps} steps, {spent:.0f} CPU s, PSNR"
            f" {score(row):.2f} dB"
        )

    chosen = arguments.variants or tuple(variants)
    for name in chosen:
        rates = SKETCH_RATES if name == "sketch" else arguments.learning_rates
        for rate in rates:
            run(name, rate, 0)
    for seed in range(1, arguments.seeds):
        for name in chosen:
            run(name, best_rate(results, name), seed)
    return results


def read_all(config: Config) -> Tensor:
    """Read the training images into memory, uint8 (n, c, h, w)."""
    dataset = ShardDataset.open(config.data.uri)
    loader = dataset.loader(
        global_batch_size=256, shuffle=False, channels=config.data.channels, decode_threads=1
    )
    return torch.cat([batch.image for batch in loader])


def score(run: dict[str, Any]) -> float:
    """Return the PSNR at the usual sampler steps; JSON turns the keys into strings."""
    return {int(steps): value for steps, value in run["psnr"].items()}[run["sampler_steps"]]


def best_rate(results: dict[str, Any], name: str) -> float:
    """Return the learning rate with the best PSNR at the first seed."""
    runs = [run for run in results["variants"][name]["runs"] if run["seed"] == 0]
    return max(runs, key=score)["learning_rate"]


def print_table(results: dict[str, Any]) -> None:
    """Print, in Markdown, mean and deviation over seeds at each variant's best learning rate."""
    print(f"Best equivariant linear map, without training: {results['linear_map_psnr']:.2f} dB")
    print("| variant | lr | parameters | images | PSNR dB | least / most symmetric half | gap dB |")
    print("|---|---|---|---|---|---|---|")
    for name, entry in results["variants"].items():
        if not entry["runs"]:  # only its cost has been measured
            continue
        rate = best_rate(results, name)
        runs = [run for run in entry["runs"] if run["learning_rate"] == rate]
        scores = [score(run) for run in runs]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        halves = [
            statistics.mean(run[f"psnr_{half}_half"] for run in runs)
            for half in ("asymmetric", "symmetric")
        ]
        gap = max(run["worst_gap_db"] for run in runs)
        print(
            f"| {name} | {rate:g} | {entry['parameters']:,} | {entry['images_seen']:,} |"
            f" {statistics.mean(scores):.2f}{spread} ({len(scores)}) |"
            f" {halves[0]:.2f} / {halves[1]:.2f} | {gap:.1g} |"
        )


def main() -> None:
    """Compare and print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    print_table(compare(arguments, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    main()
