"""The two tokenizers, trained for the same time, and their latents on disk."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablate import NARROW
from benchmarks.downstream.arms import TokenizerName
from benchmarks.downstream.settings import Settings
from data_pipelines import ShardDataset
from data_pipelines.building import unfinished
from data_pipelines.loading.dataset import LatentSet
from data_pipelines.shards.index import INDEX_NAME, ShardIndex, load_index, write_index
from data_pipelines.shards.latent_format import FORMAT, LatentFormat
from data_pipelines.storage import Location
from efae.config_forms import with_overrides
from efae.evaluation.measures import to_float
from efae.latents.shard_encoder import ShardEncoder, Source
from efae.model.autoencoder import Autoencoder
from efae.model.stored_files import WEIGHTS
from efae.presets import PRESETS
from efae.symmetry import D4
from efae.training.loop import train
from efae.training.process import Process

# The best widths and learning rate at equal compute of a minute or two (benchmarks/README.md), and
# the cost of a step with them on an idle core (results/ablation-fashion_mnist-60).
LEVELS: dict[TokenizerName, str] = {"exact": "exact", "plain": "none"}
SECONDS_PER_STEP: dict[TokenizerName, float] = {"exact": 0.072, "plain": 0.080}
LEARNING_RATE = 1.2e-2
CERTIFICATE_IMAGES = 64
_AT_ONCE = 256


def train_tokenizer(
    name: TokenizerName,
    images: Path,
    folder: Path,
    settings: Settings,
    seed: int,
    say: Callable[[str], None],
) -> Autoencoder:
    """Train on a shard set like the workers of jobs/train.py, or load the trained tokenizer."""
    if not (folder / "finished").exists():
        steps = round(settings.tokenizer_seconds / SECONDS_PER_STEP[name])
        config = with_overrides(
            PRESETS["fashion_mnist"][1],
            NARROW
            | {
                "model.level": LEVELS[name],
                "data.uri": str(images),
                "data.decode_threads": 1,
                "optimizer.learning_rate": LEARNING_RATE,
                "training.steps": steps,
                "training.seed": seed,
                "training.global_batch_size": settings.batch_size,
                "ray.num_workers": 1,
            },
        )
        started = time.process_time()
        state = train(config, ShardDataset.open(str(images)), Process(torch.device("cpu")))
        say(f"tokenizer {name}: {steps} steps, {time.process_time() - started:.0f} CPU s")
        state.average.copy_to(state.model)
        state.model.save_pretrained(folder)
        (folder / "finished").touch()
    return Autoencoder.from_pretrained(folder)


def encode_images(
    model: Autoencoder, model_folder: Path, images: Path, held_out: Path, output: Path, views: bool
) -> LatentSet:
    """Encode a shard set of `images.write_images` in this process, with the encoder of the job.

    Args:
        model: Model from `train_tokenizer`.
        model_folder: Folder of the model.
        images: Folder of the shard set.
        held_out: Folder of the shard set for the certificate.
        output: Folder for the latents; a complete set there is kept.
        views: Whether to encode all eight views instead of the identity's only.
    """
    if (output / INDEX_NAME).exists():
        return LatentSet(str(output), load_index(str(output)))
    index = load_index(str(images))
    shards = tuple(s for s in index.shards if views or s.name.startswith(f"{D4.identity}-"))
    source = Source(
        str(images),
        replace(index, shards=shards),
        model.state_dict(),
        model.config,
        ("element",),
        64,
        "cpu",
    )
    encoder = ShardEncoder(source)
    f, (height, width) = model.config.model.downsampling, model.config.data.image_size
    form = LatentFormat(
        shape=[model.representation.dim, height // f, width // f],
        dtype="float16",
        group=model.group.name,
        multiplicities=model.representation.multiplicities,
        model_digest=hashlib.sha256((model_folder / WEIGHTS).read_bytes()).hexdigest(),
        model_uri=str(model_folder),
        certificate={
            **encoder.measure(str(held_out), CERTIFICATE_IMAGES),
            "data": str(held_out),
        },
    )
    records = [
        encoder.write_shard(number, Location.parse(output), form).shards[0]
        for number in range(len(shards))
    ]
    write_index(str(output), ShardIndex(tuple(records), None, {FORMAT: form.model_dump()}))
    unfinished.clear(Location.parse(output))
    return LatentSet(str(output), load_index(str(output)))


@torch.no_grad()
def encode(model: Autoencoder, images: Tensor) -> Tensor:
    """Encode uint8 images in memory."""
    return torch.cat([model.encode(to_float(part)) for part in images.split(_AT_ONCE)])


def decode(model: Autoencoder, latent: Tensor) -> Tensor:
    """Decode latents to uint8 images with fixed noise."""
    parts: list[Tensor] = []
    for number, part in enumerate(latent.split(_AT_ONCE)):
        image = model.decode(part, seed=number).clamp(-1, 1)
        parts.append(((image + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)
