"""Registered versions, their tags and the aliases that point to them."""

import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlflow.entities.model_registry import ModelVersion

from efae.registry import model_uris
from efae.tracking.server import Server

CHAMPION = "champion"
ABANDONED_AFTER_SECONDS = 600
"""A promotion takes seconds once its model is verified; one that is older was killed."""
_PROMOTING = "promoting."
FILE_TAG = "sha256."
"""Before the name of a file beside the model, in a tag with its hash."""


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model.

    Attributes:
        name: of the registered model.
        version: counted from 1.
        tags: as they were when it was read.
    """

    name: str
    version: int
    tags: Mapping[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)

    @property
    def uri(self) -> str:
        """What `pull` and `load` take."""
        return f"models:/{self.name}/{self.version}"


def read_version(uri: str, server: Server) -> RegisteredVersion:
    """The version that `uri` names now, with its tags.

    Args:
        uri: "models:/NAME@ALIAS", "models:/NAME/VERSION" or "models:/NAME@sha256:HEX".
        server: MLflow server of the registry, here and in the functions below.

    Raises:
        ValueError: there is no such version, and the message says what exists; or MLflow does not
            answer.
        ConnectionError: MLflow fails, here and in the functions below.
    """
    server.check()
    with model_uris.asking(server) as client:
        found = model_uris.find_version(client, uri)
    return as_registered(found)


def read_alias(name: str, alias: str, server: Server) -> RegisteredVersion | None:
    """The version of `name` that the alias points to, if any.

    Raises:
        ValueError: there is no such model.
    """
    with model_uris.asking(server) as client:
        aliases, _ = model_uris.read_aliases_and_tags(client, name)
        number = aliases.get(alias)
        return None if number is None else as_registered(client.get_model_version(name, number))


def set_alias(name: str, alias: str, version: int, server: Server) -> None:
    """Point an alias of `name` to a version; it leaves the one that it pointed to.

    Raises:
        ValueError: there is no such version, or MLflow does not take this alias.
    """
    with model_uris.asking(server) as client:
        client.set_registered_model_alias(name, alias, str(version))


def set_tag(version: RegisteredVersion, key: str, value: str, server: Server) -> None:
    """Write one tag of a version."""
    with model_uris.asking(server) as client:
        client.set_model_version_tag(version.name, str(version.version), key, value)


@contextmanager
def promote_alone(name: str, server: Server) -> Generator[None]:
    """Keeps other promotions of `name` out; MLflow has no way to compare and set an alias.

    Each leaves a tag of its own on the registered model before it looks for those of others: of two
    at the same time at least one sees the other, and gives up.

    Raises:
        ValueError: another promotion is under way.
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
    """A version as MLflow gives it."""
    return RegisteredVersion(found.name, int(found.version), dict(found.tags))
