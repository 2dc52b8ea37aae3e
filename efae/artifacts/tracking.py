"""Configuration, metrics and figures of a run -> MLflow, which never stops or slows training.

Only `MlflowClient` with explicit run ids: MLflow's fluent API keeps a "current run" per process and
thread, and a restarted worker would open a second one. A `Tracker` hands points to a background
thread, which sends them in batches. While the server is away they wait in a local file, in order.

Every point reaches the run once. MLflow ignores a point that it already holds (same name, step,
time and value), so sending again after an unclear failure is safe; and a point at or before the
last logged step of its name is skipped, so a restart from a checkpoint repeats no step.
"""

import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from efae import config as configuration
from efae.artifacts.spill import Point, Spill
from efae.config import Config

logger = logging.getLogger(__name__)

_POINTS_PER_REQUEST = 1000  # MLflow's limit
_UNSENDABLE = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}
_QUICK = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
PATIENT = {  # for whole files
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "120",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@contextmanager
def request_limits(limits: Mapping[str, str]) -> Generator[None]:
    """MLflow's HTTP settings for a while; they exist only as environment of the process.

    Args:
        limits: environment variables by name, such as `PATIENT`.
    """
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


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
    try:
        with request_limits(_QUICK):
            MlflowClient(tracking_uri).search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"MLflow at {redact(tracking_uri)} does not answer ({_reason(error)}); start the"
            " local stack (make up) or set MLFLOW_TRACKING_URI to a running server"
        ) from error


def find_or_create_run(
    tracking_uri: str, experiment: str, run_name: str, tags: Mapping[str, str]
) -> tuple[str, bool]:
    """The id of the run to log to, and whether it existed.

    The newest run of that name is continued unless it is FINISHED.

    Args:
        tracking_uri: of the MLflow server, here and in the functions below.
        experiment: its name; made if there is none.
        run_name: without single quotes.
        tags: of a new run.

    Raises:
        ValueError: a deleted experiment, or a name that MLflow cannot search for.
        MlflowException: the server refuses or does not answer, here and in the functions below.
    """
    if "'" in run_name or not run_name:
        raise ValueError(f"tracking.run_name={run_name!r}: use a name without single quotes")
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
    client = MlflowClient(tracking_uri)
    newest = client.search_runs(
        [_find_or_create_experiment(client, experiment)],
        filter_string=f"attributes.run_name = '{run_name}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return newest[0].info.run_id if newest and newest[0].info.status != "FINISHED" else None


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
    """Where a browser shows the run."""
    experiment_id = MlflowClient(tracking_uri).get_run(run_id).info.experiment_id
    return f"{tracking_uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def log_config(tracking_uri: str, run_id: str, config: Config) -> None:
    """Logs the tree as dotted parameters and as the artifact config.json, without secrets.

    MLflow's parameters are written once: a continued run keeps its first ones, and config.json
    shows the newest.
    """
    client = MlflowClient(tracking_uri)
    logged = client.get_run(run_id).data.params
    params = [
        Param(name, redact(str(value)))
        for name, value in configuration.flatten(config).items()
        if name not in logged
    ]
    client.log_batch(run_id, params=params)
    client.log_text(run_id, redact(configuration.to_json(config)), "config.json")


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
        logger.warning("run %s could not be marked %s: %s", run_id, status, _reason(error))


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


def redact(text: str) -> str:
    """`text` without the passwords and keys that URIs can carry."""
    text = re.sub(r"(?<=://)[^/\s\"'@]+@", "***@", text)
    pattern = r"(?i)([?&][^=&\s\"']*(?:key|secret|token|password|signature)[^=&\s\"']*=)[^&\s\"']+"
    return re.sub(pattern, r"\1***", text)


class Tracker:
    """Sends metrics, figures and texts of one run from a background thread.

    `spill_folder` is local and outlives the process: what could not be sent waits there and is
    sent by the next tracker of the run on this node.

    Args:
        tracking_uri: of the MLflow server; it need not answer.
        run_id: an existing run.
        spill_folder: made if need be.
        send_interval_seconds: longest wait between two rounds of sending.
        queue_size: calls of `log_metrics` that may wait in memory.
        system_metrics_interval_seconds: between two samples of CPU, memory, disk, network and
            GPU; None takes none.

    Attributes:
        spilled: points that had to wait.
        dropped: points that were lost (the queue was full, or MLflow refused them).
    """

    def __init__(
        self,
        tracking_uri: str,
        run_id: str,
        spill_folder: Path,
        *,
        send_interval_seconds: float = 2.0,
        queue_size: int = 10_000,
        system_metrics_interval_seconds: float | None = None,
    ):
        for name, value in _QUICK.items():
            os.environ.setdefault(name, value)  # an outage shows in seconds, not in minutes
        self.dropped = 0
        self.spilled = 0
        self._client = MlflowClient(tracking_uri)
        self._tracking_uri = tracking_uri
        self._run_id = run_id
        self._address = redact(tracking_uri)
        self._spill = Spill(spill_folder / f"{run_id}.jsonl")
        self._outbox = spill_folder / run_id
        self._queue: deque[tuple[int, int, dict[str, float]]] = deque()
        self._in_flight: list[Point] = []
        self._handing_over = threading.Lock()
        self._queue_size = queue_size
        self._last_steps: dict[str, int] | None = None
        self._away = False
        self._send_interval_seconds = send_interval_seconds
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._system_metrics_interval_seconds = system_metrics_interval_seconds
        self._system_metrics: _SystemMetrics | None = None
        self._thread = threading.Thread(target=self._run, name="efae-tracker", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues one value per name; returns at once and never raises.

        What is not a number is dropped with a warning.
        """
        if len(self._queue) >= self._queue_size:
            self.dropped += len(metrics)
            return
        values: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                values[name] = float(value)
            except (TypeError, ValueError) as error:
                self.dropped += 1
                logger.warning("metric %s=%r is not logged: %s", name, value, error)
        self._queue.append((int(step), time.time_ns() // 1_000_000, values))
        if len(self._queue) >= 100:
            self._wake.set()

    def unsent(self) -> list[Point]:
        """What MLflow may not have yet, for a checkpoint: if this process is killed, it is lost.

        Points that an outage left in the spill folder are safe there, and not among them.
        """
        with self._handing_over:
            points = [*self._in_flight, *_split_points(list(self._queue))]
        return [point for point in points if not point.name.startswith("system/")]

    def resend(self, points: Iterable[Sequence[Any]]) -> None:
        """Queues what `unsent` gave to another tracker of the run; what arrived is skipped."""
        for name, step, time_ms, value in points:
            self._queue.append((step, time_ms, {name: value}))

    def log_figure(self, path: Path, name: str) -> None:
        """Queues a copy of the file `path` as the artifact `name`, such as figures/step-100.png."""
        try:
            self._post(path.read_bytes(), name)
        except OSError as error:
            logger.warning("figure %s is not logged: %s", name, error)

    def log_text(self, text: str, name: str) -> None:
        """Queues a text as the artifact `name`."""
        try:
            self._post(text.encode(), name)
        except OSError as error:
            logger.warning("text %s is not logged: %s", name, error)

    def close(self, timeout_seconds: float = 15.0) -> None:
        """Sends what is left; what cannot be sent in time stays in the spill folder."""
        self._closing.set()
        if self._system_metrics is not None:
            self._system_metrics.finish()
        self._wake.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive() or not self._spill.is_empty() or self._letters():
            logger.warning(
                "MLflow at %s is away: what it lacks of run %s is kept in %s",
                *(self._address, self._run_id, self._outbox.parent),
            )
        else:
            shutil.rmtree(self._outbox, ignore_errors=True)  # empty folders

    def _post(self, content: bytes, name: str) -> None:
        # A rename makes the letter visible to the background thread only when it is complete.
        target = self._outbox / PurePosixPath(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._outbox.parent, delete=False) as draft:
            draft.write(content)
        Path(draft.name).replace(target)

    def _letters(self) -> list[Path]:
        return sorted(path for path in self._outbox.rglob("*") if path.is_file())

    def _run(self) -> None:
        last_round = False
        while not last_round:
            self._wake.wait(self._send_interval_seconds)
            self._wake.clear()
            last_round = self._closing.is_set()
            with self._handing_over:
                self._in_flight = _split_points(
                    self._queue.popleft() for _ in range(len(self._queue))
                )
            try:
                self._deliver(self._in_flight)
            except OSError as error:  # the local disk is full or gone; training goes on
                lost = len(self._in_flight)
                self.dropped += lost
                logger.warning("run %s: %d points are lost: %s", self._run_id, lost, error)
            self._in_flight = []

    def _deliver(self, points: list[Point]) -> None:
        if not self._spill.is_empty() or not self._send(points):
            self._spill.append(points)
            self.spilled += len(points)
            self._spill.drain(self._send)
        if not self._away:
            self._send_letters()

    def _send(self, points: list[Point]) -> bool:
        """Sends points that the run does not have yet; False if the server is away."""
        try:
            last_steps = dict(self._connect())
            fresh: list[Point] = []
            for point in points:
                if point.step > last_steps.get(point.name, -1):
                    fresh.append(point)
                    last_steps[point.name] = point.step
            for start in range(0, len(fresh), _POINTS_PER_REQUEST):
                self._send_batch(fresh[start : start + _POINTS_PER_REQUEST])
            self._last_steps = last_steps
        except (MlflowException, OSError) as error:
            if not self._away:
                logger.warning(
                    "MLflow at %s is away (%s): points wait in %s",
                    *(self._address, _reason(error), self._spill.path),
                )
            self._away = True
            return False
        if self._away:
            logger.warning("MLflow at %s is back", self._address)
        self._away = False
        return True

    def _send_batch(self, points: list[Point]) -> None:
        metrics = [Metric(name, value, time_ms, step) for name, step, time_ms, value in points]
        try:
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        except MlflowException as error:
            if error.error_code not in _UNSENDABLE:
                raise
            if len(points) > 1:  # one bad point must not take the others along
                self._send_batch(points[: len(points) // 2])
                self._send_batch(points[len(points) // 2 :])
            else:
                self.dropped += 1
                logger.warning("MLflow refuses %s: %s", points[0], _reason(error))

    def _connect(self) -> dict[str, int]:
        """The last logged step of each metric; asked once, when the server first answers."""
        if self._last_steps is None:
            metrics = self._client.get_run(self._run_id).data.to_proto().metrics
            self._last_steps = {metric.key: metric.step for metric in metrics}
            if self._system_metrics_interval_seconds is not None and not self._closing.is_set():
                self._system_metrics = _SystemMetrics(
                    self,
                    self._tracking_uri,
                    self._run_id,
                    self._system_metrics_interval_seconds,
                    _next_system_step(self._last_steps),
                )
                self._system_metrics.start()
        return self._last_steps

    def _send_letters(self) -> None:
        for path in self._letters():
            folder = path.relative_to(self._outbox).parent.as_posix()
            try:
                self._client.log_artifact(
                    self._run_id, str(path), None if folder == "." else folder
                )
            except (MlflowException, OSError) as error:
                logger.info("artifact %s waits: %s", path.name, _reason(error))
                return
            path.unlink()


def _split_points(queued: Iterable[tuple[int, int, dict[str, float]]]) -> list[Point]:
    return [
        Point(name, step, time_ms, value)
        for step, time_ms, metrics in queued
        for name, value in metrics.items()
    ]


class _SystemMetrics(SystemMetricsMonitor):
    """MLflow's own sampler of CPU, memory, disk, network and GPU, delivered by a tracker.

    MLflow's delivery ends for good at the first request that fails.
    """

    def __init__(
        self,
        tracker: Tracker,
        tracking_uri: str,
        run_id: str,
        interval_seconds: float,
        first_step: int,
    ):
        super().__init__(run_id, tracking_uri=tracking_uri)
        self._tracker = tracker
        self._interval_seconds = interval_seconds
        self._logging_step = first_step

    def monitor(self) -> None:
        while not self._shutdown_event.wait(self._interval_seconds):
            self.collect_metrics()
            metrics = cast(dict[str, float], self.aggregate_metrics())  # MLflow does not type it
            self._tracker.log_metrics(
                self._logging_step, {f"system/{name}": value for name, value in metrics.items()}
            )
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()


def _next_system_step(last_steps: Mapping[str, int]) -> int:
    return 1 + max((s for name, s in last_steps.items() if name.startswith("system/")), default=-1)


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause; MLflow wraps a refused connection four times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return redact(str(error).splitlines()[0][:200]) if str(error) else type(error).__name__
