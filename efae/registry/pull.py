"""Pulling of models: from MLflow's registry, a run, storage or a folder, verified and cached.

A version is the folder that `save_pretrained` writes: weights as safetensors, configuration and
manifest as JSON. A pull unpickles nothing and runs no code that came with a model. It checks files
against the manifest, and the manifest of a registered version against a tag of that version. Models
are cached by the manifest's hash, so a version is downloaded once, and with EFAE_OFFLINE=1 used
without a server. The files of `torch_export` beside a version are for people without this package;
no pull reads them. See `registration`, `versions` and `promotion` for the rest.
"""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from data_pipelines import storage
from data_pipelines.shards.latent_format import LatentFormat
from data_pipelines.storage import Location
from data_pipelines.storage.location import endpoint
from data_pipelines.storage.retries import StorageError
from efae.checkpoints.run_folder import find_newest_checkpoint
from efae.config import GeneratorConfig
from efae.model import pretrained
from efae.model.pretrained import StoredModel
from efae.model.stored_files import MANIFEST, WEIGHTS, CheckpointError, sha256
from efae.registry import model_uris
from efae.registry.cache import fetch_model, find_cache, read_copy
from efae.registry.offline_names import is_offline, mention_copy, recall, remember
from efae.registry.versions import FILE_TAG, RegisteredVersion
from efae.tracking.redaction import redact
from efae.tracking.server import Server

if TYPE_CHECKING:
    from efae.model.autoencoder import Autoencoder

_OF_MLFLOW = ("models:", "runs:")
_REGISTERED = re.compile(r"models:/+([^/@:]+)[/@]")


def pull(uri: str, destination: Path | None = None) -> Path:
    """Return a local folder with the verified model at `uri`: `destination`, if given.

    Args:
        uri: URI, as in `read`.
        destination: Folder to copy the model to.

    Raises:
        ValueError: The cache cannot be written, and there is no `destination`; or as in `read`.
        CheckpointError, ConnectionError, StorageError: As in `read`.
    """
    folder, stored = _find(uri)
    if destination is not None:
        stored.write(destination)
        return destination
    if folder is None:
        raise ValueError(
            f"{redact(uri)} has no folder, since {find_cache()} cannot be written: set"
            " EFAE_CACHE_DIR to one that can, or name a destination"
        )
    return folder


def read(uri: str, server: Server | None = None) -> StoredModel:
    """Read and verify the model at `uri`.

    With EFAE_OFFLINE=1 in the environment neither MLflow nor storage is contacted: the model is the
    verified cached copy that this URI named when it was last pulled with this MLFLOW_TRACKING_URI;
    an alias may have moved since. A model pulled by any models:/ URI is also found by its version
    and its digest.

    Args:
        uri: URI: "models:/NAME@ALIAS", "models:/NAME/VERSION", "models:/NAME@sha256:HEX",
            "runs:/RUN_ID/PATH", "builtin:NAME", or the path or address of a checkpoint or model
            folder; or "diffusers:PATH", which `read_diffusers` reads and nothing caches. The
            registry is the one that MLFLOW_TRACKING_URI names. HEX is the version's tag "digest",
            the sha256 of its weights, or its first 12 digits or more.
        server: MLflow server to ask instead.

    Raises:
        ValueError: There is no such model, and the message lists what exists; or MLflow does not
            answer; or EFAE_OFFLINE is set and the model was not pulled before.
        CheckpointError: The files do not match the manifest, or the manifest does not match the
            registered one.
        ConnectionError: MLflow fails.
        StorageError: The storage refuses or does not answer.
    """
    if uri.startswith("diffusers:"):
        from efae.exchange.diffusers_tokenizer import read_diffusers  # all networks

        return read_diffusers(uri)
    return _find(uri, server)[1]


def read_tokenizer(form: LatentFormat, server: Server | None = None, uri: str = "") -> StoredModel:
    """Read the model that encoded a latent set, whatever an alias in its URI names by now.

    Args:
        form: Format of the set.
        server: MLflow server to ask, if the model is in a registry; None as in `read`.
        uri: URI of the model, if it has moved since.

    Raises:
        ValueError: There is another model, or none.
        CheckpointError, ConnectionError, StorageError: As in `read`.
    """
    uri = uri or form.model_uri
    found = _REGISTERED.match(uri)
    pinned = f"models:/{found[1]}@sha256:{form.model_digest}" if found else uri
    stored = read(pinned, server)
    if stored.digest != form.model_digest:
        raise ValueError(
            f"{redact(uri)}: its digest is {stored.digest}, but the latents were made by a model of"
            f" digest {form.model_digest}: name that one"
        )
    return stored


def load(uri: str, device: str = "cpu") -> "Autoencoder":
    """Load the model at `uri` to `device` for inference: evaluation mode, no gradients.

    Args:
        uri: URI, as in `read`.
        device: Device, as torch names it.

    Raises:
        CheckpointError: The weights do not fit the configuration; or as in `read`.
        ValueError, ConnectionError, StorageError: As in `read`.
    """
    from efae.model.autoencoder import Autoencoder

    return Autoencoder.restore(read(uri), device)


def verify(version: RegisteredVersion, server: Server) -> None:
    """Download a stored model, without the cache, build it, and check the files beside it.

    Raises:
        CheckpointError: The files are not the registered ones, or make no model.
    """
    if "manifest_digest" not in version.tags:
        raise CheckpointError(version.uri, "no tag manifest_digest says what was registered")
    from efae.generation.network import Generator
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
    kind = Generator if isinstance(stored.settings, GeneratorConfig) else Autoencoder
    kind.restore(stored)
    for tag, digest in version.tags.items():
        name = tag.removeprefix(FILE_TAG)
        if name != tag and sha256(_download(version.uri, source, name, server)) != digest:
            raise CheckpointError(version.uri, f"{name} is not the one that was registered")


def _find(uri: str, server: Server | None = None) -> tuple[Path | None, StoredModel]:
    """Return the local folder of the model, if any, and its content, read and verified once."""
    if uri.startswith(_OF_MLFLOW):
        server = server or Server(mlflow.get_tracking_uri())
        return _find_of_mlflow(model_uris.normalize(uri), server)
    folder = pretrained.find_folder(uri) or Location.parse(uri).path
    if folder is None:
        return _find_remote(Location.parse(uri.rstrip("/")))
    if not any((folder / name).exists() for name in (MANIFEST, WEIGHTS)):
        raise ValueError(_explain_absence(uri))
    return folder, pretrained.read_folder(folder)


def _find_of_mlflow(uri: str, server: Server) -> tuple[Path | None, StoredModel]:
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
    remember(cache, server.uri, names, stored.manifest_digest)
    return folder, stored


def _find_remote(location: Location) -> tuple[Path | None, StoredModel]:
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
    remember(cache, server, [uri], stored.manifest_digest)
    return folder, stored


def _explain_absence(uri: str) -> str:
    newest = find_newest_checkpoint(uri)
    hint = f"its newest checkpoint is {newest}" if newest else f"it holds no {MANIFEST}"
    return f"no model or checkpoint at {uri!r}: {hint}"


def _download(uri: str, source: str, name: str, server: Server) -> bytes:
    """Download a file of a stored model.

    This calls the private method that all MLflow stores have: the public `download_artifacts` lists
    the folder first, and draws a progress bar that only an environment variable turns off.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "file"
        try:
            store = get_artifact_repository(source.rstrip("/"), tracking_uri=server.uri)
            store._download_file(name, str(copy))  # pyright: ignore[reportPrivateUsage]
        except (MlflowException, OSError) as error:
            raise CheckpointError(uri, f"{name} cannot be read from {source}/{name}") from error
        return copy.read_bytes()
