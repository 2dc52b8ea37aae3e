"""Versions in MLflow's registry, their tags and the aliases that point to them."""

import re
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from mlflow.entities.model_registry import ModelVersion

from efae.registry import model_uris
from efae.tracking.server import Server

CHAMPION = "champion"
ABANDONED_AFTER_SECONDS = 600
"""Age from which a promotion counts as killed; it takes seconds once the model is verified."""
_PROMOTING = "promoting."
FILE_TAG = "sha256."
"""Prefix of tags that hold the hash of a file beside the model, before the file's name."""


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model.

    Attributes:
        name: Name of the registered model.
        version: Number of the version, from 1.
        tags: Tags at the time of reading.
    """

    name: str
    version: int
    tags: Mapping[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)

    @property
    def uri(self) -> str:
        """URI that `pull` and `load` accept."""
        return f"models:/{self.name}/{self.version}"


def read_version(uri: str, server: Server) -> RegisteredVersion:
    """Read the version that `uri` names now, with its tags.

    Args:
        uri: URI: "models:/NAME@ALIAS", "models:/NAME/VERSION" or "models:/NAME@sha256:HEX".
        server: MLflow server of the registry, here and in the functions below.

    Raises:
        ValueError: There is no such version, and the message lists what exists; or MLflow does not
            answer.
        ConnectionError: MLflow fails, here and in the functions below.
    """
    server.check()
    with model_uris.asking(server) as client:
        found = model_uris.find_version(client, uri)
    return as_registered(found)


def read_alias(name: str, alias: str, server: Server) -> RegisteredVersion | None:
    """Read the version of `name` that the alias points to, if any.

    Raises:
        ValueError: There is no such model.
    """
    with model_uris.asking(server) as client:
        aliases, _ = model_uris.read_aliases_and_tags(client, name)
        number = aliases.get(alias)
        return None if number is None else as_registered(client.get_model_version(name, number))


def set_alias(name: str, alias: str, version: int, server: Server) -> None:
    """Point an alias of `name` to a version; the alias leaves its present one.

    Raises:
        ValueError: There is no such version, or MLflow rejects the alias.
    """
    with model_uris.asking(server) as client:
        client.set_registered_model_alias(name, alias, str(version))


def check_alias(alias: str) -> None:
    """Raise a ValueError unless MLflow accepts the alias."""
    if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise ValueError(
            f"--alias {alias}: use letters, digits, _ and -, but neither latest nor v and a number,"
            " which MLflow reserves"
        )


def move_alias(version: RegisteredVersion, alias: str, note: str, server: Server) -> None:
    """Point an alias to a version, whose tag "promoted.ALIAS" becomes `note`.

    Raises:
        ValueError: As in `set_alias`; the tag is as it was then.
    """
    key = f"promoted.{alias}"
    set_tag(version, key, note, server)
    try:
        set_alias(version.name, alias, version.version, server)
    except (ValueError, OSError):
        with suppress(ValueError, OSError), model_uris.asking(server) as client:
            if key in version.tags:
                set_tag(version, key, version.tags[key], server)
            else:
                client.delete_model_version_tag(version.name, str(version.version), key)
        raise


def set_tag(version: RegisteredVersion, key: str, value: str, server: Server) -> None:
    """Write one tag of a version."""
    with model_uris.asking(server) as client:
        client.set_model_version_tag(version.name, str(version.version), key, value)


@contextmanager
def promote_alone(name: str, server: Server) -> Generator[None]:
    """Exclude concurrent promotions of `name`; MLflow cannot compare and set an alias.

    Each promotion first sets a tag of its own on the registered model, then reads those of others:
    of two at the same time at least one sees the other, and gives up.

    Raises:
        ValueError: Another promotion is under way.
    """
    mine = f"{_PROMOTING}{uuid.uuid4().hex}"
    with model_uris.asking(server) as client:
        client.set_registered_model_tag(name, mine, f"{time.time():.0f}")
    try:
        with model_uris.asking(server) as client:
            _, tags = model_uris.read_aliases_and_tags(client, name)
            for key, since in tags.items():
                if not key.startswith(_PROMOTING) or key == mine:
                    continue
                age = time.time() - float(since)
                if age < ABANDONED_AFTER_SECONDS:
                    raise ValueError(
                        f"another promotion of {name!r} began {max(age, 0):.0f} s ago: run this"
                        f" again when it is done (one that was killed counts for"
                        f" {ABANDONED_AFTER_SECONDS} s)"
                    )
                client.delete_registered_model_tag(name, key)
        yield
    finally:
        with model_uris.asking(server) as client:
            client.delete_registered_model_tag(name, mine)


def as_registered(found: ModelVersion) -> RegisteredVersion:
    """Convert a version from MLflow's type."""
    return RegisteredVersion(found.name, int(found.version), dict(found.tags))
