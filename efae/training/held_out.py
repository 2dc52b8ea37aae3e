"""Held-out images as one tensor: what previews and the evaluation look at."""

import torch
from torch import Tensor

from data_pipelines import ShardDataset
from efae.config import DataConfig


def read_held_out(data: DataConfig, count: int) -> Tensor:
    """The first `count` held-out images in the order of their shards, uint8 (n, c, h, w)."""
    dataset = ShardDataset.open(data.held_out_uri)
    loader = dataset.loader(
        global_batch_size=min(count, 256, len(dataset)),
        shuffle=False,
        channels=data.channels,
        decode_threads=data.decode_threads,
        cache_bytes=data.cache_bytes,
    )
    parts, found = [], 0
    for batch in loader:
        parts.append(batch.image)
        found += len(batch.image)
        if found >= count:
            break
    return torch.cat(parts)[:count]
