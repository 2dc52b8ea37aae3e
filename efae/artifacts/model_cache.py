"""A verified copy of a model on this machine, kept by the hash of its manifest.

What was fetched once is read from the folder that EFAE_CACHE_DIR names, ~/.cache/efae by default.
A copy appears whole or not at all, and one that was damaged meanwhile is fetched again.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from efae.artifacts import checkpoint
from efae.artifacts.checkpoint import MANIFEST, CheckpointError

logger = logging.getLogger(__name__)


def find_cache() -> Path:
    """The folder of this machine's models; it need not exist."""
    return Path(os.environ.get("EFAE_CACHE_DIR") or Path.home() / ".cache" / "efae") / "models"


def fetch_model(
    uri: str, read: Callable[[str], bytes], cache: Path, manifest_digest: str | None = None
) -> Path:
    """The folder of a model in the cache, downloaded and verified if it is not there yet.

    Args:
        uri: names the model in messages.
        read: gives a file of the model by its name.
        cache: folder with a folder for each model.
        manifest_digest: sha256 that its manifest must have, where it is known.

    Raises:
        CheckpointError: the files do not match their manifest, or that its digest.
    """
    if manifest_digest is not None and _is_intact(cache / manifest_digest):
        return cache / manifest_digest
    data = read(MANIFEST)
    if manifest_digest not in (None, sha256(data)):
        raise CheckpointError(uri, f"{MANIFEST} is not the one that was registered")
    folder = cache / sha256(data)
    if _is_intact(folder):
        return folder
    manifest = checkpoint.parse_manifest(uri, data)
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=cache))
    try:
        for name in checkpoint.model_files(manifest):
            content = read(name)
            checkpoint.check_file(uri, name, content, manifest)
            (draft / name).write_bytes(content)
        (draft / MANIFEST).write_bytes(data)
        try:
            draft.rename(folder)
        except OSError:  # another process was faster
            if not _is_intact(folder):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether the cache holds this model; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        checkpoint.read_model(folder)
    except CheckpointError as error:
        logger.warning("cached model is damaged and fetched again: %s", error)
        shutil.rmtree(folder)
        return False
    return True


def sha256(data: bytes) -> str:
    """The hash in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
