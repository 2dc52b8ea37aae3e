"""A run in MLflow: find or create it by name, log its configuration and report, end it.

Importing this module does not import MLflow; see `efae.tracking.server`.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from efae.config import AnyConfig
from efae.config import forms as configuration
from efae.names import is_named
from efae.tracking.redaction import first_cause, redact, redact_strings
from efae.tracking.server import Server

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

logger = logging.getLogger(__name__)

PARENT = "mlflow.parentRunId"
"""Tag that nests a run below another in MLflow's pages."""


@dataclass(frozen=True)
class Run:
    """A run that exists on a server; two short strings, which Ray sends to workers.

    Unless stated otherwise, methods raise MlflowException if the server refuses or does not
    answer.

    Attributes:
        server: Server that holds the run.
        id: Run id that MLflow assigned.
    """

    server: Server
    id: str

    def find_url(self) -> str:
        """Return the address of the run's page, without a password, since it is printed."""
        experiment_id = self.server.client().get_run(self.id).info.experiment_id
        return f"{str(self.server).rstrip('/')}/#/experiments/{experiment_id}/runs/{self.id}"

    def log_config(self, config: AnyConfig) -> None:
        """Log the configuration as dotted parameters and as config.json, without secrets.

        MLflow writes a parameter once: a resumed run keeps its first ones, and config.json holds
        the newest.
        """
        self.log_params(configuration.flatten(config))
        text = json.dumps(redact_strings(asdict(config)), indent=2)
        self.server.client().log_text(self.id, text, "config.json")

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log values as parameters, without secrets; parameters logged before keep their value."""
        from mlflow.entities import Param

        client = self.server.client()
        logged = client.get_run(self.id).data.params
        params = [
            Param(name, redact(str(value))) for name, value in values.items() if name not in logged
        ]
        client.log_batch(self.id, params=params)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers synchronously; during training, use a `Tracker` instead."""
        from mlflow.entities import Metric

        time_ms = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, time_ms, step) for name, value in values.items()]
        self.server.client().log_batch(self.id, metrics=metrics, synchronous=True)

    def log_report(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """Store the files as artifacts below report/, the numbers of `summary` as summary/ metrics.

        Raises:
            KeyError: The summary lacks "steps", the step of the metrics.
            MlflowException: The server refuses or does not answer.
        """
        numbers = {
            f"summary/{name}": float(value)
            for name, value in summary.items()
            if isinstance(value, int | float)
        }
        step = int(summary["steps"])
        self.log_folder(folder, "report")
        self.log_metrics(step, numbers)

    def log_folder(self, folder: Path, name: str) -> None:
        """Store the files as artifacts below `name`; MlflowException as in `log_report`."""
        self.server.client().log_artifacts(self.id, str(folder), name)

    def read_curve(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) pairs of one metric by step; [] if it was never logged."""
        history = self.server.client().get_metric_history(self.id, name)
        return sorted((point.step, point.value) for point in history)

    def reopen(self) -> None:
        """Mark a run that had ended as running again."""
        self.server.client().update_run(self.id, status="RUNNING")

    def finish(self, status: str) -> None:
        """End the run; log a warning if MLflow does not accept it.

        Args:
            status: Status, one of "FINISHED", "FAILED" and "KILLED".
        """
        from mlflow.exceptions import MlflowException

        try:
            self.server.client().set_terminated(self.id, status)
        except MlflowException as error:
            logger.warning("run %s could not be marked %s: %s", self.id, status, first_cause(error))


def find_or_create_run(
    server: Server, experiment: str, run_name: str, tags: Mapping[str, str]
) -> tuple[Run, bool]:
    """Return the run to log to, and whether it existed.

    The newest run of that name resumes unless it is FINISHED.

    Args:
        server: MLflow server, here and in the functions below.
        experiment: Name of the experiment; created if missing.
        run_name: Name of the run; not empty.
        tags: Tags of a new run.

    Raises:
        ValueError: The experiment is deleted, or the name is empty.
        MlflowException: The server refuses or does not answer, here and in the functions below.
    """
    if not run_name:
        raise ValueError("tracking.run_name='': name the run")
    found = find_unfinished_run(server, experiment, run_name)
    if found is not None:
        found.reopen()
        return found, True
    client = server.client()
    experiment_id = _find_or_create_experiment(client, experiment)
    made = client.create_run(experiment_id, run_name=run_name, tags=dict(tags))
    return Run(server, made.info.run_id), False


def find_unfinished_run(server: Server, experiment: str, run_name: str) -> Run | None:
    """Return the newest run of that name; None if there is none or it is FINISHED.

    Raises:
        ValueError: The experiment is deleted.
    """
    newest = _find_newest_run(server, experiment, run_name)
    return Run(server, newest.run_id) if newest and newest.status != "FINISHED" else None


def find_run(server: Server, experiment: str, run_name: str) -> Run:
    """Return the newest run of that name.

    Raises:
        ValueError: There is no such run.
    """
    newest = _find_newest_run(server, experiment, run_name)
    if newest is None:
        raise ValueError(f"MLflow has no run {run_name!r} in experiment {experiment!r}")
    return Run(server, newest.run_id)


def _find_newest_run(server: Server, experiment: str, run_name: str) -> "RunInfo | None":
    client = server.client()
    experiment_id = _find_or_create_experiment(client, experiment)
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id],
            filter_string=f"attributes.run_name {is_named(run_name)}",
            order_by=["attributes.start_time DESC"],
            max_results=50,
            page_token=token,
        )
        for run in page:
            if run.info.run_name == run_name:
                return run.info
        token = cast(str | None, page.token)
        if not token:
            return None


def _find_or_create_experiment(client: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another driver created it first
    if found is None or found.lifecycle_stage != "active":
        raise ValueError(
            f"tracking.experiment={name!r} is deleted in MLflow: restore it or use another name"
        )
    return found.experiment_id


def end_trial(
    server: Server,
    experiment: str,
    run_name: str,
    status: str,
    metrics: Mapping[str, float],
    step: int,
) -> None:
    """Log last metrics to the run of this name and end it, if it has not ended.

    If MLflow does not accept it, only a warning is logged: the sweep continues, and tries again at
    its end.

    Args:
        server: MLflow server.
        experiment: Name of the run's experiment.
        run_name: Name of the run.
        status: Status, as in `Run.finish`.
        metrics: Last metrics; values that are not finite are left out.
        step: Step of the metrics.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = find_unfinished_run(server, experiment, run_name)
        if run is not None:
            run.log_metrics(step, {name: v for name, v in metrics.items() if isfinite(v)})
            run.finish(status)
    except MlflowException as error:
        logger.warning("run %s could not be ended: %s", run_name, first_cause(error))
