"""Arms of the comparison: ways to augment the latents of few images for the flow."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from data_pipelines.loading.batch import Batch
from data_pipelines.loading.dataset import LatentSet
from efae.symmetry import D4
from efae.symmetry.group import act_on_grid
from efae.training.loop import seed_of

TokenizerName = Literal["exact", "plain"]


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        tokenizer: Tokenizer of the latents.
        copies: Whether eight transformed copies of every image are encoded and stored.
        acted: Action on a stored latent: none; the group's action, by the loader; the same for half
            of every batch; or the flip or rotation of its grid without the action on channels,
            which treats a latent like an image.
    """

    tokenizer: TokenizerName
    copies: bool = False
    acted: Literal["", "group", "half", "grid"] = ""


ARMS: dict[str, Arm] = {
    "exact, free views": Arm("exact", acted="group"),
    "exact, free views in half of a batch": Arm("exact", acted="half"),
    "exact, as stored": Arm("exact"),
    "plain, as stored": Arm("plain"),
    "plain, eight stored copies": Arm("plain", copies=True),
    "plain, grid flips and turns": Arm("plain", acted="grid"),
}


def select_shards(latents: LatentSet, size: int, copies: bool) -> LatentSet:
    """Select the first `size` images of the set, with or without their other seven views."""
    shards = [
        shard
        for shard in latents.index.shards
        if copies or shard.name.startswith(f"{D4.identity}-")
    ]
    each = len(shards[0].keys)
    shards = [s for s in shards if int(s.name.rpartition("-")[2].split(".")[0]) * each < size]
    return LatentSet(latents.uri, replace(latents.index, shards=tuple(shards)))


def stream(
    arm: Arm, latents: LatentSet, batch_size: int, seed: int
) -> Generator[tuple[Tensor, Tensor]]:
    """Yield batches endlessly: latents float32 (b, dim, h, w), and their views' indices in D4 (b,).

    Args:
        arm: Arm that sets the augmentation.
        latents: Set from `select_shards`.
        batch_size: Latents per batch.
        seed: Seed of the order and of the views.
    """
    halves = [(batch_size, seed, arm.acted == "group")]
    if arm.acted == "half":
        rest = batch_size // 2
        halves = [(batch_size - rest, seed, False), (rest, seed + 1_000_003, True)]
    loaders = [
        cast(
            Generator[Batch],
            iter(
                latents.loader(
                    size,
                    seed=own,
                    tail="carry",
                    augment="group" if augmented else None,
                    members=("element",),
                    decode_threads=1,
                )
            ),
        )
        for size, own, augmented in halves
    ]
    step = 0
    try:
        while True:
            batches = [next(loader) for loader in loaders]
            latent = torch.cat([batch.latent.float() for batch in batches])
            # The view of a stored copy is in its member, that of an augmented latent in the batch.
            view = torch.tensor(
                [
                    D4.index(D4[element.name] @ D4[stored.decode()])
                    for batch in batches
                    for element, stored in zip(batch.element, batch.members["element"], strict=True)
                ]
            )
            if arm.acted == "grid":
                generator = torch.Generator().manual_seed(seed_of(seed, step, 1))
                view = torch.randint(len(D4), (batch_size,), generator=generator)
                latent = act_on_grid(D4, view, latent)
            yield latent, view
            step += 1
    finally:
        for loader in loaders:
            loader.close()
