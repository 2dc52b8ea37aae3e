"""A verified copy of a model on this machine, kept by the hash of its manifest.

What was fetched once is read from the folder that EFAE_CACHE_DIR names, ~/.cache/efae by default.
A copy appears whole or not at all, only after it was read as what it claims to be, and is read
again whenever it is used; one that was damaged or exchanged meanwhile is fetched again.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from efae.checkpoints import checkpoint
from efae.checkpoints.checkpoint import MANIFEST, CheckpointError

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
        CheckpointError: the files do not match their manifest, or that its digest, or are no model.
    """
    if manifest_digest is not None and not is_sha256(manifest_digest):
        # It comes from a server and would become a path.
        raise CheckpointError(uri, f"its tag manifest_digest is no sha256: {manifest_digest!r}")
    if manifest_digest is not None and _is_intact(uri, cache / manifest_digest):
        return cache / manifest_digest
    data = read(MANIFEST)
    if manifest_digest not in (None, sha256(data)):
        raise CheckpointError(uri, f"{MANIFEST} is not the one that was registered")
    folder = cache / sha256(data)
    if _is_intact(uri, folder):
        return folder
    manifest = checkpoint.parse_manifest(uri, data)
    contents = {name: read(name) for name in checkpoint.model_files(manifest)}
    checkpoint.parse_model(uri, manifest, contents)
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=cache))
    try:
        for name, content in {**contents, MANIFEST: data}.items():
            (draft / name).write_bytes(content)
        try:
            draft.rename(folder)
        except OSError:  # another process was faster
            if not _is_intact(uri, folder):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def check_copy(uri: str, folder: Path) -> None:
    """Reads a folder of the cache as the model that its name says.

    Raises:
        CheckpointError: it was damaged, or exchanged for another model.
    """
    try:
        checkpoint.read_model(folder)
    except CheckpointError as error:
        raise CheckpointError(uri, f"the copy in {folder} is damaged: {error.reason}") from error
    if sha256((folder / MANIFEST).read_bytes()) != folder.name:
        raise CheckpointError(uri, f"the copy in {folder} was exchanged for another model")


def _is_intact(uri: str, folder: Path) -> bool:
    """Whether the cache holds this model; one that is not what it was is removed."""
    if not folder.exists():
        return False
    try:
        check_copy(uri, folder)
    except CheckpointError as error:
        logger.warning("%s; it is fetched again", error)
        shutil.rmtree(folder)
        return False
    return True


def sha256(data: bytes) -> str:
    """The hash in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def is_sha256(text: str) -> bool:
    """Whether this can be what `sha256` gives."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None
