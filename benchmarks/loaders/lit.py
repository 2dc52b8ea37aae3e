"""litdata: its own format on the same S3, and its own cache on the node."""

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize
from litdata.streaming import downloader

from benchmarks.loaders import FORMATS, Task
from benchmarks.loaders.bare import read_members
from benchmarks.loaders.decode import DECODERS
from data_pipelines import storage


def _pack(sample: tuple[str, bytes, int]) -> dict[str, Any]:
    return {"image": sample[1], "label": sample[2]}


def write_set(task: Task) -> None:
    """Write the samples of the tars, in chunks of the size that litdata's documentation uses."""
    with tempfile.TemporaryDirectory() as folder:
        optimize(
            _pack,
            list(read_members(task)),
            folder,
            chunk_bytes="64MB",
            num_workers=1,
            verbose=False,
        )
        storage.upload_folder(folder, task.beside(FORMATS["lit"]))


def open_epochs(task: Task, decode: str) -> Callable[[], Iterator[np.ndarray]]:
    """Shuffle as its documentation recommends; decode while collating a batch."""
    if task.world_size > 1:  # litdata gets its rank from torch.distributed
        torch.distributed.init_process_group("gloo")
    # Its S3 client refuses http, and no public option changes that.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # pyright: ignore[reportPrivateUsage]
    to_pixels = DECODERS[decode]
    images = StreamingDataset(
        task.beside(FORMATS["lit"]),
        cache_dir=task.cache,
        shuffle=True,
        drop_last=False,
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
    )
    loader = StreamingDataLoader(
        images,
        batch_size=task.batch_size,
        collate_fn=lambda samples: np.stack([to_pixels(sample["image"]) for sample in samples]),
    )
    return lambda: iter(loader)
