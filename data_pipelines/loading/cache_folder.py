"""The folder of a node's caches, of one user."""

import os
import tempfile
from pathlib import Path

from data_pipelines.storage.files import FULL_DISK
from data_pipelines.storage.retries import StorageError


def choose_cache_dir(cache_dir: str | Path | None) -> Path:
    """The given folder; for None, one of this user's in the temporary folder."""
    return Path(cache_dir or f"{tempfile.gettempdir()}/efae-shards-{os.getuid()}")


def make_cache_folder(folder: Path) -> None:
    """Make it, for this user alone.

    Raises:
        ValueError: it is there and belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ValueError(f"cache folder {folder} belongs to another user: pass cache_dir")


def explain_full_disk(error: OSError, folder: Path, size: int, setting: str) -> OSError:
    """What to do about a write that failed, where the disk is full; else the error itself.

    Args:
        error: of the write.
        folder: that of the cache.
        size: bytes that were to be written.
        setting: of the configuration, that bounds the cache.
    """
    if error.errno not in FULL_DISK:
        return error
    return StorageError(
        f"no space for {size} bytes in the cache folder {folder}: make space, choose another"
        f" (data.cache_dir), or lower {setting}"
    )
