"""A trained tokenizer made public: evaluated, exported, registered, with a report and a page."""

import json
import logging
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from data_pipelines import storage
from data_pipelines.storage import Location
from efae.checkpoints import checkpoint
from efae.config import Config
from efae.evaluation.results import Evaluation
from efae.evaluation_task import start_evaluation
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import StoredModel, hash_tensors, pack_model
from efae.model.representation import build_representation
from efae.preflight.driver_checks import RunData
from efae.tracking.redaction import redact
from efae.tracking.runs import Run
from efae.training.starts.source import describe_source

logger = logging.getLogger(__name__)


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
    from efae.report.card import require_finite, write_report
    from efae.report.model_card import render_model_card

    evaluation, model = product.evaluation, product.model
    require_finite(evaluation.numbers())  # before a version of the registry says otherwise
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
