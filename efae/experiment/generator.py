"""The run of a generator, from a latent set to a registered model."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines import storage
from data_pipelines.storage import Location
from efae.checkpoints.checkpoint import read_model
from efae.config import GeneratorConfig
from efae.experiment.facts import describe_run
from efae.experiment.training_run import import_publishing, train_in_run, wait_for_mlflow
from efae.generation.network import read_format
from efae.model.pretrained import pack_generator
from efae.preflight.cluster_checks import run_preflight
from efae.preflight.driver_checks import RunData
from efae.tracking.redaction import redact
from efae.tracking.sender import deliver_points
from efae.tracking.server import Server
from efae.training.tasks.generator import adopt_latents


def run_generator(
    config: GeneratorConfig, server: Server, say: Callable[[str], None]
) -> dict[str, Any]:
    """Check, train and register; return the facts of the run.

    An unfinished run of the same name resumes from its newest checkpoint.

    Args:
        config: Configuration of the run.
        server: MLflow server, by an address that driver and workers reach.
        say: Function that prints one line of progress.

    Raises:
        ValueError: The user's input cannot work; raised before any work starts.
        StorageError, CheckpointError, TrainingFailed, ConnectionError: As in `run_experiment`.
    """
    started = time.monotonic()
    config = adopt_latents(config)
    data, form = RunData(config.data), read_format(config)
    run_preflight(config, data, server, say, meanwhile=import_publishing)
    with train_in_run(config, server, say) as (run, final, metadata):
        from efae.registry.registration import register_model

        wait_for_mlflow(server, f"--tracking.run-name {config.tracking.run_name}", say)
        deliver_points(run, metadata["unsent_metrics"])
        model = pack_generator(read_model(final).weights, config)
        losses = {
            "loss": metadata["scores"]["loss"],
            **{k: v for k, v in metadata["validations"][-1].items() if k != "step"},
        }
        version = register_model(
            model,
            config.tracking.registered_model,
            run,
            metrics=losses,
            tags={
                "run_name": config.tracking.run_name,
                "commit": config.tracking.commit,
                "train_data": data.train.id,
                "tokenizer_digest": form.model_digest,
                "tokenizer": redact(form.model_uri),
            },
        )
        if config.output:
            with tempfile.TemporaryDirectory() as folder:
                model.write(Path(folder))
                storage.upload_folder(Path(folder), Location.parse(config.output))
        return {
            **describe_run(config, metadata["totals"]),
            **losses,
            "mlflow_run_id": run.id,
            "model_uri": version.uri,
            "wall_seconds": time.monotonic() - started,
        }
