"""One experiment, from a configuration to a registered model: what the driver does.

The driver holds no state: all that a later one needs to go on is in storage and in MLflow, found
again by the name of the run.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines import ShardDataset, storage, uris
from efae import config as configuration
from efae.artifacts import checkpoint, registry, tracking
from efae.artifacts.report import write_report
from efae.config import Config
from efae.preflight import list_checks
from efae.ray_trainer import (
    connect,
    count_recoveries,
    evaluate_on_cluster,
    run_training,
    run_uri,
)
from efae.training.evaluation import Evaluation


def run_experiment(config: Config, tracking_uri: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Check, train, evaluate, report and register; returns the summary.

    A run of the same name that did not finish is continued from its newest checkpoint.

    Args:
        config: the experiment.
        tracking_uri: of the MLflow server, as driver and workers reach it.
        say: prints one line of progress.

    Returns:
        What summary.json of the report holds: the evaluation's numbers and the run's facts.

    Raises:
        ValueError: something that the user gave cannot work; before any work starts.
        StorageError: the storage refuses or does not answer.
        CheckpointError: the run's newest checkpoint is damaged.
        TrainingFailed: the workers failed more often than ray.max_failures.
    """
    started = time.monotonic()
    for name, check in list_checks(config, tracking_uri):
        check()
        say(f"ok  {name}")
    connect(config)
    resumed_step = find_resumed_step(config)
    experiment, run_name = config.tracking.experiment, config.tracking.run_name
    if resumed_step == config.training.steps and not tracking.find_unfinished_run(
        tracking_uri, experiment, run_name
    ):
        raise ValueError(
            f"tracking.run_name={run_name!r}: that run is finished (step {resumed_step}); choose"
            " another name to train again"
        )
    run_id, _ = tracking.find_or_create_run(
        tracking_uri,
        experiment,
        run_name,
        {"efae.commit": config.tracking.commit, "efae.config": configuration.digest(config)},
    )
    say(f"ok  run {config.tracking.run_name}: {tracking.find_run_url(tracking_uri, run_id)}")
    if resumed_step:
        say(f"    goes on from step {resumed_step}")
    tracking.log_config(tracking_uri, run_id, config)
    try:
        totals = run_training(config, run_id, tracking_uri)
        final = checkpoint.find_newest_checkpoint(run_uri(config))
        assert final is not None
        say(f"evaluating on {config.training.held_out_images} held-out images ...")
        evaluation = evaluate_on_cluster(final, config)
        facts = {
            "run_name": config.tracking.run_name,
            "mlflow_run_id": run_id,
            "steps": config.training.steps,
            "images_seen": config.training.steps * config.training.global_batch_size,
            "images_per_second": totals["images_per_second"],
            "data_wait_fraction": totals["data_wait_fraction"],
            "bad_samples": totals["bad_samples"],
            "recoveries": count_recoveries(config),
            "world_size": config.ray.num_workers,
            "precision": config.training.precision,
            "device": totals["device"],
            "wall_seconds": time.monotonic() - started,
            "commit": config.tracking.commit,
        } | describe_data(config)
        summary = publish(config, tracking_uri, final, evaluation, facts)
    except BaseException:
        tracking.finish_run(tracking_uri, run_id, "FAILED")
        raise
    tracking.finish_run(tracking_uri, run_id, "FINISHED")
    return summary


def find_resumed_step(config: Config) -> int:
    """The step that the run goes on from; 0 when it is new.

    Raises:
        ValueError: the run's checkpoints are of another configuration; names the settings.
        CheckpointError: the newest complete one is damaged.
        StorageError: the storage refuses or does not answer.
    """
    newest = checkpoint.find_newest_checkpoint(run_uri(config))
    if newest is None:
        return 0
    metadata, found = checkpoint.read_origin(newest)
    if configuration.digest(found) != configuration.digest(config):
        before, now = configuration.flatten(found), configuration.flatten(config)
        changed = [
            f"{key}: {before[key]!r} -> {now[key]!r}"
            for key in now
            if before[key] != now[key] and not key.startswith(("tracking.", "ray."))
        ]
        raise ValueError(
            f"tracking.run_name={config.tracking.run_name!r}: that run has another configuration"
            f" ({'; '.join(changed)}); choose another name, or the settings it began with"
        )
    return metadata["step"]


def describe_data(config: Config) -> dict[str, Any]:
    """Identity of the two image sets, and the credits that their licences ask for.

    Returns:
        "train_data" and "held_out_data", one line each, and "credits", a list of lines without
        repetition.

    Raises:
        ValueError: an address is refused.
        StorageError: the storage refuses or does not answer.
    """
    described: dict[str, Any] = {}
    credits: dict[str, None] = {}  # a set in order
    for role, uri in (("train", config.data.uri), ("held_out", config.data.held_out_uri)):
        dataset = ShardDataset.open(uri)
        described[f"{role}_data"] = f"{uri} ({len(dataset)} images, id {dataset.id})"
        provenance = dataset.index.provenance
        if "credit" in provenance:
            credits[f"{provenance['credit']} ({provenance.get('licence', 'licence unknown')})"] = (
                None
            )
    return described | {"credits": list(credits)}


def publish(
    config: Config, tracking_uri: str, final: str, evaluation: Evaluation, facts: dict[str, Any]
) -> dict[str, Any]:
    """Register the averaged model, write the report card and send both to MLflow.

    Args:
        config: the experiment; names the registered model, and a folder for the report if any.
        tracking_uri: of the MLflow server.
        final: URI of the last checkpoint.
        evaluation: of the model in it.
        facts: JSON values for the report; "mlflow_run_id" and "steps" must be there.

    Returns:
        What summary.json of the report holds.

    Raises:
        CheckpointError: the checkpoint is damaged.
        StorageError: the storage refuses or does not answer.
        MlflowException: the server refuses or does not answer.
    """
    run_id = facts["mlflow_run_id"]
    with tempfile.TemporaryDirectory() as folder:
        model_folder, report_folder = Path(folder) / "model", Path(folder) / "report"
        weights, _ = checkpoint.read_model(final)
        checkpoint.write_model(model_folder, weights, config, card=evaluation.numbers())
        version = registry.register_model(
            model_folder,
            config.tracking.registered_model,
            run_id,
            metrics={"psnr": evaluation.psnr, "worst_gap_db": evaluation.worst_gap_db},
            tags={"run_name": config.tracking.run_name, "commit": config.tracking.commit},
            tracking_uri=tracking_uri,
        )
        write_report(
            report_folder,
            numbers=evaluation.numbers(),
            pictures=evaluation.pictures,
            config=config,
            facts=facts | {"model_uri": version.uri},
            curves=tracking.read_curve(tracking_uri, run_id, "loss"),
        )
        summary = json.loads((report_folder / "summary.json").read_text())
        tracking.log_report(tracking_uri, run_id, report_folder, summary)
        if config.tracking.report_folder:
            copy = uris.join(config.tracking.report_folder, config.tracking.run_name)
            storage.upload_folder(report_folder, copy)
    return summary
