"""Verified copies of models on this machine, by the hash of their manifest.

They lie in the folder that EFAE_CACHE_DIR names, by default ~/.cache/efae. A copy appears whole or
not at all, after it was verified, and is verified again on every use; one that has been damaged or
replaced since is downloaded again. Processes share the folder without a lock.
"""

import errno
import logging
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from efae.model.pretrained import StoredModel, parse_model
from efae.model.stored_files import MANIFEST, CheckpointError, read_file, read_from, sha256

logger = logging.getLogger(__name__)


def find_cache() -> Path:
    """Return the folder of this machine's models; it need not exist."""
    return Path(os.environ.get("EFAE_CACHE_DIR") or Path.home() / ".cache" / "efae") / "models"


def fetch_model(
    uri: str, read: Callable[[str], bytes], cache: Path, manifest_digest: str | None = None
) -> tuple[Path | None, StoredModel]:
    """Return the cache folder of a model, and the model; download it if it is missing.

    Where the cache cannot be written, the folder is None, and a warning is logged.

    Args:
        uri: Name of the model in messages.
        read: Function that returns a file of the model by its name.
        cache: Folder with a folder for each model.
        manifest_digest: Required sha256 of its manifest, if known.

    Raises:
        FileNotFoundError: There is no manifest; raised by `read`.
        CheckpointError: The files do not match their manifest, the manifest does not match its
            digest, or they are no model.
    """
    if manifest_digest is not None and not is_sha256(manifest_digest):
        # The digest comes from a server and becomes a path below.
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
    try:
        _store(uri, stored, folder)
    except OSError as error:
        logger.warning(
            "%s is not kept, and is downloaded again next time: %s; set EFAE_CACHE_DIR to a folder"
            " that can be written",
            uri,
            error,
        )
        return None, stored
    return folder, stored


def read_copy(uri: str, folder: Path) -> StoredModel:
    """Read the model in a cache folder, and verify it against the folder's name.

    Raises:
        CheckpointError: The copy was damaged, or exchanged for another model.
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
    """Return the model if the cache holds it, unchanged and readable."""
    try:
        return read_copy(uri, folder) if folder.exists() else None
    except (CheckpointError, OSError) as error:
        logger.warning("%s; downloading it again", error)
        return None


def _store(uri: str, stored: StoredModel, folder: Path) -> None:
    """Write a model to its folder in the cache, unless another process has; replace a damaged copy.

    Raises:
        OSError: The cache cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        # A folder in it, since the scratch folder itself is closed to other users.
        draft, damaged = Path(scratch) / "draft", Path(scratch) / "damaged"
        stored.write(draft)
        while True:
            try:
                draft.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                if _find_copy(uri, folder):  # another process stored it first
                    return
                with suppress(FileNotFoundError):  # another process took it away first
                    folder.rename(damaged)
            else:
                return


def is_sha256(text: str) -> bool:
    """Return whether `text` has the form of a sha256 in hexadecimal."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None
