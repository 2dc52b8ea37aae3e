"""The run of a tokenizer, from images to a registered model."""

import time
from collections.abc import Callable
from typing import Any

from efae.checkpoints.run_folder import find_newest_checkpoint, locate_run
from efae.config import Config
from efae.evaluation_task import fit_on_cluster
from efae.experiment.facts import describe_data, describe_run
from efae.experiment.publication import evaluate_and_export, publish
from efae.experiment.resumption import find_start
from efae.experiment.training_run import import_publishing, train_in_run, wait_for_mlflow
from efae.model.representation import build_representation
from efae.preflight.cluster_checks import run_preflight
from efae.preflight.driver_checks import RunData
from efae.tracking.sender import deliver_points
from efae.tracking.server import Server
from efae.training.starts.source import adopt_action, adopt_pretrained, copy_source, needs_fit


def run_experiment(config: Config, server: Server, say: Callable[[str], None]) -> dict[str, Any]:
    """Check, train, evaluate, report and register; return the summary.

    An unfinished run of the same name resumes from its newest checkpoint.

    Args:
        config: Configuration of the experiment.
        server: MLflow server, by an address that driver and workers reach.
        say: Function that prints one line of progress.

    Returns:
        Content of the report's summary.json: the evaluation's numbers and the run's facts.

    Raises:
        ValueError: The user's input cannot work; raised before any work starts.
        StorageError: The storage refuses or does not answer.
        CheckpointError: All checkpoints of the run are damaged.
        TrainingFailed: The workers were lost more often than ray.max_failures, or failed in a way
            that a restart would repeat.
        ConnectionError: MLflow is unreachable when the model is registered.
    """
    started = time.monotonic()
    config = adopt_pretrained(config)
    data = RunData(config.data)
    run_preflight(config, data, server, say, meanwhile=import_publishing)
    if needs_fit(config):
        if find_newest_checkpoint(locate_run(config)):
            find_start(config)  # refuses what was changed; another fit would spoil the run's copy
        say("fitting the action on the channels of the pretrained latents ...")
        copy_source(config, server)
        config = adopt_action(config, fit_on_cluster(config))
        say(f"    {build_representation(config)}")
    with train_in_run(config, server, say) as (run, final, metadata):
        say(f"evaluating on {config.training.held_out_images} held-out images ...")
        with evaluate_and_export(final, config, metadata["totals"]["world_size"]) as product:
            facts = {
                **describe_run(config, metadata["totals"]),
                **describe_data(data),
                "wall_seconds": time.monotonic() - started,
            }
            wait_for_mlflow(server, f"--tracking.run-name {config.tracking.run_name}", say)
            deliver_points(run, metadata["unsent_metrics"])
            return publish(config, data, run, product, facts)
