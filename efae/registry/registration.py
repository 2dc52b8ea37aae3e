"""Registration of a model as a version in MLflow: files, tags, card and portable programs."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from efae.config import forms as configuration
from efae.model.pretrained import CARD, StoredModel
from efae.model.stored_files import CONFIG, MANIFEST, sha256
from efae.registry import model_uris
from efae.registry.versions import CHAMPION, FILE_TAG, RegisteredVersion, as_registered
from efae.tracking.runs import Run

logger = logging.getLogger(__name__)

DESCRIPTION_CHARACTERS = 5000
"""Width of MLflow's column; SQLite accepts more, PostgreSQL and MySQL refuse it."""


def register_model(
    stored: StoredModel,
    name: str,
    run: Run,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    card: str = "",
    programs: Sequence[Path] = (),
) -> RegisteredVersion:
    """Store a model with its run and register it as a version of `name`.

    The first version becomes the champion. Registering the same weights of the same run again
    returns the existing version.

    Args:
        stored: Model to register.
        name: Name of the registered model; created if missing.
        run: MLflow run that the model came from; it stores the files.
        metrics: Metrics that become tags "metric.NAME" of the version.
        tags: Further tags of the version.
        card: Model card as Markdown: stored as README.md beside the files, and as the version's
            description, cut at the width of MLflow's column. No pull reads it.
        programs: Files of `export_programs`, stored beside the model.

    Raises:
        MlflowException: The server refuses or does not answer, or there is no such run.
    """
    facts = {f"metric.{key}": f"{value:.6g}" for key, value in metrics.items()} | dict(tags)
    facts["digest"] = stored.digest
    facts["config_digest"] = configuration.digest(stored.settings)
    facts["manifest_digest"] = stored.manifest_digest
    client = run.server.client()
    _create_registered_model(client, name)
    found = _find_version(client, name, run.id, stored.digest)
    if found is None:
        with tempfile.TemporaryDirectory() as folder:
            stored.write(Path(folder), card)
            source = _upload(client, run.id, stored, Path(folder), programs)
        for path in programs:
            facts[f"{FILE_TAG}{path.name}"] = sha256(path.read_bytes())
        found = client.create_model_version(
            name, source, run.id, facts, description=_describe(card), await_creation_for=0
        )
    aliases, _ = model_uris.read_aliases_and_tags(client, name)
    if int(found.version) == 1 and CHAMPION not in aliases:  # later ones need `promote`
        client.set_registered_model_alias(name, CHAMPION, found.version)
    return as_registered(found)


def _create_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find_version(client: MlflowClient, name: str, run_id: str, digest: str) -> ModelVersion | None:
    versions = model_uris.search_versions(client, name, f"run_id = '{run_id}'")
    return next((v for v in versions if v.tags.get("digest") == digest), None)


def export_programs(stored: StoredModel, folder: Path) -> list[Path]:
    """Export programs for people without this package, which takes some ten seconds.

    Args:
        stored: Model to export.
        folder: Existing folder that receives the files of `torch_export`.

    Returns:
        The files; [], after a warning, if torch cannot export this model.
    """
    from efae.exchange import torch_export  # imports take seconds; no pull needs them

    try:
        torch_export.export_portable(stored, folder)
    except Exception as error:  # torch.export raises what its many parts raise
        logger.warning(
            "registered without its portable programs: efae.load works, MLflow alone cannot load"
            " this version (%s: %s)",
            type(error).__name__,
            str(error).split("\n", 1)[0],
        )
        return []
    return [folder / name for name in torch_export.PORTABLE_FILES]


def _describe(card: str) -> str:
    if len(card) <= DESCRIPTION_CHARACTERS:
        return card
    rest = f"\n\n(The rest is in {CARD}, beside the files.)"
    return card[: DESCRIPTION_CHARACTERS - len(rest)] + rest


def _upload(
    client: MlflowClient, run_id: str, stored: StoredModel, folder: Path, programs: Sequence[Path]
) -> str:
    """Upload the files to the run, never over other weights of the same run."""
    path = f"model-{stored.digest[:12]}" if client.list_artifacts(run_id, "model") else "model"
    for file in (*sorted(folder.iterdir()), *programs):
        client.log_artifact(run_id, str(file), path)
    # MLflow's pages read MLmodel; our flavour names files and no code.
    flavour = {"efae": {"weights": stored.weights_file, "config": CONFIG, "manifest": MANIFEST}}
    model = Model(artifact_path=path, run_id=run_id, flavors=flavour)
    if programs:
        from efae.exchange.torch_export import describe_portable

        describe_portable(model)
    client.log_text(run_id, model.to_yaml(), f"{path}/MLmodel")
    return f"runs:/{run_id}/{path}"
