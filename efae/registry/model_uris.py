"""Resolution of models:/ URIs (a version by number, alias or digest) and runs:/ URIs (a folder).

models:/NAME@sha256:HEX names the versions whose weights have that hash; HEX is its first 12 to 64
hexadecimal digits. An alias may move and a server may change, but a digest names these weights or
none.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from efae.model.stored_files import MANIFEST
from efae.names import is_named
from efae.tracking.redaction import redact
from efae.tracking.server import Server

FORMS = (
    "models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME@sha256:HEX (12 to 64 digits 0-9a-f)"
)
_MODEL_URI = re.compile(
    r"models:/+(?P<name>[^/@:]+)"
    r"(@sha256:(?P<digest>[0-9a-f]{12,64})|@(?P<alias>[^/@:]+)|/(?P<version>\d+))"
)
_RUN_URI = re.compile(r"runs:/+(?P<run_id>\w+)/(?P<path>.+?)/?")
_LOGGED_MODEL = re.compile(r"models:/+(?P<id>m-[^/]+)")
_STORES = ("", "file", "s3", "gs", "abfss", "wasbs", "dbfs")
"""Schemes of storage that has its own credentials, or none, so that MLflow's are not sent."""
_SHOWN_VERSIONS = 5


@dataclass(frozen=True)
class StoredModel:
    """A model among MLflow's artifacts.

    Attributes:
        source: Folder, in the form that MLflow's artifact functions accept.
        manifest_digest: Digest (sha256) of the manifest as registered; None if unknown.
        name: Name of the registered model; "" if the model is no version of one.
        version: Number of the version; 0 if it is none.
    """

    source: str
    manifest_digest: str | None = None
    name: str = ""
    version: int = 0


def normalize(uri: str) -> str:
    """Return the canonical spelling of a models:/ or runs:/ URI.

    Raises:
        ValueError: The URI names no model.
    """
    if not (_MODEL_URI.fullmatch(uri) or _RUN_URI.fullmatch(uri)):
        raise ValueError(f"{uri!r} names no model: use {FORMS}, or runs:/RUN_ID/PATH")
    scheme, _, rest = uri.partition(":")
    return f"{scheme}:/{rest.strip('/')}"


def find_model(client: MlflowClient, uri: str) -> StoredModel:
    """Find the model that `uri` names now.

    Raises:
        ValueError: There is none, and the message lists what exists; or its files are on a host
            to which MLflow's credentials may not be sent.
        MlflowException: The server refuses or does not answer, here and in the functions below.
    """
    if match := _RUN_URI.fullmatch(uri):
        _check_run_artifact(client, match["run_id"], match["path"])
        return StoredModel(uri)
    found = find_version(client, uri)
    _check_place(client, uri, found.source or "")
    manifest_digest = found.tags.get("manifest_digest")
    return StoredModel(found.source or "", manifest_digest, found.name, int(found.version))


def find_version(client: MlflowClient, uri: str) -> ModelVersion:
    """Find the version that a models:/ URI names now; for a digest, the newest version with it.

    Raises:
        ValueError: There is none, and the message lists what exists; or the digits fit several
            digests.
    """
    match = _MODEL_URI.fullmatch(uri)
    if not match:
        raise ValueError(f"{uri!r} names no version of the registry: use {FORMS}")
    name, alias, digest = match["name"], match["alias"], match["digest"]
    try:
        if digest is not None:
            return _find_digest(client, name, digest)
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, match["version"])
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ValueError(f"no model {uri!r}; {_what_exists(client, name)}") from error


def _find_digest(client: MlflowClient, name: str, digits: str) -> ModelVersion:
    client.get_registered_model(name)  # raises if the name is unknown
    versions = search_versions(client, name, f"tags.digest LIKE '{digits}%'")
    digests = {version.tags["digest"] for version in versions}
    if len(digests) > 1:
        raise ValueError(
            f"models:/{name}@sha256:{digits} names several models: write more digits of"
            f" {' or '.join(sorted(digests))}"
        )
    if not versions:
        newest = search_versions(client, name)[:_SHOWN_VERSIONS]
        known = ", ".join(f"{v.version} ({v.tags.get('digest', 'none')})" for v in newest)
        raise ValueError(
            f"no version of {name} has the digest {digits}; its newest versions and their digests:"
            f" {known or 'none'}"
        )
    return versions[0]


def search_versions(client: MlflowClient, name: str, also: str = "") -> list[ModelVersion]:
    """Return the versions of the registered model of this name, newest first.

    Args:
        client: Client of MLflow.
        name: Name, with any characters.
        also: Further condition, in MLflow's filter syntax.
    """
    condition = f"name {is_named(name)}" + (f" and {also}" if also else "")
    found = client.search_model_versions(condition, order_by=["version_number DESC"])
    return [version for version in found if version.name == name]


@contextmanager
def asking(server: Server) -> Generator[MlflowClient]:
    """Provide a client, and translate its exceptions within the block; see `Server.translating`."""
    with server.translating():
        yield server.client()


def read_aliases_and_tags(client: Any, name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return a registered model's versions by alias, and its tags."""
    model = client.get_registered_model(name)  # MLflow does not type it, nor what is below
    return model.aliases, model.tags


def _what_exists(client: Any, name: str) -> str:
    try:
        aliases, _ = read_aliases_and_tags(client, name)
    except MlflowException:
        newest = client.search_registered_models(
            max_results=20, order_by=["last_updated_timestamp DESC"]
        )
        return f"registered models: {', '.join(model.name for model in newest) or 'none'}"
    versions = sorted(int(version.version) for version in search_versions(client, name))
    return (
        f"{name} has versions {', '.join(map(str, versions)) or 'none'} and aliases"
        f" {', '.join(f'{alias} ({number})' for alias, number in aliases.items()) or 'none'}"
    )


def _check_place(client: Any, uri: str, place: str) -> None:
    """Refuse files on a foreign host, to which MLflow would send its own token or password.

    Args:
        client: Client that tells where the files of a run or logged model are.
        uri: URI of the model, for messages.
        place: Folder of its files, from the server: it may come from anyone who can write there.

    Raises:
        ValueError: The host is not the tracking server.
    """
    if match := _RUN_URI.fullmatch(place):
        place = client.get_run(match["run_id"]).info.artifact_uri or ""
    elif match := _LOGGED_MODEL.match(place):
        place = client.get_logged_model(match["id"]).artifact_location or ""
    parts, server = urlsplit(place), urlsplit(str(client.tracking_uri)).netloc
    own = parts.netloc in ("", server, server.rpartition("@")[2])
    if parts.scheme in _STORES or (parts.scheme == "mlflow-artifacts" and own):
        return
    raise ValueError(
        f"{uri}: its files are said to be at {redact(place)}, where MLflow would send its own"
        " credentials: register the model again, with files in the server's artifact storage"
    )


def _check_run_artifact(client: MlflowClient, run_id: str, path: str) -> None:
    try:
        _check_place(client, f"runs:/{run_id}/{path}", f"runs:/{run_id}/{path}")
        found = [file.path for file in client.list_artifacts(run_id, path)]
        top = [file.path for file in client.list_artifacts(run_id)]
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"MLflow has no run {run_id!r}") from error
    if f"{path}/{MANIFEST}" not in found:
        raise ValueError(f"run {run_id} has no model at {path!r}; it has {', '.join(top)}")
