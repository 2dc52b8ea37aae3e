"""Training in a run of MLflow, to the last checkpoint."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from efae.checkpoints import run_folder
from efae.config import AnyConfig
from efae.config import forms as configuration
from efae.experiment.resumption import find_start
from efae.ray_trainer import run_training
from efae.tracking import runs
from efae.tracking.runs import Run
from efae.tracking.server import Server

MLFLOW_PATIENCE_SECONDS = 60


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


def find_final(config: AnyConfig) -> tuple[str, dict[str, Any]]:
    """Return the URI of the last checkpoint and its metadata."""
    newest = run_folder.read_newest_origin(run_folder.locate_run(config))
    assert newest is not None, "training ended without a checkpoint"
    uri, (metadata, _) = newest
    return uri, metadata


def import_publishing() -> None:
    """Import what `publish` needs, MLflow above all, in a second that would pass in waiting."""
    import efae.registry.registration  # pyright: ignore[reportUnusedImport]
    import efae.report.card  # noqa: F401  # pyright: ignore[reportUnusedImport]


def wait_for_mlflow(server: Server, again: str, say: Callable[[str], None]) -> None:
    """Wait until the server answers: it may have become unreachable while the run trained.

    Args:
        server: MLflow server.
        again: Option of the command line that resumes the work, for the message.
        say: Function that prints one line of progress.

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
                    f"trained, but not registered: {error}. Nothing is lost: submit again with"
                    f" {again} when it is back"
                ) from error
            say(f"waiting for MLflow, up to {MLFLOW_PATIENCE_SECONDS} s more: {error}")
            time.sleep(5)
