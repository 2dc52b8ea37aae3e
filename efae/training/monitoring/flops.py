"""FLOPs of a training step, counted without computing it, and the share of a GPU's peak."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from efae.config import AnyConfig, Config, GeneratorConfig
from efae.config.forms import with_overrides
from efae.generation.network import Generator
from efae.generation.objective import GeneratorObjective, LatentDraws
from efae.model.autoencoder import Autoencoder
from efae.model.fine_tuning import FineTuning
from efae.model.objective import BatchDraws, Draws, Objective

_TERA = 1e12
# Peak TFLOP/s by NVIDIA's data sheets and white papers, of dense products (no sparsity) that are
# summed in fp32: at bf16 or fp16, at tf32, and of fp32. By words of the device's name; the first
# that fits, so that "H100 NVL" stands before "H100".
_PEAKS: dict[str, tuple[float, float, float]] = {
    "GB200": (2500, 1250, 80),
    "B200": (2250, 1125, 75),
    "H200 NVL": (835, 418, 60),
    "H200": (989, 494, 67),
    "GH200": (989, 494, 67),
    "H100 NVL": (835, 418, 60),
    "H100 PCIe": (756, 378, 51),
    "H100": (989, 494, 67),
    "H20": (148, 74, 44),
    "A100": (312, 156, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A10": (125, 62.5, 31.2),
    "A10G": (70, 35, 35),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX 6000 Ada": (364, 182, 91.1),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "V100 PCIe": (112, 14, 14),
    "V100": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
}
_OTHERS = {"mig", "laptop", "ti", "d", "max"}
"""Words that make another card, or a part of one, of a name in the table."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward and backward for one image; a multiply-add counts as two.

    Attributes:
        own: FLOPs of matrix products and attention.
        as_dense: FLOPs of the dense network of the same sizes, which an exactly equivariant one
            stands in for.
    """

    own: float
    as_dense: float


def count_flops(config: AnyConfig) -> Flops:
    """Count the FLOPs of a training step, per image, on tensors without data; takes a second."""
    own = _count(config)
    if isinstance(config, GeneratorConfig):
        if not config.generator.equivariant:
            return Flops(own, own)
        dense = {"generator.equivariant": False, "generator.dense_blocks": 0}
        return Flops(own, _count(with_overrides(config, dense)))
    if config.model.level != "exact" or config.start.is_diffusers:
        return Flops(own, own)
    return Flops(own, _count(with_overrides(config, {"model.level": "none"})))


def _count(config: AnyConfig) -> float:
    count, mapping = 2, {torch.ops.aten.convolution_backward: _count_convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        objective, values, draws = _make_step(config, count)
        loss, _ = objective(values, draws)
        loss.sum().backward()
    return counter.get_total_flops() / count


def _make_step(config: AnyConfig, count: int) -> tuple[nn.Module, Tensor, BatchDraws]:
    """Return objective, `count` images or latents, and draws, without data."""
    if isinstance(config, GeneratorConfig):
        generator = Generator(config)
        latent = torch.zeros(count, *generator.shape, device="meta")
        label = torch.zeros(count, dtype=torch.long, device="meta")
        draws = LatentDraws(latent[:, 0, 0, 0], latent, label, label if config.data.views else None)
        return GeneratorObjective(generator).to("meta").train(), latent, draws
    quiet = {
        **{"loss.scaling_probability": 0.0, "loss.rotation_probability": 0.0},
        "representation.learned_basis": False,  # autocast, which it turns off, knows no meta device
    }
    model = Autoencoder(with_overrides(config, quiet))
    objective = (Objective(model) if model.has_flow else FineTuning(model)).to("meta").train()
    height, width = config.data.image_size
    f = config.model.downsampling
    image = torch.zeros(count, config.data.channels, height, width, device="meta")
    latent = torch.zeros(count, config.representation.dim, height // f, width // f, device="meta")
    draws = Draws(image[:, 0, 0, 0], None, None, None, latent, None, image, None)
    return objective, image, draws


def _count_convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """Count twice the forward pass; torch's own formula takes every convolution for ungrouped."""
    return 4 * grad[0] * math.prod(grad[2:]) * math.prod(weight)


def find_peak(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of a GPU by its data sheet; None if it is not in our table."""
    if device.type != "cuda":
        return None
    words = re.findall("[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    name = "" if _OTHERS.intersection(words) else f" {' '.join(words)} "
    peaks = next((peaks for part, peaks in _PEAKS.items() if f" {part.lower()} " in name), None)
    column = {"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}[precision]
    return peaks[column] * _TERA if peaks else None


class Utilization:
    """Turns images per second into FLOP/s and a share of the peak.

    Args:
        config: Configuration of the experiment.
        device: Device of training.
        world_size: Number of training processes.

    Attributes:
        unknown_card: Name of a GPU whose peak is not in our table; "" for others and for CPUs.
    """

    def __init__(self, config: AnyConfig, device: torch.device, world_size: int):
        several_shapes = isinstance(config, Config) and config.data.buckets
        self._flops = None if several_shapes else count_flops(config)
        self._world_size = world_size
        self._peak = find_peak(device, config.training.precision)
        unknown = device.type == "cuda" and self._peak is None
        self.unknown_card = torch.cuda.get_device_name(device) if unknown else ""

    def measure(self, images_per_second: float) -> dict[str, float]:
        """Return "tflops_per_second" of each process and, on a known GPU, "flop_utilization".

        "flop_utilization_as_dense" counts an exactly equivariant network as the dense one of its
        sizes. With buckets, whose images take unequal FLOPs, it returns nothing.
        """
        if self._flops is None:
            return {}
        own, as_dense = (
            flops * images_per_second / self._world_size
            for flops in (self._flops.own, self._flops.as_dense)
        )
        measured = {"tflops_per_second": own / _TERA}
        if self._peak:
            measured["flop_utilization"] = own / self._peak
            measured["flop_utilization_as_dense"] = as_dense / self._peak
        return measured
