"""Our loader, as training uses it."""

from collections.abc import Callable, Iterator

from torch import Tensor

from benchmarks.loaders import Task
from data_pipelines import ShardDataset

_PIXEL_CACHE_BYTES = 20 * 2**30  # the same as the shard cache


def open_epochs(
    task: Task, labels: bool = False, keep_pixels: bool = False
) -> Callable[[], Iterator[Tensor]]:
    """Open the set with default options, except for labels and the cache of decoded images."""
    loader = ShardDataset.open(task.tars).loader(
        global_batch_size=task.batch_size * task.world_size,
        rank=task.rank,
        world_size=task.world_size,
        cache_dir=task.cache,
        pixel_cache_bytes=_PIXEL_CACHE_BYTES if keep_pixels else 0,
        **({"members": ("cls",)} if labels else {}),
    )

    def read_epoch() -> Iterator[Tensor]:
        for batch in loader:
            yield batch.image

    return read_epoch
