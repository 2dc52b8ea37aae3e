"""PSNR, SSIM and sharpness against sampler steps, for every sampler and both predictions.

    python -m benchmarks.compare_samplers --preset quickstart --steps 1000

Trains the preset once with each prediction, on one thread and for the same number of steps, then
decodes the same held-out latents from the same noise with every sampler and step count. Writes
benchmarks/results/samplers-PRESET.json and prints a table.
"""

import json
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from benchmarks.ablate import RESULTS, Experiment, choose_experiment, read_all, train
from efae.config.forms import with_overrides
from efae.evaluation.held_out import read_held_out
from efae.evaluation.measures import gradient_energy, psnr, ssim, to_float
from efae.model.sampler import EVALUATIONS

STEP_COUNTS = (1, 2, 4, 8, 16, 50)
IMAGES = 128


@dataclass
class Arguments(Experiment):
    """Options of the comparison."""

    steps: int = 1000
    """Training steps of each model."""


@torch.no_grad()
def measure(model: Any, images: torch.Tensor) -> dict[str, Any]:
    """Return the metrics by sampler and number of steps."""
    image = to_float(images)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    latent = model.encode(image)
    found: dict[str, Any] = {}
    for sampler in EVALUATIONS:
        for steps in STEP_COUNTS:
            sample = model.decode(latent, steps=steps, noise=noise, sampler=sampler).clamp(-1, 1)
            found.setdefault(sampler, {})[steps] = {
                "psnr": float(psnr(sample, image).mean()),
                "ssim": float(ssim(sample, image).mean()),
                "sharpness": float(gradient_energy(sample).mean() / gradient_energy(image).mean()),
            }
    return found


def main() -> None:
    """Train and measure; write and print the results."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    base = choose_experiment(arguments)
    images, held_out = read_all(base), read_held_out(base.data, IMAGES)
    results: dict[str, Any] = {
        "preset": arguments.preset,
        "training_steps": arguments.steps,
        "hardware": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "predictions": {},
    }
    print("| prediction | sampler | " + " | ".join(map(str, STEP_COUNTS)) + " |")
    print("|---|---|" + "---|" * len(STEP_COUNTS))
    for prediction in ("image", "velocity"):
        config = with_overrides(base, {"flow.prediction": prediction})
        trained, _ = train(prediction, config, images, arguments.steps)
        found = results["predictions"][prediction] = measure(trained.model, held_out)
        for sampler, rows in found.items():
            cells = [
                f"{r['psnr']:.2f}, {r['ssim']:.3f}, {r['sharpness']:.2f}" for r in rows.values()
            ]
            print(f"| {prediction} | {sampler} | " + " | ".join(cells) + " |", flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"samplers-{arguments.preset}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
