"""What the driver asks of MLflow: a run to log to, its configuration, its end and its report.

Only `MlflowClient` with explicit run ids: MLflow's fluent API keeps a "current run" per process and
thread, and a restarted worker would open a second one.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunInfo
from mlflow.exceptions import MlflowException

from efae import config_forms as configuration
from efae.config import Config
from efae.names import is_named
from efae.tracking.redaction import first_cause, redact
from efae.tracking.timeouts import PATIENT, QUICK, request_limits

logger = logging.getLogger(__name__)

PARENT = "mlflow.parentRunId"
"""The tag that hangs a run below another in MLflow's pages."""


def check_server(tracking_uri: str) -> None:
    """Asks the MLflow server one small question.

    Raises:
        ValueError: not an http(s) address, or no proper answer within seconds.
    """
    if urlsplit(tracking_uri).scheme not in ("http", "https"):
        raise ValueError(
            f"MLflow at {redact(tracking_uri)!r}: workers on other nodes cannot reach it; start a"
            " server (make up) and set MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(  # before the client does, whose error repeats it
            "MLFLOW_TRACKING_TOKEN holds a line break, a space or a character outside ASCII: set it"
            " again, to the token alone"
        )
    try:
        with request_limits(QUICK):
            MlflowClient(tracking_uri).search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        if status := _find_refusal(error):
            raise ValueError(
                f"MLflow at {redact(tracking_uri)} refuses these credentials ({status}): set"
                " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN,"
                " to what the server accepts"
            ) from error
        raise ValueError(
            f"MLflow at {redact(tracking_uri)} does not answer ({first_cause(error)}); start the"
            " local stack (make up) or set MLFLOW_TRACKING_URI to a running server"
        ) from error


def _find_refusal(error: Exception) -> int | None:
    """401 or 403, where the server, or a proxy before it, answered so."""
    status = error.get_http_status_code() if isinstance(error, MlflowException) else None
    if status in (401, 403):
        return status
    found = re.search(r"error code (401|403)\b", str(error))
    return int(found[1]) if found else None


def find_or_create_run(
    tracking_uri: str, experiment: str, run_name: str, tags: Mapping[str, str]
) -> tuple[str, bool]:
    """The id of the run to log to, and whether it existed.

    The newest run of that name is continued unless it is FINISHED.

    Args:
        tracking_uri: of the MLflow server, here and in the functions below.
        experiment: its name; made if there is none.
        run_name: its name; not "".
        tags: of a new run.

    Raises:
        ValueError: a deleted experiment, or no name.
        MlflowException: the server refuses or does not answer, here and in the functions below.
    """
    if not run_name:
        raise ValueError("tracking.run_name='': name the run")
    client = MlflowClient(tracking_uri)
    run_id = find_unfinished_run(tracking_uri, experiment, run_name)
    if run_id is not None:
        client.update_run(run_id, status="RUNNING")
        return run_id, True
    experiment_id = _find_or_create_experiment(client, experiment)
    run = client.create_run(experiment_id, run_name=run_name, tags=dict(tags))
    return run.info.run_id, False


def find_unfinished_run(tracking_uri: str, experiment: str, run_name: str) -> str | None:
    """The id of the newest run of that name, if there is one and it is not FINISHED.

    Raises:
        ValueError: the experiment is deleted.
    """
    newest = _find_newest_run(tracking_uri, experiment, run_name)
    return newest.run_id if newest and newest.status != "FINISHED" else None


def find_run(tracking_uri: str, experiment: str, run_name: str) -> str:
    """The id of the newest run of that name.

    Raises:
        ValueError: there is none.
    """
    newest = _find_newest_run(tracking_uri, experiment, run_name)
    if newest is None:
        raise ValueError(f"MLflow has no run {run_name!r} in experiment {experiment!r}")
    return newest.run_id


def _find_newest_run(tracking_uri: str, experiment: str, run_name: str) -> RunInfo | None:
    client = MlflowClient(tracking_uri)
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


def _find_or_create_experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another driver was faster
    if found is None or found.lifecycle_stage != "active":
        raise ValueError(
            f"tracking.experiment={name!r} is deleted in MLflow: restore it or use another name"
        )
    return found.experiment_id


def find_run_url(tracking_uri: str, run_id: str) -> str:
    """Where a browser shows the run; without a password, since it is printed."""
    experiment_id = MlflowClient(tracking_uri).get_run(run_id).info.experiment_id
    return f"{redact(tracking_uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def log_config(tracking_uri: str, run_id: str, config: Config) -> None:
    """Logs the tree as dotted parameters and as the artifact config.json, without secrets.

    MLflow's parameters are written once: a continued run keeps its first ones, and config.json
    shows the newest.
    """
    log_params(tracking_uri, run_id, configuration.flatten(config))
    text = redact(configuration.to_json(config))
    MlflowClient(tracking_uri).log_text(run_id, text, "config.json")


def log_params(tracking_uri: str, run_id: str, values: Mapping[str, Any]) -> None:
    """Logs values as parameters, without secrets; those that were logged before stay."""
    client = MlflowClient(tracking_uri)
    logged = client.get_run(run_id).data.params
    params = [
        Param(name, redact(str(value))) for name, value in values.items() if name not in logged
    ]
    client.log_batch(run_id, params=params)


def end_trial(
    tracking_uri: str,
    experiment: str,
    run_name: str,
    status: str,
    metrics: Mapping[str, float],
    step: int,
) -> None:
    """Ends the run of this name with last metrics, if it has not ended.

    Warns where MLflow cannot be told: a sweep goes on meanwhile, and tells it again at its end.

    Args:
        tracking_uri: of the MLflow server.
        experiment: of the run.
        run_name: of the run.
        status: see `finish_run`.
        metrics: what is not finite is left out.
        step: of the metrics.
    """
    time_ms = time.time_ns() // 1_000_000
    found = [
        Metric(name, value, time_ms, step) for name, value in metrics.items() if isfinite(value)
    ]
    try:
        run_id = find_unfinished_run(tracking_uri, experiment, run_name)
        if run_id is not None:
            MlflowClient(tracking_uri).log_batch(run_id, metrics=found)
            finish_run(tracking_uri, run_id, status)
    except MlflowException as error:
        logger.warning("run %s could not be ended: %s", run_name, first_cause(error))


def reopen_run(tracking_uri: str, run_id: str) -> None:
    """Marks a run that had ended as running again."""
    MlflowClient(tracking_uri).update_run(run_id, status="RUNNING")


def finish_run(tracking_uri: str, run_id: str, status: str) -> None:
    """Ends the run; warns where MLflow cannot be told.

    Args:
        tracking_uri: of the MLflow server.
        run_id: the run.
        status: "FINISHED", "FAILED" or "KILLED".
    """
    try:
        MlflowClient(tracking_uri).set_terminated(run_id, status)
    except MlflowException as error:
        logger.warning("run %s could not be marked %s: %s", run_id, status, first_cause(error))


def log_report(tracking_uri: str, run_id: str, folder: Path, summary: Mapping[str, Any]) -> None:
    """Stores the files as artifacts below report/, the numbers of `summary` as summary/ metrics.

    Raises:
        KeyError: the summary lacks "steps", which the metrics are logged at.
    """
    step, time_ms = int(summary["steps"]), time.time_ns() // 1_000_000
    metrics = [
        Metric(f"summary/{name}", float(value), time_ms, step)
        for name, value in summary.items()
        if isinstance(value, int | float)
    ]
    client = MlflowClient(tracking_uri)
    with request_limits(PATIENT):
        client.log_artifacts(run_id, str(folder), "report")
        client.log_batch(run_id, metrics=metrics, synchronous=True)


def read_curve(tracking_uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, in order of steps; [] if it was never logged."""
    history = MlflowClient(tracking_uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in history)
