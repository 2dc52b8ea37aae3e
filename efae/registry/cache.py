"""A verified copy of a model on this machine, kept by the hash of its manifest.

What was fetched once is read from the folder that EFAE_CACHE_DIR names, ~/.cache/efae by default.
A copy appears whole or not at all, only after it was read as what it claims to be, and is read
again whenever it is used; one that was damaged or exchanged meanwhile is fetched again.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from efae.model.pretrained import StoredModel, parse_model
from efae.model.stored_files import MANIFEST, CheckpointError, read_file, read_from, sha256

logger = logging.getLogger(__name__)


def find_cache() -> Path:
    """The folder of this machine's models; it need not exist."""
    return Path(os.environ.get("EFAE_CACHE_DIR") or Path.home() / ".cache" / "efae") / "models"


def fetch_model(
    uri: str, read: Callable[[str], bytes], cache: Path, manifest_digest: str | None = None
) -> tuple[Path, StoredModel]:
    """The folder of a model in the cache, and the model; downloaded if it is not there yet.

    Args:
        uri: Name of the model in messages.
        read: Function that returns a file of the model by its name.
        cache: Folder with a folder for each model.
        manifest_digest: sha256 that its manifest must have, where it is known.

    Raises:
        FileNotFoundError: there is no manifest; from `read`.
        CheckpointError: the files do not match their manifest, or that its digest, or are no model.
    """
    if manifest_digest is not None and not is_sha256(manifest_digest):
        # It comes from a server and would become a path.
        raise CheckpointError(uri, f"its tag manifest_digest is no sha256: {manifest_digest!r}")
    if manifest_digest is not None and (copy := _find_copy(uri, cache / manifest_digest)):
        return cache / manifest_digest, copy
    data = read(MANIFEST)
    if manifest_digest not in (None, sha256(data)):
        raise CheckpointError(uri, f"{MANIFEST} is not the one that was registered")
    folder = cache / sha256(data)
    if copy := _find_copy(uri, folder):
        return folder, copy
    stored = parse_model(uri, data, read)
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=cache))
    try:
        stored.write(draft)
        try:
            draft.rename(folder)
        except OSError:  # another process was faster
            if not _find_copy(uri, folder):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder, stored


def read_copy(uri: str, folder: Path) -> StoredModel:
    """The model in a folder of the cache, verified to be the one that the folder's name says.

    Raises:
        CheckpointError: it was damaged, or exchanged for another model.
    """
    read = read_from(folder)
    try:
        manifest = read_file(uri, MANIFEST, read)
        if sha256(manifest) == folder.name:
            return parse_model(uri, manifest, read)
    except CheckpointError as error:
        raise CheckpointError(uri, f"the copy in {folder} is damaged: {error.reason}") from error
    raise CheckpointError(uri, f"the copy in {folder} was exchanged for another model")


def _find_copy(uri: str, folder: Path) -> StoredModel | None:
    """The model if the cache holds it; a copy that is not what it was is removed."""
    if not folder.exists():
        return None
    try:
        return read_copy(uri, folder)
    except CheckpointError as error:
        logger.warning("%s; it is fetched again", error)
        shutil.rmtree(folder)
        return None


def is_sha256(text: str) -> bool:
    """Whether this can be what `sha256` gives."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None
