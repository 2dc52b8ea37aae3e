"""Images as one tensor, for validation, evaluation and fits."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from data_pipelines import ShardDataset
from efae.config import DataConfig


def read_held_out(data: DataConfig, count: int) -> UInt8[Tensor, "n c h w"]:
    """Read the first `count` held-out images in shard order; see `read_images`."""
    return read_images(data, data.held_out_uri, count)


def read_images(data: DataConfig, uri: str, count: int) -> UInt8[Tensor, "n c h w"]:
    """Read the first `count` images of a set in shard order, or all if there are fewer.

    All have the size `data.resolution`, whatever the buckets of training.

    Returns:
        Images, uint8 in [0, 255].

    Raises:
        ValueError: The URI is refused, or the set is empty.
        ShardError: A shard or an image in it cannot be read.
        StorageError: The storage refuses or does not answer.
    """
    dataset = ShardDataset.open(uri)
    loader = dataset.loader(
        global_batch_size=min(count, 256, len(dataset)),
        options=data,
        shuffle=False,
        buckets=(),
        crop="center",
        pixel_cache_bytes=0,
        bad_samples="fail",
    )
    parts: list[Tensor] = []
    found = 0
    for batch in loader:
        parts.append(batch.image)
        found += len(batch.image)
        if found >= count:
            break
    return torch.cat(parts)[:count]
