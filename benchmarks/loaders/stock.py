"""webdataset as its documentation shows it: tars over s3fs file objects, or through its FileCache.

A cold epoch streams from S3, which is cheaper than FileCache for a first epoch; a warm one reads
the local files of FileCache.
"""

from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import numpy as np
import webdataset as wds
from webdataset.gopen import gopen_schemes

from benchmarks.loaders import DEFAULT_TARS, Task
from benchmarks.loaders.decode import decode_simplejpeg
from data_pipelines import storage

SHUFFLE = 1000


def open_s3(url: str, mode: str = "rb", bufsize: int = -1, **_: Any) -> Any:
    """Open an s3:// URL, for which webdataset has no handler, with the read-ahead of s3fs."""
    return fsspec.filesystem("s3").open(url, mode)


def open_epochs(
    task: Task, decode: str, workers: int = 0, default_tars: bool = False
) -> Callable[[], Iterator[np.ndarray]]:
    """Open the tars; an epoch reads labels, too, and drops them."""
    gopen_schemes["s3"] = open_s3
    folder = task.beside(DEFAULT_TARS) if default_tars else task.tars
    names = [name for name in storage.list_files(folder) if name.endswith(".tar")]
    urls = [f"{folder}/{name}" for name in names]
    fsspec.filesystem("s3").info(urls[0])
    samples = wds.WebDataset(
        urls,
        shardshuffle=len(urls),
        nodesplitter=wds.split_by_node,
        cache_dir=task.cache if task.warm else None,
        empty_check=False,
    ).shuffle(SHUFFLE)
    if decode == "simplejpeg":
        samples = samples.to_tuple(task.extension, "cls").map_tuple(decode_simplejpeg, int)
    else:
        samples = samples.decode(decode).to_tuple(task.extension, "cls")
    if decode == "pil":
        samples = samples.map_tuple(np.asarray, int)
    batches = samples.batched(task.batch_size)
    if workers:
        batches = wds.WebLoader(batches, batch_size=None, num_workers=workers)

    def read_epoch() -> Iterator[np.ndarray]:
        for images, _ in batches:
            yield np.asarray(images)

    return read_epoch
