"""Model folder -> version in MLflow's registry -> model again, in another process.

A version is two files and their manifest: weights as safetensors, configuration as JSON. Neither
way needs pickle, nor runs code that came with a model. A pull is checked against the manifest, and
the manifest of a registered version against a tag of that version; pulled models are cached by the
manifest's hash, so one version is downloaded once.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from data_pipelines import storage, uris
from efae import config_forms as configuration
from efae.artifacts import checkpoint
from efae.artifacts.checkpoint import CONFIG, MANIFEST, MODEL, CheckpointError
from efae.artifacts.request_limits import PATIENT, request_limits
from efae.artifacts.run_checkpoints import find_newest_checkpoint
from efae.artifacts.tracking import check_server

if TYPE_CHECKING:
    from efae.model.autoencoder import Autoencoder

logger = logging.getLogger(__name__)

CHAMPION = "champion"
_MODEL_URI = re.compile(r"models:/+(?P<name>[^/@:]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_RUN_URI = re.compile(r"runs:/+(?P<run_id>\w+)/(?P<path>.+?)/?")


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model.

    Attributes:
        name: of the registered model.
        version: counted from 1.
    """

    name: str
    version: int

    @property
    def uri(self) -> str:
        """What `pull` and `load` take."""
        return f"models:/{self.name}/{self.version}"


def register_model(
    model_dir: Path,
    name: str,
    run_id: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    tracking_uri: str,
) -> RegisteredVersion:
    """Stores a folder made by `write_model` with its run and makes it a version of `name`.

    The first version becomes the champion. Registering the same weights of the same run again
    gives the version that exists.

    Args:
        model_dir: a local folder.
        name: of the registered model; made if there is none.
        run_id: the MLflow run that the model came from; it stores the files.
        metrics: numbers that become tags "metric.NAME" of the version.
        tags: further tags of the version.
        tracking_uri: of the MLflow server.

    Raises:
        CheckpointError: the folder is not an undamaged model.
        MlflowException: the server refuses or does not answer, or there is no such run.
    """
    _, config = checkpoint.read_model(model_dir)
    manifest = checkpoint.read_manifest(str(model_dir))
    digest = manifest["files"][MODEL]["sha256"]
    facts = {f"metric.{key}": f"{value:.6g}" for key, value in metrics.items()} | dict(tags)
    facts["digest"] = digest
    facts["config_digest"] = configuration.digest(config)
    facts["manifest_digest"] = _sha256((model_dir / MANIFEST).read_bytes())
    client = MlflowClient(tracking_uri)
    with request_limits(PATIENT):
        _create_registered_model(client, name)
        found = _find_version(client, name, run_id, digest)
        if found is None:
            source = _upload(client, run_id, model_dir, digest)
            found = client.create_model_version(
                name, source, run_id, tags=facts, await_creation_for=0
            )
        if CHAMPION not in client.get_registered_model(name).aliases:
            client.set_registered_model_alias(name, CHAMPION, found.version)
    return RegisteredVersion(name, int(found.version))


def pull(uri: str, destination: Path | None = None) -> Path:
    """A local folder with the model at `uri`, verified; a copy in `destination` if given.

    Args:
        uri: "models:/NAME@ALIAS", "models:/NAME/VERSION", "runs:/RUN_ID/PATH", or the path or
            address of a checkpoint or model folder. The registry is the one that
            MLFLOW_TRACKING_URI names.
        destination: folder to copy the model to.

    Raises:
        ValueError: there is no such model, and the message says what exists; or MLflow does not
            answer.
        CheckpointError: its files do not match their manifest.
        StorageError: the storage refuses or does not answer.
    """
    if uri.startswith(("models:", "runs:")):
        folder = _pull_from_mlflow(uri)
    else:
        folder = _pull_from_storage(uri)
    if destination is None:
        return folder
    destination.mkdir(parents=True, exist_ok=True)
    manifest = checkpoint.read_manifest(str(folder))
    for name in (*checkpoint.model_files(manifest), MANIFEST):
        shutil.copyfile(folder / name, destination / name)
    return destination


def load(uri: str, device: str = "cpu") -> "Autoencoder":
    """The model at `uri` on `device`, for inference: evaluation mode, no gradients.

    Args:
        uri: as `pull` takes it.
        device: as torch names devices.

    Raises:
        ValueError: there is no such model; the message says what exists.
        CheckpointError: its files do not match their manifest.
        StorageError: the storage refuses or does not answer.
    """
    from efae.model.autoencoder import Autoencoder

    weights, config = checkpoint.read_model(pull(uri))
    model = Autoencoder(config)
    model.load_state_dict(weights, strict=True)
    return model.to(device).eval().requires_grad_(False)


def _create_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find_version(client: MlflowClient, name: str, run_id: str, digest: str) -> ModelVersion | None:
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return next((v for v in versions if v.tags.get("digest") == digest), None)


def _upload(client: MlflowClient, run_id: str, model_dir: Path, digest: str) -> str:
    """Stores the files with the run; other weights of the same run are never overwritten."""
    path = f"model-{digest[:12]}" if client.list_artifacts(run_id, "model") else "model"
    for name in (MODEL, CONFIG, MANIFEST):
        client.log_artifact(run_id, str(model_dir / name), path)
    # MLflow's pages read this file; the flavour names files and no code.
    flavour = {"efae": {"weights": MODEL, "config": CONFIG, "manifest": MANIFEST}}
    text = Model(artifact_path=path, run_id=run_id, flavors=flavour).to_yaml()
    client.log_text(run_id, text, f"{path}/MLmodel")
    return f"runs:/{run_id}/{path}"


def _pull_from_storage(uri: str) -> Path:
    manifest_uri = uris.join(uri, MANIFEST)
    if not storage.exists(manifest_uri):
        newest = find_newest_checkpoint(uri)
        hint = f"its newest checkpoint is {newest}" if newest else f"it holds no {MANIFEST}"
        raise ValueError(f"no model or checkpoint at {uri!r}: {hint}")
    path = uris.local_path(uri)
    if path is not None:
        checkpoint.read_model(path)
        return path
    return _fetch(uri, lambda name: storage.read_bytes(uris.join(uri, name)))


def _pull_from_mlflow(uri: str) -> Path:
    tracking_uri = mlflow.get_tracking_uri()
    check_server(tracking_uri)
    client = MlflowClient(tracking_uri)
    if match := _MODEL_URI.fullmatch(uri):
        version = _find_named_version(client, match["name"], match["alias"], match["version"])
        source, manifest_digest = version.source or "", version.tags.get("manifest_digest")
    elif match := _RUN_URI.fullmatch(uri):
        _check_run_artifact(client, match["run_id"], match["path"])
        source, manifest_digest = uri, None
    else:
        raise ValueError(
            f"{uri!r} names no model: use models:/NAME@ALIAS, models:/NAME/VERSION or"
            " runs:/RUN_ID/PATH"
        )

    def read(name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder, request_limits(PATIENT):
            address = f"{source.rstrip('/')}/{name}"
            try:
                path = download_artifacts(address, dst_path=folder, tracking_uri=tracking_uri)
            except (MlflowException, OSError) as error:
                raise CheckpointError(uri, f"{name} cannot be read from {address}") from error
            return Path(path).read_bytes()

    return _fetch(uri, read, manifest_digest)


def _find_named_version(
    client: MlflowClient, name: str, alias: str | None, version: str | None
) -> ModelVersion:
    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, version or "")
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        wanted = f"models:/{name}@{alias}" if alias is not None else f"models:/{name}/{version}"
        raise ValueError(f"no model {wanted!r}; {_what_exists(client, name)}") from error


def _what_exists(client: Any, name: str) -> str:  # MLflow does not type what it answers here
    names = [model.name for model in client.search_registered_models(max_results=20)]
    if name not in names:
        return f"registered models: {', '.join(names) or 'none'}"
    versions = sorted(int(v.version) for v in client.search_model_versions(f"name = '{name}'"))
    aliases = client.get_registered_model(name).aliases
    return (
        f"{name} has versions {', '.join(map(str, versions)) or 'none'} and aliases"
        f" {', '.join(f'{alias} ({number})' for alias, number in aliases.items()) or 'none'}"
    )


def _check_run_artifact(client: MlflowClient, run_id: str, path: str) -> None:
    try:
        found = [file.path for file in client.list_artifacts(run_id, path)]
        top = [file.path for file in client.list_artifacts(run_id)]
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"MLflow has no run {run_id!r}") from error
    if f"{path}/{MANIFEST}" not in found:
        raise ValueError(f"run {run_id} has no model at {path!r}; it has {', '.join(top)}")


def _fetch(uri: str, read: Callable[[str], bytes], manifest_digest: str | None = None) -> Path:
    """The cached model, downloaded and verified by `read` if it is not there yet."""
    cache = Path(os.environ.get("EFAE_CACHE_DIR") or Path.home() / ".cache" / "efae") / "models"
    if manifest_digest is not None and _is_intact(cache / manifest_digest):
        return cache / manifest_digest
    data = read(MANIFEST)
    if manifest_digest not in (None, _sha256(data)):
        raise CheckpointError(uri, f"{MANIFEST} is not the one that was registered")
    folder = cache / _sha256(data)
    if _is_intact(folder):
        return folder
    manifest = checkpoint.parse_manifest(uri, data)
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=cache))
    try:
        for name in checkpoint.model_files(manifest):
            content = read(name)
            checkpoint.check_file(uri, name, content, manifest)
            (draft / name).write_bytes(content)
        (draft / MANIFEST).write_bytes(data)
        try:
            draft.rename(folder)
        except OSError:  # another process was faster
            if not _is_intact(folder):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether the cache holds this model; a damaged one is removed."""
    if not folder.exists():
        return False
    try:
        checkpoint.read_model(folder)
    except CheckpointError as error:
        logger.warning("cached model is damaged and fetched again: %s", error)
        shutil.rmtree(folder)
        return False
    return True


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
