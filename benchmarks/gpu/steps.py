"""Training steps: octic and dense, eager and compiled, and the quick start against the sketch."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.models import (
    SketchStep,
    TrainingStep,
    imagenet,
    photographs,
    quickstart,
)
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.timing import count_waits, host_ms, list_kernels, median_ms, wait_for
from efae.config import Config
from efae.config.forms import with_overrides
from efae.training.monitoring.flops import Flops, count_flops, find_peak

_SKETCHES = {
    "sketch, sizes for grey images": {},
    "sketch, sizes for colour": {"hidden_size": 256, "depth": 10, "num_heads": 8},
}
_DENSE = {"model.level": "none"}


def measure(rows: Rows, batch: int) -> None:
    """Add the rows that matter most: octic and dense, eager and compiled."""
    half = {"model.num_heads": imagenet(rows.smoke).model.num_heads // 2}
    eager, compiled = {"training.compile": "none"}, {"training.compile": "blocks"}
    for name, changes in (
        ("octic, blocks compiled", compiled),
        ("dense, blocks compiled", _DENSE | compiled),
        ("octic, eager", eager),
        ("dense, eager", _DENSE | eager),
        ("octic, half the heads, blocks compiled", half | compiled),
        ("dense, half the heads, blocks compiled", half | _DENSE | compiled),
    ):
        _add(rows, "steps", name, batch, changes, kernels="half" not in name)


def measure_more(rows: Rows, batch: int) -> None:
    """Add both passes compiled as one graph, wide and shallow models, and what saves memory."""
    compiled = {"training.compile": "blocks"}
    model = imagenet(rows.smoke).model
    wide = compiled | {
        "model.hidden_size": 2 * model.hidden_size,
        "model.encoder_hidden_size": 2 * model.encoder_hidden_size,
        "model.depth": max(1, model.depth // 4),
        "model.encoder_depth": max(1, model.encoder_depth // 4),
    }
    for name, changes in (
        ("octic, both passes as one graph", {"training.compile": "step"}),
        ("octic, twice as wide, a quarter of the depth, blocks compiled", wide),
        ("dense, twice as wide, a quarter of the depth, blocks compiled", wide | _DENSE),
        ("octic, micro-batches of a half", compiled | {"training.micro_batch_size": batch // 2}),
        ("octic, micro-batches of an eighth", compiled | {"training.micro_batch_size": batch // 8}),
        ("octic, 40 % of activations kept", compiled | {"training.activation_memory": 0.4}),
        (
            "octic, eager, 40 % of activations kept",
            {"training.compile": "none", "training.activation_memory": 0.4},
        ),
        ("octic, fp16", compiled | {"training.precision": "fp16"}),
        ("octic, tf32", compiled | {"training.precision": "tf32"}),
    ):
        _add(rows, "more_steps", name, batch, changes)


def measure_unet(rows: Rows, batch: int) -> None:
    """Add steps of the convolutional preset: octic and dense, eager and compiled."""
    eager, compiled = {"training.compile": "none"}, {"training.compile": "blocks"}
    for name, changes in (
        ("octic, blocks compiled", compiled),
        ("dense, blocks compiled", _DENSE | compiled),
        ("octic, eager", eager),
    ):
        whole = {"training.micro_batch_size": 0}
        _add(rows, "unet", name, batch, whole | changes, kernels=True)


def _add(
    rows: Rows, section: str, name: str, batch: int, changes: dict[str, Any], kernels: bool = False
) -> None:
    if rows.smoke:  # a compiler takes a minute
        changes = changes | {"training.compile": "none"}
    base = photographs(rows.smoke) if section == "unet" else imagenet(rows.smoke)
    config = with_overrides(base, changes)

    def run(batch: int) -> dict[str, Any]:
        row = _measure(rows, TrainingStep(_of_batch(config, batch), rows.device), batch, kernels)
        row["compile"] = config.training.compile
        row |= _rate(config, row["images_per_s"], rows.device)
        return row

    rows.add_halving(section, name, batch, run)


_counted: dict[str, Flops] = {}


def _rate(config: Config, images_per_s: float, device: torch.device) -> dict[str, float]:
    sizes = repr(replace(config.model, num_heads=1))  # the number of heads changes no FLOPs
    if sizes not in _counted:
        _counted[sizes] = count_flops(config)
    flops, peak = _counted[sizes], find_peak(device, config.training.precision)
    found = {"gflop_per_image": flops.own / 1e9, "tflops": flops.own * images_per_s / 1e12}
    if peak:
        found["utilisation"] = flops.own * images_per_s / peak
        found["utilisation_counted_as_dense"] = flops.as_dense * images_per_s / peak
    return {name: round(value, 4) for name, value in found.items()}


def measure_quickstart(rows: Rows) -> None:
    """Add the quick start at 32 px beside the original sketch."""
    base = quickstart(rows.smoke)
    graph = {"training.compile": "step", "training.precision": "bf16"}
    ours = {
        "quickstart, fp32, eager": {"training.compile": "none"},
        "quickstart, bf16, eager": {"training.compile": "none", "training.precision": "bf16"},
        "quickstart, bf16, both passes as one graph, CUDA graphs": graph,
    }
    for batch in (4,) if rows.smoke else (64, 512):
        for name, sizes in _SKETCHES.items():
            shown = sizes | ({"depth": 1} if rows.smoke else {})

            def sketch(batch: int, sizes: dict[str, int] = shown) -> dict[str, Any]:
                return _measure(rows, SketchStep(batch, rows.device, **sizes), batch)

            rows.add_halving("quickstart", f"{name}, batch {batch}", batch, sketch)
        for name, changes in ours.items():
            if rows.smoke and changes["training.compile"] == "step":
                continue  # as above; and there is a test
            config = with_overrides(base, changes)

            def step(batch: int, config: Config = config) -> dict[str, Any]:
                run = TrainingStep(_of_batch(config, batch), rows.device)
                return _measure(rows, run, batch, kernels=True)

            rows.add_halving("quickstart", f"{name}, batch {batch}", batch, step)


def _of_batch(config: Config, batch: int) -> Config:
    return with_overrides(
        config, {"training.global_batch_size": batch, "ray.num_workers": 1, "ray.use_gpu": False}
    )


def _measure(
    rows: Rows, step: Callable[[], Any], batch: int, kernels: bool = False
) -> dict[str, Any]:
    began = time.monotonic()
    for _ in range(1 if rows.smoke else 4):  # compile, then record CUDA graphs
        step()
    wait_for(rows.device)
    row: dict[str, Any] = {"warm_up_seconds": round(time.monotonic() - began, 1)}
    if rows.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    ms = median_ms(step, rows.device, *((1, 0) if rows.smoke else (12, 1)))
    row |= {"ms": round(ms, 3), "images_per_s": round(batch / ms * 1e3, 1)}
    row["host_ms"] = round(host_ms(step, rows.device), 2)
    if rows.on_gpu:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["host_waits"] = count_waits(step)
        if kernels:
            row |= list_kernels(step)
    if isinstance(step, TrainingStep):
        row["loss_is_finite"] = bool(torch.isfinite(step.meter.sums).all())
    return row
