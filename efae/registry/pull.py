"""A version in MLflow's registry -> its model, in any process; and which version has which alias.

A version is the folder that `save_pretrained` writes: weights as safetensors, configuration and
manifest as JSON. Neither way needs pickle, nor runs code that came with a model. A pull is checked
against the manifest, and the manifest of a registered version against a tag of that version; pulled
models are cached by the manifest's hash, so one version is downloaded once, and with EFAE_OFFLINE=1
used without asking anybody. Versions are made in `registration`; when an alias may be moved is
decided in `promotion`.
Beside them lie the files of `torch_export`, for people without this package; no pull reads those.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from data_pipelines import storage
from data_pipelines.storage import Location
from data_pipelines.storage.location import endpoint
from data_pipelines.storage.retries import StorageError
from efae.checkpoints.run_folder import find_newest_checkpoint
from efae.model import pretrained
from efae.model.pretrained import StoredModel
from efae.model.stored_files import MANIFEST, WEIGHTS, CheckpointError, sha256
from efae.registry import model_uris
from efae.registry.cache import fetch_model, find_cache, read_copy
from efae.registry.offline_names import is_offline, mention_copy, recall, remember
from efae.registry.versions import FILE_TAG, RegisteredVersion
from efae.tracking.server import Server

if TYPE_CHECKING:
    from efae.model.autoencoder import Autoencoder

_OF_MLFLOW = ("models:", "runs:")


def pull(uri: str, destination: Path | None = None) -> Path:
    """A local folder with the model at `uri`, verified; a copy in `destination` if given.

    Args:
        uri: as `read` takes it.
        destination: folder to copy the model to.

    Raises:
        ValueError, CheckpointError, ConnectionError, StorageError: as `read`.
    """
    folder, stored = _find(uri)
    if destination is None:
        return folder
    stored.write(destination)
    return destination


def read(uri: str) -> StoredModel:
    """The model at `uri`, verified.

    With EFAE_OFFLINE=1 in the environment neither MLflow nor a storage is asked: the model is the
    verified copy in the cache that this URI named when it was last pulled with this
    MLFLOW_TRACKING_URI; so an alias may have moved since. What was pulled by any models:/ URI is
    there by its version and its digest, too.

    Args:
        uri: "models:/NAME@ALIAS", "models:/NAME/VERSION", "models:/NAME@sha256:HEX",
            "runs:/RUN_ID/PATH", "builtin:NAME", or the path or address of a checkpoint or model
            folder. The registry is the one that MLFLOW_TRACKING_URI names. HEX is the version's
            tag "digest", the sha256 of its weights, or its first 12 digits or more.

    Raises:
        ValueError: there is no such model, and the message says what exists; or MLflow does not
            answer; or EFAE_OFFLINE is set and it was not pulled before.
        CheckpointError: its files do not match their manifest, or that what was registered.
        ConnectionError: MLflow fails.
        StorageError: the storage refuses or does not answer.
    """
    return _find(uri)[1]


def load(uri: str, device: str = "cpu") -> "Autoencoder":
    """The model at `uri` on `device`, for inference: evaluation mode, no gradients.

    Args:
        uri: as `read` takes it.
        device: as torch names devices.

    Raises:
        CheckpointError: its weights are not its configuration's; or as `read`.
        ValueError, ConnectionError, StorageError: as `read`.
    """
    from efae.model.autoencoder import Autoencoder

    return Autoencoder.restore(read(uri), device)


def verify(version: RegisteredVersion, server: Server) -> None:
    """Read the stored model, whatever the cache holds, and build it; and the files beside it.

    Raises:
        CheckpointError: it is not what was registered, or makes no model.
    """
    if "manifest_digest" not in version.tags:
        raise CheckpointError(version.uri, "no tag manifest_digest says what was registered")
    from efae.model.autoencoder import Autoencoder

    with model_uris.asking(server) as client:
        source = model_uris.find_model(client, version.uri).source
    with tempfile.TemporaryDirectory() as folder:
        _, stored = fetch_model(
            version.uri,
            lambda name: _download(version.uri, source, name, server),
            Path(folder),
            version.tags["manifest_digest"],
        )
    Autoencoder.restore(stored)
    for tag, digest in version.tags.items():
        name = tag.removeprefix(FILE_TAG)
        if name != tag and sha256(_download(version.uri, source, name, server)) != digest:
            raise CheckpointError(version.uri, f"{name} is not the one that was registered")


def _find(uri: str) -> tuple[Path, StoredModel]:
    """The folder of the model on this machine, and what it holds: read and verified once."""
    if uri.startswith(_OF_MLFLOW):
        return _find_of_mlflow(model_uris.normalize(uri), Server(mlflow.get_tracking_uri()))
    folder = pretrained.find_folder(uri) or Location.parse(uri).path
    if folder is None:
        return _find_remote(Location.parse(uri.rstrip("/")))
    if not any((folder / name).exists() for name in (MANIFEST, WEIGHTS)):
        raise ValueError(_explain_absence(uri))
    return folder, pretrained.read_folder(folder)


def _find_of_mlflow(uri: str, server: Server) -> tuple[Path, StoredModel]:
    cache = find_cache()
    if is_offline():
        folder = recall(cache, server.uri, uri)
        return folder, read_copy(uri, folder)
    try:
        server.check()
    except ValueError as error:
        raise ValueError(f"{error}{mention_copy(cache, server.uri, uri)}") from error
    with model_uris.asking(server) as client:
        model = model_uris.find_model(client, uri)

    def download(name: str) -> bytes:
        return _download(uri, model.source, name, server)

    folder, stored = fetch_model(uri, download, cache, model.manifest_digest)
    names = [uri]
    if model.name:
        digest, digits = stored.digest, uri.partition("@sha256:")[2]
        if not digest.startswith(digits):
            raise CheckpointError(uri, f"the weights of version {model.version} are {digest}")
        known = f"models:/{model.name}"
        names += [f"{known}/{model.version}", f"{known}@sha256:{digest}"]
    remember(cache, server.uri, names, folder.name)
    return folder, stored


def _find_remote(location: Location) -> tuple[Path, StoredModel]:
    uri, cache = location.uri, find_cache()
    server = endpoint() if location.scheme == "s3" else ""
    if is_offline():
        folder = recall(cache, server, uri)
        return folder, read_copy(uri, folder)
    try:
        folder, stored = fetch_model(uri, lambda name: storage.read_bytes(location / name), cache)
    except FileNotFoundError as error:
        raise ValueError(_explain_absence(uri)) from error
    except StorageError as error:
        raise StorageError(f"{error}{mention_copy(cache, server, uri)}") from error
    remember(cache, server, [uri], folder.name)
    return folder, stored


def _explain_absence(uri: str) -> str:
    newest = find_newest_checkpoint(uri)
    hint = f"its newest checkpoint is {newest}" if newest else f"it holds no {MANIFEST}"
    return f"no model or checkpoint at {uri!r}: {hint}"


def _download(uri: str, source: str, name: str, server: Server) -> bytes:
    """A file of a stored model.

    By the method that each of MLflow's stores has: `download_artifacts` lists the folder first,
    and draws a progress bar that only an environment variable stops.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "file"
        try:
            store = get_artifact_repository(source.rstrip("/"), tracking_uri=server.uri)
            store._download_file(name, str(copy))  # pyright: ignore[reportPrivateUsage]
        except (MlflowException, OSError) as error:
            raise CheckpointError(uri, f"{name} cannot be read from {source}/{name}") from error
        return copy.read_bytes()
