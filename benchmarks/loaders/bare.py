"""Upper bound: decoding alone, from memory into one reused array.

simplejpeg decodes JPEG without any of our code; our codec decodes PNG.
"""

import io
import tarfile
from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg

from benchmarks.loaders import Task
from data_pipelines import storage
from data_pipelines.images.codec import decode_into


def read_members(task: Task) -> Iterator[tuple[str, bytes, int]]:
    """Yield every sample of the tars: key, image file, label."""
    for name in storage.list_files(task.tars):
        if not name.endswith(".tar"):
            continue
        content = io.BytesIO(storage.read_bytes(f"{task.tars}/{name}"))
        with tarfile.open(fileobj=content) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for member, data in members.items():
            key, _, extension = member.rpartition(".")
            if extension == task.extension:
                yield key, data, int(members[f"{key}.cls"])


def open_epochs(task: Task) -> Callable[[], Iterator[np.ndarray]]:
    """Load all images into memory; each call of the result decodes them once."""
    files = [data for _, data, _ in read_members(task)]
    images = np.zeros((task.batch_size, task.side, task.side, 3), np.uint8)

    def read_epoch() -> Iterator[np.ndarray]:
        for start in range(0, len(files), task.batch_size):
            batch = files[start : start + task.batch_size]
            for row, data in zip(images, batch, strict=False):
                if task.extension == "jpg":
                    simplejpeg.decode_jpeg(data, buffer=row)
                else:
                    decode_into(row, data)
            yield images[: len(batch)]

    return read_epoch
