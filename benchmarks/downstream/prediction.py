"""Does the report card predict the generator? Rank correlations over tokenizers of many kinds."""

from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.ablate import NARROW_UNET
from benchmarks.downstream import generators
from benchmarks.downstream.generators import draw_images, train_generator
from benchmarks.downstream.study import Study
from benchmarks.downstream.tokenizers import decode_latents, encode_images, train_tokenizer
from efae.config import DataConfig
from efae.config.forms import with_overrides
from efae.evaluation.evaluate import evaluate
from efae.evaluation.held_out import read_held_out
from efae.model.autoencoder import Autoencoder

GRID: dict[str, Any] = {
    "model.downsampling": 4,
    "model.patch_size": 4,
    "model.encoder_depth": 1,
    "model.depth": 2,
    "training.global_batch_size": 32,
    "representation.dim": 8,
}
"""Latents of 8 x 8 cells, so that the numbers have frequencies and distances to measure."""
NONE: dict[str, Any] = {"model.level": "none"}
RUNNING: dict[str, Any] = {"model.bottleneck": "running"}
UNET: dict[str, Any] = (
    NARROW_UNET
    | RUNNING
    | {"model.kind": "unet", "model.start": "closed_form", "model.patch_size": 2, "model.depth": 1}
)


def _scaled(probability: float) -> dict[str, Any]:
    return {"loss.scaling_probability": probability}


def _noisy(deviation: float) -> dict[str, Any]:
    return {"model.latent_noise": deviation}


TOKENIZERS: dict[str, dict[str, Any]] = {
    "exact": {},
    "none": NONE,
    "exact, scale term 0.25": _scaled(0.25),
    "exact, scale term 0.5": _scaled(0.5),
    "objective": {"model.level": "objective"},
    "regularized": {"model.level": "regularized"},
    "exact, noise 0.2": _noisy(0.2),
    "none, noise 0.2": NONE | _noisy(0.2),
    "exact, KL 1e-3": {"model.bottleneck": "kl", "loss.kl_weight": 1e-3},
    "exact, all invariant": {"representation.multiplicities": (8, 0, 0, 0, 0)},
    "exact, unet": UNET,
    "none, unet": NONE | UNET,
    "exact, 4 channels": {"representation.dim": 4},
    "none, 4 channels": NONE | {"representation.dim": 4},
    "exact, 16 channels": {"representation.dim": 16},
    "none, scale term 0.25": NONE | _scaled(0.25),
}
PREDICTORS = (
    "velocity_irreducible_variance",
    "spectral_energy_concentration",
    "local_distant_similarity",
    "spectral_slope_gap",
    "interpolated_fid",
    "encoder_error",
    "psnr",
    "fid_of_decodes",
)
_RESAMPLED = 2000


def compare(study: Study) -> dict[str, Any]:
    """Run what is missing; return all results."""
    held_out = study.held_out("upright").uri
    data = DataConfig(held_out_uri=held_out, channels=1)
    images = read_held_out(data, study.settings.evaluated)
    for name, overrides in TOKENIZERS.items():
        if study.has(tokenizer=name):
            continue
        folder = train_tokenizer(study, "upright", name, GRID | overrides)
        tokenizer = Autoencoder.from_pretrained(folder)
        latents = encode_images(
            folder,
            study.generator_images("upright", 0),
            held_out,
            study.folder / "upright" / "latents" / folder.name,
        )
        config = generators.configure(latents, {"generator.patch_size": 2})
        kind = f"generator of {latents.format.shape[0]} channels"
        steps = study.count_steps({kind: (config, latents)}, study.settings.generator_seconds)[kind]
        generator, spent = train_generator(
            with_overrides(config, {"training.steps": steps}), latents
        )
        numbers, judge = evaluate(tokenizer, images).numbers(), study.judge("upright")
        count = study.settings.samples
        row: dict[str, Any] = {
            "tokenizer": name,
            "overrides": overrides,
            "shape": latents.format.shape,
            "steps": steps,
            "cpu_seconds": spent,
            **{key: numbers[key] for key in ("representation", "psnr", "half_scale_psnr")},
            **numbers["diffusability"],
            "encoder_error": max(numbers["encoder_error"].values()),
            "largest_difference": latents.certificate["max_abs_difference"],
            "worst_gap_db": numbers["worst_gap_db"],
            "interpolated_fid": judge.measure_fid(
                decode_latents(tokenizer, latents, count, between=True)
            ),
            "fid_of_decodes": judge.measure_fid(decode_latents(tokenizer, latents, count)),
            **judge.measure(draw_images(generator, tokenizer, count, 0)),
        }
        study.add(row)
        study.say(f"{name}: PSNR {row['psnr']:.2f} dB, FID {row['fid']:.1f}")
    return study.results


def correlate(
    runs: list[dict[str, Any]], predictor: str, excess: bool
) -> tuple[float, float, float, float]:
    """Return Spearman's rank correlation with FID, its 95 % bootstrap interval, and its p-value.

    Args:
        runs: Results by tokenizer.
        predictor: Name of the number.
        excess: Whether to subtract the FID of decoded training latents.
    """
    spearman: Any = import_module("scipy.stats").spearmanr
    x = np.array([run[predictor] for run in runs])
    y = np.array([run["fid"] - excess * run["fid_of_decodes"] for run in runs])
    rng, found = np.random.default_rng(0), list[float]()
    for _ in range(_RESAMPLED):
        chosen = rng.integers(0, len(x), len(x))
        if len(set(x[chosen])) > 1 < len(set(y[chosen])):
            found.append(float(spearman(x[chosen], y[chosen]).statistic))
    low, high = np.quantile(found, (0.025, 0.975))
    whole = spearman(x, y)
    return float(whole.statistic), float(low), float(high), float(whole.pvalue)


def print_tables(results: dict[str, Any]) -> None:
    """Print, in Markdown, the measures of each tokenizer, and the correlations."""
    runs = results["runs"]
    print("| tokenizer | PSNR | VIV | SEC | LDS | slope gap | encoder error | decodes | FID |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run in sorted(runs, key=lambda run: run["fid"]):
        numbers = " | ".join(f"{run[name]:.3f}" for name in PREDICTORS[:4])
        print(
            f"| {run['tokenizer']} | {run['psnr']:.2f} | {numbers} | {run['encoder_error']:.2g} |"
            f" {run['fid_of_decodes']:.1f} | {run['fid']:.1f} |"
        )
    alike = [run for run in runs if run["shape"] == [8, 8, 8]]
    for title, chosen in (("all", runs), ("of 8 channels", alike)):
        if len(chosen) < 4:
            continue
        print(f"\n| {title}, n = {len(chosen)} | FID | p | FID less that of decodes | p |")
        print("|---|---|---|---|---|")
        for name in PREDICTORS:
            cells = [
                f"{r:+.2f} ({low:+.2f} to {high:+.2f}) | {p:.2g}"
                for r, low, high, p in (correlate(chosen, name, excess) for excess in (False, True))
            ]
            print(f"| {name} | {' | '.join(cells)} |")
