"""The folder of one user's caches on a node."""

import os
import tempfile
from pathlib import Path

from data_pipelines.storage.files import FULL_DISK
from data_pipelines.storage.retries import StorageError


def choose_cache_dir(cache_dir: str | Path | None) -> Path:
    """Return the given folder; for None, this user's own in the temporary folder."""
    return Path(cache_dir or f"{tempfile.gettempdir()}/efae-shards-{os.getuid()}")


def make_cache_folder(folder: Path) -> None:
    """Create the folder, for this user alone.

    Raises:
        ValueError: The folder belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ValueError(f"cache folder {folder} belongs to another user: pass cache_dir")


def explain_full_disk(error: OSError, folder: Path, size: int, setting: str) -> OSError:
    """Return an error with a remedy if a write failed because the disk is full; else the error.

    Args:
        error: Error of the write.
        folder: Folder of the cache.
        size: Number of bytes to write.
        setting: Setting in the configuration that bounds the cache.
    """
    if error.errno not in FULL_DISK:
        return error
    return StorageError(
        f"no space for {size} bytes in the cache folder {folder}: make space, choose another"
        f" (data.cache_dir), or lower {setting}"
    )
