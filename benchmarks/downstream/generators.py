"""Small generators: their configuration, their training, and their samples."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.downstream.images import CLASSES, tell_class
from benchmarks.downstream.study import CPU
from data_pipelines.loading.dataset import LatentSet
from efae.config import GeneratorConfig
from efae.config.forms import with_overrides
from efae.evaluation.measures import to_uint8
from efae.evaluation.samples import ImageSampler
from efae.generation.network import Generator
from efae.generation.sampling import Guidance
from efae.model.autoencoder import Autoencoder
from efae.presets import GENERATORS
from efae.symmetry import D4
from efae.training.loop import train
from efae.training.process import Process

NETWORK: dict[str, Any] = {
    "generator.hidden_size": 128,
    "generator.depth": 4,
    "data.classes": CLASSES * len(D4),
    "data.decode_threads": 1,
    "optimizer.learning_rate": 1.2e-2,
    "optimizer.ema_decay": 0.99,
    "flow.sampler_steps": 6,
    "ray.num_workers": 1,
}
_BATCH_SIZE = 250


def configure(latents: LatentSet, overrides: Mapping[str, Any]) -> GeneratorConfig:
    """Return the configuration of a generator of these latents."""
    chosen = {"data.uri": latents.uri, "data.format": latents.format.model_dump_json()}
    config = GENERATORS["generate_quickstart"][1]
    return with_overrides(config, NETWORK | chosen | dict(overrides))


def train_generator(config: GeneratorConfig, latents: LatentSet) -> tuple[Generator, float]:
    """Train; return the generator with its averaged weights, and the CPU seconds spent."""
    began = time.process_time()
    state = train(config, latents, Process(CPU))
    spent = time.process_time() - began
    state.average.copy_to(state.model)
    return state.model.eval().requires_grad_(False), spent


@torch.no_grad()
def draw_images(generator: Generator, tokenizer: Autoencoder, count: int, seed: int) -> Tensor:
    """Draw images uint8 (n, c, h, w) of all classes in turn, at the identity."""
    sampler = ImageSampler(generator, tokenizer, seed)
    guidance = Guidance.of(generator.config.flow)
    parts: list[Tensor] = []
    for first in range(0, count, _BATCH_SIZE):
        positions = range(first, min(first + _BATCH_SIZE, count))
        labels = [tell_class(i % CLASSES) for i in positions]
        parts.append(to_uint8(sampler.draw(positions, labels, guidance)))
    return torch.cat(parts)
