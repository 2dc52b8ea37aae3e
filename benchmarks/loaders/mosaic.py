"""MosaicML Streaming: its MDS format on the same S3, and its own cache on the node.

`import streaming` imports torchvision for its own data sets. Without torchvision, which does not
load with every torch, an empty module replaces it.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.loaders import FORMATS, Task
from benchmarks.loaders.bare import read_members
from benchmarks.loaders.decode import DECODERS
from data_pipelines import storage


class _AnyName(ModuleType):
    """A module in which every name is `object`."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


if importlib.util.find_spec("torchvision") is None:
    import transformers.feature_extraction_utils  # before torchvision is replaced: it checks for it
    import transformers.tokenization_utils_base  # noqa: F401

    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        sys.modules[f"torchvision{name}"] = _AnyName(f"torchvision{name}")

from streaming import MDSWriter, StreamingDataset  # noqa: E402


def write_set(task: Task) -> None:
    """Write the samples of the tars as MDS."""
    with tempfile.TemporaryDirectory() as folder:
        with MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}) as writer:
            for _, data, label in read_members(task):
                writer.write({"image": data, "label": label})
        storage.upload_folder(folder, task.beside(FORMATS["mosaic"]))


def open_epochs(task: Task, decode: str) -> Callable[[], Iterator[np.ndarray]]:
    """Shuffle as its documentation recommends, with torch's DataLoader in this process."""
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    to_pixels = DECODERS[decode]

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            return to_pixels(super().__getitem__(at)["image"])

    images = Images(
        remote=task.beside(FORMATS["mosaic"]),
        local=task.cache,
        shuffle=True,
        batch_size=task.batch_size,
    )
    loader = DataLoader(images, task.batch_size, collate_fn=np.stack)
    return lambda: iter(loader)
