"""The driver's part of one experiment, from a configuration to a registered model.

The driver holds no state: all that a later driver needs to resume is in storage and in MLflow,
under the name of the run.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from data_pipelines import storage
from data_pipelines.storage import Location
from efae.checkpoints import checkpoint, run_folder
from efae.checkpoints.events import read_events
from efae.config import AnyConfig, Config, GeneratorConfig
from efae.config import forms as configuration
from efae.evaluation.results import Evaluation
from efae.evaluation_task import fit_on_cluster, start_evaluation
from efae.model.autoencoder import Autoencoder, build_representation
from efae.model.pretrained import StoredModel, hash_tensors, pack_model
from efae.preflight.cluster_checks import run_preflight
from efae.preflight.driver_checks import RunData
from efae.presets import GENERATORS, PRESETS
from efae.ray_trainer import run_training
from efae.tracking import runs
from efae.tracking.redaction import redact
from efae.tracking.runs import Run
from efae.tracking.sender import deliver_points
from efae.tracking.server import Server
from efae.training.starts.source import (
    adopt_action,
    adopt_pretrained,
    copy_source,
    describe_source,
    needs_fit,
)

logger = logging.getLogger(__name__)

MLFLOW_PATIENCE_SECONDS = 60
_NOT_NAMED = ("data.uri", "data.held_out_uri", "data.format", "start.architecture")


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
            wait_for_mlflow(server, config.tracking.run_name, say)
            deliver_points(run, metadata["unsent_metrics"])
            return publish(config, data, run, product, facts)


@contextmanager
def train_in_run(
    config: AnyConfig, server: Server, say: Callable[[str], None]
) -> Generator[tuple[Run, str, dict[str, Any]]]:
    """Train to the last checkpoint; yield the MLflow run, that checkpoint's URI and its metadata.

    The MLflow run is finished if the block ends without an exception, else it has failed.

    Args:
        config: Configuration of the run.
        server: MLflow server.
        say: Function that prints one line of progress.

    Raises:
        ValueError: The run is finished already, or as in `find_start`.
        StorageError, CheckpointError, TrainingFailed: As in `run_experiment`.
    """
    step = find_start(config)
    experiment, run_name = config.tracking.experiment, config.tracking.run_name
    if step == config.training.steps and not runs.find_unfinished_run(server, experiment, run_name):
        raise ValueError(
            f"tracking.run_name={run_name!r}: that run is finished (step {step}); choose another"
            " name to train again"
        )
    run, _ = runs.find_or_create_run(
        server,
        experiment,
        run_name,
        {"efae.commit": config.tracking.commit, "efae.config": configuration.digest(config)},
    )
    say(f"ok   run {run_name}: {run.find_url()}")
    if step:
        say(f"    resuming from step {step}")
    run.log_config(config)
    try:
        run_training(config, run)
        final, metadata = find_final(config)
        yield run, final, metadata
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish("FINISHED")


def import_publishing() -> None:
    """Import what `publish` needs, MLflow above all, in a second that would pass in waiting."""
    import efae.registry.registration  # pyright: ignore[reportUnusedImport]
    import efae.report.card  # noqa: F401  # pyright: ignore[reportUnusedImport]


def wait_for_mlflow(server: Server, run_name: str, say: Callable[[str], None]) -> None:
    """Wait until the server answers: it may have become unreachable while the run trained.

    Raises:
        ConnectionError: It stays unreachable; the message says how to resume.
    """
    give_up_at = time.monotonic() + MLFLOW_PATIENCE_SECONDS
    while True:
        try:
            return server.check()
        except ValueError as error:
            if time.monotonic() > give_up_at:
                raise ConnectionError(
                    f"trained and evaluated, but not registered: {error}. Nothing is lost: submit"
                    f" again with --tracking.run-name {run_name} when it is back"
                ) from error
            say(f"waiting for MLflow, up to {MLFLOW_PATIENCE_SECONDS} s more: {error}")
            time.sleep(5)


def find_start(config: AnyConfig) -> int:
    """Return the step from which the run starts or resumes; 0 without a checkpoint.

    Raises:
        ValueError: A run of this name exists and resume=never, or it has another configuration, or
            the checkpoint that resume names does not fit. The message lists the settings.
        CheckpointError: All checkpoints of the run, or the one that resume names, are damaged.
        StorageError: The storage refuses or does not answer.
    """
    name = config.tracking.run_name
    newest = run_folder.read_newest_origin(run_folder.locate_run(config))
    if newest is not None:
        uri, (metadata, found) = newest
        if config.resume == "never":
            raise ValueError(
                f"resume=never, but run {name!r} exists, at step {metadata['step']} ({uri});"
                " choose another tracking.run_name, or resume it with --resume auto"
            )
        if type(found) is not type(config):
            raise ValueError(
                f"tracking.run_name={name!r}: that run trains another kind of model; choose another"
                " name"
            )
        changes = configuration.list_changes(found, config)
        changed = [line for key, line in changes if configuration.decides_weights(key)]
        if changed:
            raise ValueError(
                f"tracking.run_name={name!r}: that run has another configuration"
                f" ({'; '.join(changed)}); choose another name (with --resume {uri} the new run"
                " starts where this one is), or the settings it started with"
            )
        return metadata["step"]
    if config.resume in ("auto", "never"):
        return 0
    metadata, found = checkpoint.read_origin(config.resume)
    if type(found) is not type(config):
        raise ValueError(f"resume={config.resume!r}: that checkpoint is of another kind of model")
    fixed = ("model.", "representation.", "data.uri", "data.channels", "data.buckets")
    fixed += ("training.seed", "training.global_batch_size", "flow.prediction")
    fixed += ("flow.distill_from", "start.", "generator.", "data.classes", "data.format")
    if isinstance(config, Config) and config.model.kind == "transformer":
        fixed += ("data.resolution",)  # its positions are those of one size
    if 0 in [kind.data.views for kind in (config, found) if isinstance(kind, GeneratorConfig)]:
        fixed += ("data.views",)  # only with views does the network have weights for elements
    changes = configuration.list_changes(found, config)
    changed = {key: line for key, line in changes if key.startswith(fixed)}
    if changed:
        remedy = "use the same settings"
        free = ("data.uri", "data.buckets", "training.")
        ours = isinstance(config, Config) and not (
            config.start.is_diffusers or config.flow.distill_from
        )
        if ours and all(key.startswith(free) for key in changed):
            remedy += f", or begin with its weights alone: --start.model {config.resume}"
        raise ValueError(
            f"resume={config.resume!r}: that checkpoint was trained with other settings"
            f" ({'; '.join(changed.values())}); its weights, or its position in the data, would be"
            f" meaningless here: {remedy}"
        )
    if metadata["step"] >= config.training.steps:
        raise ValueError(
            f"training.steps={config.training.steps}: the checkpoint {config.resume} is already at"
            f" step {metadata['step']}; raise training.steps"
        )
    return metadata["step"]


def find_final(config: AnyConfig) -> tuple[str, dict[str, Any]]:
    """Return the URI of the last checkpoint and its metadata."""
    newest = run_folder.read_newest_origin(run_folder.locate_run(config))
    assert newest is not None, "training ended without a checkpoint"
    uri, (metadata, _) = newest
    return uri, metadata


def describe_run(config: AnyConfig, totals: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a run that was trained to its end.

    Args:
        config: Configuration of the experiment.
        totals: Totals of the last checkpoint, see `efae.training.loop`.

    Returns:
        JSON values for the summary and the report.

    Raises:
        StorageError: The storage refuses or does not answer.
    """
    events = read_events(run_folder.locate_run(config))
    return {
        "run_name": config.tracking.run_name,
        "preset": describe_preset(config),
        "steps": config.training.steps,
        "images_seen": config.training.steps * config.training.global_batch_size,
        "precision": config.training.precision,
        "commit": config.tracking.commit,
        "recoveries": max(0, sum(event.kind == "start" for event in events) - 1),
        "events": [str(event) for event in events],
        **totals,
    }


def describe_preset(config: AnyConfig) -> str:
    """Return the nearest preset and the settings that differ, except places and machines."""
    changes = {
        name: [
            line
            for key, line in configuration.list_changes(preset, config)
            if configuration.decides_weights(key) and key not in _NOT_NAMED
        ]
        for name, (_, preset) in (PRESETS if isinstance(config, Config) else GENERATORS).items()
    }
    nearest = min(changes, key=lambda name: len(changes[name]))
    return "; ".join([nearest, *changes[nearest]])


def describe_data(data: RunData) -> dict[str, Any]:
    """Return the identity of both image sets, and the credits that their licences require.

    Returns:
        "train_data" and "held_out_data", one line each, and "credits", a list of distinct lines.

    Raises:
        ValueError: An address is malformed, or has no readable index.
        StorageError: The storage refuses or does not answer.
    """
    described: dict[str, Any] = {}
    credits: dict[str, None] = {}  # an ordered set
    for role, facts in (("train", data.train), ("held_out", data.held_out)):
        described[f"{role}_data"] = facts.describe()
        if facts.credit:
            credits[facts.credit] = None
    return described | {"credits": list(credits)}


@dataclass(frozen=True)
class Product:
    """What a run has made: the averaged model, its portable programs and its evaluation."""

    model: StoredModel
    programs: Sequence[Path]
    evaluation: Evaluation


@contextmanager
def evaluate_and_export(final: str, config: Config, workers: int) -> Generator[Product]:
    """Evaluate the averaged model on the cluster, and meanwhile export its programs here.

    Args:
        final: URI of the last checkpoint.
        config: Configuration of the experiment.
        workers: Number of workers that the run ended with.

    Raises:
        CheckpointError: The checkpoint is damaged.
        StorageError: The storage refuses or does not answer.
        ray.exceptions.RayTaskError: The evaluation failed; also an instance of its cause's class.
    """
    from efae.registry.registration import export_programs

    wait_for_evaluation = start_evaluation(final, config, workers)
    weights = checkpoint.read_model(final).weights
    model = pack_model(weights, config, build_representation(config))
    with tempfile.TemporaryDirectory() as folder:
        programs: Sequence[Path] = ()
        # A folder of diffusers is used without this package as it is.
        if config.tracking.portable and config.model.kind != "diffusers":
            programs = export_programs(model, Path(folder))
        yield Product(model, programs, wait_for_evaluation())


def send_report_page(
    model: StoredModel, uri: str, credits: Sequence[str], send: Callable[[Path], None]
) -> None:
    """Write and send the page of a registered model; a failure is a warning: the model is stored.

    Args:
        model: Model.
        uri: URI of the model, for its heading.
        credits: Credits of its training images.
        send: Function that stores the page's folder.
    """
    from efae.web_page.page import ShownModel, write_page

    with tempfile.TemporaryDirectory() as scratch:
        try:
            shown = ShownModel(uri, Autoencoder.restore(model), model.digest)
            write_page([shown], Path(scratch), " ".join(credits))
            send(Path(scratch))
        except Exception as error:  # of torch, ONNX Runtime, protobuf, the storage, the server
            reason = redact(str(error)) or type(error).__name__
            logger.warning("the report card has no page: %s", reason)


def publish(
    config: Config,
    data: RunData,
    run: Run,
    product: Product,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Register the averaged model, write the report card and its page and send them to MLflow.

    Args:
        config: Configuration of the experiment; names the registered model, and a folder for the
            report if any.
        data: Facts of its shard sets.
        run: MLflow run that trained it; stores the model and the report.
        product: Model, programs and evaluation.
        facts: JSON values for the report; must have "steps".

    Returns:
        Content of the report's summary.json.

    Raises:
        StorageError: The storage refuses or does not answer.
        MlflowException: The server refuses or does not answer.
    """
    from efae.registry.registration import register_model
    from efae.report.card import write_report
    from efae.report.model_card import render_model_card

    evaluation, model = product.evaluation, product.model
    facts = facts | {"mlflow_run_id": run.id, "tensors_sha256": hash_tensors(model.weights)}
    measured = {
        "psnr": evaluation.psnr,
        "linear_psnr": evaluation.linear_psnr,
        "ssim": evaluation.ssim,
        "worst_gap_db": evaluation.worst_gap_db,
        "group_law_error": evaluation.group_law_error,
        "encoder_error": max(evaluation.encoder_error.values()),
        "held_out_loss": fmean(evaluation.loss_by_time) if evaluation.loss_by_time else None,
        "lpips": evaluation.lpips,
        "fid": evaluation.fid,
    }
    lineage = {  # for the gates of promotion, and for readers of the registry
        "run_name": config.tracking.run_name,
        "commit": config.tracking.commit,
        "kind": config.model.kind,
        "level": config.model.level,
        "group": config.representation.group,
        "train_data": data.train.id,
        "held_out_data": data.held_out.id,
        "held_out_uri": redact(config.data.held_out_uri),
        "held_out_images": str(evaluation.images),
        "image_shape": "x".join(map(str, evaluation.image_shape)),
        **describe_source(config),
    }
    # By digest: the version's number is known only after the card was stored with it.
    uri = f"models:/{config.tracking.registered_model}@sha256:{model.digest[:12]}"
    card = render_model_card(evaluation.numbers(), config, facts | {"model_uri": uri})
    version = register_model(
        model,
        config.tracking.registered_model,
        run,
        metrics={name: value for name, value in measured.items() if value is not None},
        tags=lineage,
        card=card,
        programs=product.programs,
    )
    if config.output:
        with tempfile.TemporaryDirectory() as folder:
            model.write(Path(folder), card)
            storage.upload_folder(Path(folder), Location.parse(config.output))
    with tempfile.TemporaryDirectory() as folder:
        report_folder = Path(folder)
        write_report(
            report_folder,
            numbers=evaluation.numbers(),
            pictures=evaluation.pictures,
            config=config,
            facts=facts | {"model_uri": version.uri},
            curves=run.read_curve("loss"),
            model_card=card,
        )
        summary = json.loads((report_folder / "summary.json").read_text())
        run.log_report(report_folder, summary)
        if config.tracking.report_folder:
            storage.upload_folder(report_folder, _locate_copy(config))

    def send(page: Path) -> None:
        run.log_folder(page, "report/page")
        if config.tracking.report_folder:
            storage.upload_folder(page, _locate_copy(config) / "page")

    if config.tracking.page:
        send_report_page(model, version.uri, facts["credits"], send)
    return summary


def _locate_copy(config: Config) -> Location:
    return Location.parse(config.tracking.report_folder) / config.tracking.run_name
