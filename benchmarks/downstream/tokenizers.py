"""Tokenizers of Fashion-MNIST, and their latents on disk."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablate import NARROW
from benchmarks.downstream.images import Pose
from benchmarks.downstream.study import CPU, Study
from data_pipelines import ShardDataset
from data_pipelines.building import unfinished
from data_pipelines.loading.dataset import LatentSet
from data_pipelines.shards.index import INDEX_NAME, ShardIndex, load_index, write_index
from data_pipelines.shards.latent_format import FORMAT, LatentFormat
from data_pipelines.storage import Location
from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.diffusability import interpolate_with_nearest
from efae.evaluation.measures import draw_noise, to_uint8
from efae.latents.shard_encoder import ShardEncoder, Source
from efae.model.autoencoder import Autoencoder
from efae.model.stored_files import WEIGHTS
from efae.presets import PRESETS
from efae.training.loop import train
from efae.training.process import Process

# The best width and learning rate at equal compute of a minute, and a sampler that suffices
# (benchmarks/README.md, ablate and compare_samplers).
BASE: dict[str, Any] = NARROW | {
    "optimizer.learning_rate": 8e-3,
    "flow.sampler_steps": 2,
    "ray.num_workers": 1,
}
_CERTIFIED, _BATCH_SIZE = 64, 256


def configure(images: Path, overrides: Mapping[str, Any]) -> Config:
    """Return the configuration of a tokenizer."""
    chosen = {"data.uri": str(images), "data.decode_threads": 1}
    return with_overrides(PRESETS["fashion_mnist"][1], BASE | chosen | dict(overrides))


def train_tokenizer(study: Study, pose: Pose, name: str, overrides: Mapping[str, Any]) -> Path:
    """Train a tokenizer, unless it is there; return its folder."""
    folder = study.folder / pose / "tokenizers" / name.replace(", ", "-").replace(" ", "_")
    if (folder / "finished").exists():
        return folder
    images = study.tokenizer_images(pose)
    config, dataset = configure(images, overrides), ShardDataset.open(str(images))
    kind = f"tokenizer {name}"
    steps = study.count_steps({kind: (config, dataset)}, study.settings.tokenizer_seconds)[kind]
    began = time.process_time()
    config = with_overrides(config, {"training.steps": steps})
    state = train(config, dataset, Process(CPU))
    study.say(f"{kind}: {steps} steps, {time.process_time() - began:.0f} CPU s")
    state.average.copy_to(state.model)
    state.model.save_pretrained(folder)
    (folder / "finished").touch()
    return folder


def encode_images(model: Path, images: Path, held_out: str, output: Path) -> LatentSet:
    """Encode a shard set in this process, with the encoder of jobs/encode.py.

    Args:
        model: Folder of the model.
        images: Folder of the shard set.
        held_out: Shard set for the certificate.
        output: Folder for the latents; a complete set there is kept.
    """
    if not (output / INDEX_NAME).exists():
        autoencoder, index = Autoencoder.from_pretrained(model), load_index(str(images))
        config = autoencoder.config
        source = Source(
            str(images), index, autoencoder.state_dict(), config, ("cls",), _BATCH_SIZE, "cpu"
        )
        encoder = ShardEncoder(source)
        f, (height, width) = config.model.downsampling, config.data.image_size
        form = LatentFormat(
            shape=[autoencoder.representation.dim, height // f, width // f],
            dtype="float16",
            group=autoencoder.group.name,
            multiplicities=autoencoder.representation.multiplicities,
            model_digest=hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest(),
            model_uri=str(model),
            certificate=encoder.measure(held_out, _CERTIFIED) | {"data": held_out},
        )
        records = [
            encoder.write_shard(number, Location.parse(output), form).shards[0]
            for number in range(len(index.shards))
        ]
        write_index(str(output), ShardIndex(tuple(records), None, {FORMAT: form.model_dump()}))
        unfinished.clear(Location.parse(output))
    return LatentSet(str(output), load_index(str(output)))


def select_shards(latents: LatentSet, size: int, copies: bool) -> LatentSet:
    """Select the first `size` images of the set, upright or with their other seven views."""
    shards = [s for s in latents.index.shards if copies or s.name.startswith("identity-")]
    each = len(shards[0].keys)
    shards = [s for s in shards if int(s.name.rpartition("-")[2].split(".")[0]) * each < size]
    return LatentSet(latents.uri, replace(latents.index, shards=tuple(shards)))


@torch.no_grad()
def decode_latents(
    model: Autoencoder, latents: LatentSet, count: int, between: bool = False
) -> Tensor:
    """Decode the first latents of a set to images uint8: what a perfect generator would draw.

    Args:
        model: Tokenizer.
        latents: Latents.
        count: Number of images.
        between: Whether to decode half-way to the nearest neighbours among all latents of the set.
    """
    loader = latents.loader(_BATCH_SIZE, shuffle=False, decode_threads=1)
    everything = torch.cat([batch.latent.float() for batch in loader])
    batches = (
        interpolate_with_nearest(everything, 0, count, _BATCH_SIZE)
        if between
        else (everything[:count][i : i + _BATCH_SIZE] for i in range(0, count, _BATCH_SIZE))
    )
    images, data = list[Tensor](), model.config.data
    for i, latent in enumerate(batches):
        positions = range(i * _BATCH_SIZE, i * _BATCH_SIZE + len(latent))
        noise = draw_noise(positions, (data.channels, *data.image_size), 0, 1)
        images.append(to_uint8(model.decode(latent, noise=noise)))
    return torch.cat(images)
