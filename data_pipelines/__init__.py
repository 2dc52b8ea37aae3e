"""Images -> shards -> batches. Importing this package is cheap: torch is imported on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipelines.loading.dataset import ShardDataset
    from data_pipelines.loading.shard_cache import ShardError

__all__ = ["ShardDataset", "ShardError"]


def __getattr__(name: str) -> Any:
    if name == "ShardDataset":
        from data_pipelines.loading.dataset import ShardDataset

        return ShardDataset
    if name == "ShardError":
        from data_pipelines.loading.shard_cache import ShardError

        return ShardError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
