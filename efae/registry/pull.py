"""A version in MLflow's registry -> its model, in any process; and which version has which alias.

A version is two files and their manifest: weights as safetensors, configuration as JSON. Neither
way needs pickle, nor runs code that came with a model. A pull is checked against the manifest, and
the manifest of a registered version against a tag of that version; pulled models are cached by the
manifest's hash, so one version is downloaded once, and with EFAE_OFFLINE=1 used without asking
anybody. Versions are made in `registration`; when an alias may be moved is decided in `promotion`.
Beside them lie the files of `torch_export`, for people without this package; no pull reads those.
"""

import shutil
import tempfile
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from torch import Tensor

from data_pipelines import storage
from data_pipelines.storage import Location
from data_pipelines.storage.location import endpoint
from data_pipelines.storage.retries import StorageError
from efae.checkpoints import checkpoint
from efae.checkpoints.checkpoint import MANIFEST, CheckpointError
from efae.checkpoints.run_folder import find_newest_checkpoint
from efae.config import Config
from efae.model import pretrained
from efae.registry import model_uris
from efae.registry.cache import fetch_model, find_cache, sha256
from efae.registry.offline_names import is_offline, mention_copy, recall, remember
from efae.tracking.server import Server

if TYPE_CHECKING:
    from efae.model.autoencoder import Autoencoder

CHAMPION = "champion"
ABANDONED_AFTER_SECONDS = 600
"""A promotion takes seconds once its model is verified; one that is older was killed."""
_PROMOTING = "promoting."
_OF_MLFLOW = ("models:", "runs:")
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


def pull(uri: str, destination: Path | None = None) -> Path:
    """A local folder with the model at `uri`, verified; a copy in `destination` if given.

    With EFAE_OFFLINE=1 in the environment neither MLflow nor a storage is asked: the model is the
    verified copy in the cache that this URI named when it was last pulled with this
    MLFLOW_TRACKING_URI; so an alias may have moved since. What was pulled by any models:/ URI is
    there by its version and its digest, too.

    Args:
        uri: "models:/NAME@ALIAS", "models:/NAME/VERSION", "models:/NAME@sha256:HEX",
            "runs:/RUN_ID/PATH", "builtin:NAME", the path or address of a checkpoint or model
            folder, or the path of a folder that `save_pretrained` wrote. The registry is the one
            that MLFLOW_TRACKING_URI names. HEX is the version's tag "digest", the sha256 of its
            weights, or its first 12 digits or more.
        destination: folder to copy the model to.

    Raises:
        ValueError: there is no such model, and the message says what exists; or a folder of
            `save_pretrained` is damaged; or MLflow does not answer; or EFAE_OFFLINE is set and it
            was not pulled before.
        CheckpointError: its files do not match their manifest, or that what was registered.
        ConnectionError: MLflow fails.
        StorageError: the storage refuses or does not answer.
    """
    folder = _find_folder(uri)
    if destination is None:
        return folder
    destination.mkdir(parents=True, exist_ok=True)
    for name in (*find_files(folder), MANIFEST):
        if (folder / name).exists():  # save_pretrained writes no manifest
            shutil.copyfile(folder / name, destination / name)
    return destination


def find_files(folder: Path) -> tuple[str, str]:
    """The names of weights and configuration in a folder that `pull` returned."""
    if not (folder / MANIFEST).exists():
        return pretrained.WEIGHTS, pretrained.CONFIG
    return checkpoint.model_files(checkpoint.read_manifest(str(folder)))


def read(folder: Path) -> tuple[dict[str, Tensor], Config]:
    """Weights (on the CPU) and configuration of a folder that `pull` returned.

    Raises:
        ValueError: a folder of `save_pretrained` is damaged.
        CheckpointError: its files do not match their manifest.
    """
    if not (folder / MANIFEST).exists():
        return pretrained.read_pretrained(folder)
    return checkpoint.read_model(folder)


def load(uri: str, device: str = "cpu") -> "Autoencoder":
    """The model at `uri` on `device`, for inference: evaluation mode, no gradients.

    Args:
        uri: as `pull` takes it.
        device: as torch names devices.

    Raises:
        ValueError: there is no such model, and the message says what exists; or a folder of
            `save_pretrained` is damaged.
        CheckpointError: its files do not match their manifest or one another.
        ConnectionError: MLflow fails.
        StorageError: the storage refuses or does not answer.
    """
    from efae.model.autoencoder import Autoencoder

    folder = _find_pretrained(uri)
    if folder is not None:
        return Autoencoder.from_pretrained(folder, device)
    weights, config = checkpoint.read_model(pull(uri))
    model = Autoencoder(config)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:  # as torch says it
        raise CheckpointError(uri, "its weights are not its configuration's") from error
    return model.to(device).eval().requires_grad_(False)


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


def verify(version: RegisteredVersion, server: Server) -> None:
    """Read the stored model, whatever the cache holds, and build it; and the files beside it.

    Raises:
        CheckpointError: it is not what was registered, or makes no model.
    """
    if "manifest_digest" not in version.tags:
        raise CheckpointError(version.uri, "no tag manifest_digest says what was registered")
    with tempfile.TemporaryDirectory() as folder:
        load(str(_pull_from_mlflow(version.uri, server, Path(folder))))
    with model_uris.asking(server) as client:
        source = model_uris.find_model(client, version.uri).source
    for tag, digest in version.tags.items():
        name = tag.removeprefix(FILE_TAG)
        if name != tag and sha256(_download(version.uri, source, name, server)) != digest:
            raise CheckpointError(version.uri, f"{name} is not the one that was registered")


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


def _find_pretrained(uri: str) -> Path | None:
    """The local folder at `uri` if `save_pretrained` wrote it, or came with this package."""
    if pretrained.is_builtin(uri):
        return pretrained.find_builtin(uri)
    path = None if uri.startswith(_OF_MLFLOW) else Location.parse(uri).path
    if path is None or not (path / pretrained.WEIGHTS).exists() or (path / MANIFEST).exists():
        return None
    return path


def _find_folder(uri: str) -> Path:
    """The verified folder of the model, on this machine."""
    if (folder := _find_pretrained(uri)) is not None:
        pretrained.read_pretrained(folder)
        return folder
    cache = find_cache()
    if uri.startswith(_OF_MLFLOW):
        uri, server = model_uris.normalize(uri), Server(mlflow.get_tracking_uri())
        if is_offline():
            return recall(cache, server.uri, uri)
        try:
            server.check()
        except ValueError as error:
            raise ValueError(f"{error}{mention_copy(cache, server.uri, uri)}") from error
        return _pull_from_mlflow(uri, server, cache)
    location = Location.parse(uri)
    if location.path is not None:
        _check_presence(location)
        checkpoint.read_model(location.path)
        return location.path
    location = Location.parse(uri.rstrip("/"))
    uri, origin = location.uri, endpoint() if location.scheme == "s3" else ""
    if is_offline():
        return recall(cache, origin, uri)
    try:
        _check_presence(location)
        folder = fetch_model(uri, lambda name: checkpoint.read_file(uri, name), cache)
    except StorageError as error:
        raise StorageError(f"{error}{mention_copy(cache, origin, uri)}") from error
    remember(cache, origin, uri, folder.name)
    return folder


def _check_presence(folder: Location) -> None:
    if not storage.exists(folder / MANIFEST):
        newest = find_newest_checkpoint(folder)
        hint = f"its newest checkpoint is {newest}" if newest else f"it holds no {MANIFEST}"
        if storage.exists(folder / pretrained.WEIGHTS):
            hint = "save_pretrained wrote it: copy it to this machine and load that folder"
        raise ValueError(f"no model or checkpoint at {folder.uri!r}: {hint}")


def _pull_from_mlflow(uri: str, server: Server, cache: Path) -> Path:
    with model_uris.asking(server) as client:
        model = model_uris.find_model(client, uri)

    def read(name: str) -> bytes:
        return _download(uri, model.source, name, server)

    folder = fetch_model(uri, read, cache, model.manifest_digest)
    names = [uri]
    if model.name:
        manifest = checkpoint.read_manifest(str(folder))
        digest = manifest["files"][checkpoint.model_files(manifest)[0]]["sha256"]
        digits = uri.partition("@sha256:")[2]
        if not digest.startswith(digits):
            raise CheckpointError(uri, f"the weights of version {model.version} are {digest}")
        known = f"models:/{model.name}"
        names += [f"{known}/{model.version}", f"{known}@sha256:{digest}"]
    for name in names:
        remember(cache, server.uri, name, folder.name)
    return folder


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
