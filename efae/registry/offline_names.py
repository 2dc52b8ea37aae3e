"""The models that URIs resolved to, stored so that EFAE_OFFLINE=1 works without a server.

Each answer is one small file in the folder `refs` of the cache, named by a hash of server and URI
and replaced atomically, so concurrent pulls need no lock. Answers of different servers for the same
name are kept apart. Passwords are not written.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipelines import storage
from efae.model.stored_files import sha256
from efae.registry.cache import is_sha256
from efae.tracking.redaction import redact

logger = logging.getLogger(__name__)

_SHOWN = 8


@dataclass(frozen=True)
class PulledName:
    """The answer of a server: the model that a URI named.

    Attributes:
        uri: Normalized URI.
        server: Tracking server or storage endpoint that answered; "" if the URI names it.
        manifest_digest: Digest of the model's manifest, the name of its folder in the cache.
    """

    uri: str
    server: str
    manifest_digest: str

    def __str__(self) -> str:
        return f"{self.uri} of {self.server}" if self.server else self.uri


def is_offline() -> bool:
    """Return whether EFAE_OFFLINE is set, to anything but 0."""
    return os.environ.get("EFAE_OFFLINE", "") not in ("", "0")


def remember(cache: Path, server: str, uris: Iterable[str], manifest_digest: str) -> None:
    """Store what `uris` name now; log a warning if the cache is not writable."""
    shown = _show(server)
    for name in (PulledName(redact(uri), shown, manifest_digest) for uri in uris):
        text = json.dumps(asdict(name))
        path = _folder(cache) / f"{sha256(str(name).encode())}.json"
        try:
            if not (path.exists() and path.read_text() == text):
                storage.write_bytes(str(path), text.encode())
        except OSError as error:  # a cache that came with an image may be read-only
            logger.warning("%s cannot be used offline later: %s", name, error)


def recall(cache: Path, server: str, uri: str) -> Path:
    """Return the folder of the model that `uri` named when it was last pulled from `server`.

    Args:
        cache: Cache, as from `find_cache`.
        server: Tracking server or storage endpoint; it is not contacted.
        uri: Normalized URI.

    Raises:
        ValueError: The URI was not pulled before, and the message lists what was; or it names
            several models.
    """
    found = _find(cache, server, uri)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{uri} names {len(found)} models in {cache}: write more of its digits")
    asked = PulledName(redact(uri), _show(server), "")
    names = _read_names(cache)
    held = [str(name) for name in names[:_SHOWN]]
    held += [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    raise ValueError(
        f"EFAE_OFFLINE is set, and {asked} was not pulled before; {cache} holds"
        f" {', '.join(held) or 'nothing'}: pull it once without EFAE_OFFLINE, or set what names"
        " the cache and the server (EFAE_CACHE_DIR, MLFLOW_TRACKING_URI, AWS_ENDPOINT_URL) as it"
        " was then"
    )


def mention_copy(cache: Path, server: str, uri: str) -> str:
    """Return text for an error about an unreachable server: that there is a copy, or ""."""
    if not _find(cache, server, uri):
        return ""
    return f"; a copy pulled before is in {cache}: EFAE_OFFLINE=1 uses it"


def _find(cache: Path, server: str, uri: str) -> list[Path]:
    """Return folders of the models that were pulled under this name."""
    asked, server = redact(uri), _show(server)
    is_digest = uri.startswith("models:") and "@sha256:" in uri  # its first digits suffice
    digests = {
        name.manifest_digest
        for name in _read_names(cache)
        if name.server == server
        and (name.uri == asked or (is_digest and name.uri.startswith(asked)))
    }
    return [cache / digest for digest in sorted(digests)]


def _read_names(cache: Path) -> list[PulledName]:
    """Return the names whose model is still in the cache, newest first."""
    paths = _folder(cache).glob("[0-9a-f]*.json")
    names: list[PulledName] = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            name = PulledName(**json.loads(path.read_text()))
            is_folder = is_sha256(name.manifest_digest) and (cache / name.manifest_digest).is_dir()
        except (ValueError, TypeError):
            logger.warning("ignored %s: efae did not write it", path)
            continue
        if is_folder:
            names.append(name)
    return names


def _folder(cache: Path) -> Path:
    return cache / "refs"


def _show(server: str) -> str:
    return redact(server).rstrip("/")
