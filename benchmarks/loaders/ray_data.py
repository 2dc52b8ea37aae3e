"""Ray Data's WebDataset reader on a local Ray: tars over s3fs, decoded in `map_batches`."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow.fs
import ray
import s3fs

from benchmarks.loaders import Task
from benchmarks.loaders.decode import decode_pil
from data_pipelines import storage


def open_epochs(task: Task) -> Callable[[], Iterator[np.ndarray]]:
    """Start Ray with two logical CPUs, so that reading and decoding may overlap."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(s3fs.S3FileSystem()))
    names = [name for name in storage.list_files(task.tars) if name.endswith(".tar")]
    paths = [f"{task.tars}/{name}".removeprefix("s3://") for name in names]
    extension = task.extension

    def decode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"image": np.stack([decode_pil(data) for data in batch[extension]])}

    def read(some: list[str]) -> Iterator[np.ndarray]:
        images = ray.data.read_webdataset(
            some, filesystem=filesystem, decoder=None, shuffle="files"
        ).map_batches(decode, batch_size=task.batch_size)
        for batch in images.iter_batches(
            batch_size=task.batch_size, local_shuffle_buffer_size=1000
        ):
            yield batch["image"]

    next(read(paths[:1]))  # starts the workers
    return lambda: read(paths)
