"""Delivery of metrics, figures and texts to MLflow, without stopping or slowing training.

A background thread sends points in batches. While the server is unreachable they wait in a local
file, in order.

Every point reaches the run once. MLflow ignores a point that it already holds (same name, step,
time and value), so sending again after an unclear failure is safe; and a point at or before the
last logged step of its name is skipped, so a restart from a checkpoint repeats no step.

Only that thread imports MLflow, which takes more than a second: training does not wait for it.
"""

import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from efae.tracking.redaction import first_cause
from efae.tracking.runs import Run, find_run
from efae.tracking.server import Server
from efae.tracking.spill import Point, Spill

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from efae.tracking.system_metrics import SystemMetrics

logger = logging.getLogger(__name__)

_POINTS_PER_REQUEST = 1000  # MLflow's limit
_UNSENDABLE = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}


def default_spill_folder() -> Path:
    """Return this user's folder for waiting points, in this node's temporary folder.

    Raises:
        ValueError: Another user owns the folder, and could read and change what waits there.
    """
    folder = Path(tempfile.gettempdir()) / f"efae-spill-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise ValueError(f"{folder} belongs to another user: remove it, or set TMPDIR")
    return folder


def deliver_points(run: Run, points: Iterable[Sequence[Any]]) -> None:
    """Send the points that an ended tracker left behind and MLflow lacks.

    Args:
        run: Run that the points belong to.
        points: Points from `Tracker.unsent`; those in this node's spill folder are sent first.

    Raises:
        ConnectionError: The points could not be sent within a minute.
    """
    tracker = Tracker(run, default_spill_folder())
    tracker.resend(points)
    if not tracker.close(timeout_seconds=60):
        raise ConnectionError(f"MLflow at {run.server} does not accept the metrics")


def deliver_late_points(
    server: Server, experiment: str, run_name: str, points: Iterable[Sequence[Any]]
) -> None:
    """Send points as `deliver_points`, to the run of this name; log a warning if that fails.

    Args:
        server: MLflow server.
        experiment: Name of the run's experiment.
        run_name: Name of the run.
        points: Points from `Tracker.unsent`.
    """
    from mlflow.exceptions import MlflowException

    try:
        deliver_points(find_run(server, experiment, run_name), points)
    except (MlflowException, ValueError, OSError) as error:
        logger.warning("run %s lacks points of its curves: %s", run_name, first_cause(error))


class Tracker:
    """Sends metrics, figures and texts of one run from a background thread.

    `spill_folder` is local and outlives the process: points that could not be sent wait there, and
    the run's next tracker on this node sends them. MLflow's own settings decide how soon an
    outage is detected; see `efae.tracking.timeouts`.

    Args:
        run: Existing run; its server need not answer.
        spill_folder: Folder of waiting points; created if missing.
        send_interval_seconds: Longest wait between two rounds of sending.
        queue_size: Most calls of `log_metrics` that wait in memory.
        system_metrics_interval_seconds: Time between two samples of CPU, memory, disk, network and
            GPU; None: no samples.

    Attributes:
        spilled: Number of points that had to wait.
        dropped: Number of points lost, because the queue was full or MLflow refused them.
    """

    def __init__(
        self,
        run: Run,
        spill_folder: Path,
        *,
        send_interval_seconds: float = 2.0,
        queue_size: int = 10_000,
        system_metrics_interval_seconds: float | None = None,
    ):
        self.dropped = 0
        self.spilled = 0
        self._run = run
        self._spill = Spill(spill_folder / f"{run.id}.jsonl")
        self._outbox = spill_folder / run.id
        self._queue: deque[tuple[int, int, dict[str, float]]] = deque()
        self._in_flight: list[Point] = []
        self._transfer_lock = threading.Lock()
        self._queue_size = queue_size
        self._last_steps: dict[str, int] | None = None
        self._unreachable = False
        self._send_interval_seconds = send_interval_seconds
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._system_metrics_interval_seconds = system_metrics_interval_seconds
        self._system_metrics: SystemMetrics | None = None
        self._thread = threading.Thread(target=self._work, name="efae-tracker", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue one value per name; return at once, and never raise.

        Values that are not numbers are dropped with a warning.
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
        """Return the points that MLflow may lack; a checkpoint keeps them beyond this node."""
        with self._transfer_lock:  # or points on their way from queue to flight would be missed
            points = [*self._spill.read(), *self._in_flight, *_split_points(list(self._queue))]
        return [point for point in points if not point.name.startswith("system/")]

    def resend(self, points: Iterable[Sequence[Any]]) -> None:
        """Queue the `unsent` points of another tracker of the run; points sent are skipped.

        A value may be text, such as "nan" or "inf", which JSON has no number for.
        """
        for name, step, time_ms, value in points:
            self._queue.append((step, time_ms, {name: float(value)}))

    def log_figure(self, path: Path, name: str) -> None:
        """Queue a copy of the file `path` as the artifact `name`, such as figures/step-100.png."""
        try:
            self._post(path.read_bytes(), name)
        except OSError as error:
            logger.warning("figure %s is not logged: %s", name, error)

    def log_text(self, text: str, name: str) -> None:
        """Queue a text as the artifact `name`."""
        try:
            self._post(text.encode(), name)
        except OSError as error:
            logger.warning("text %s is not logged: %s", name, error)

    def close(self, timeout_seconds: float = 15.0) -> bool:
        """Send what is left; return False if some of it stays in the spill folder."""
        self._closing.set()
        if self._system_metrics is not None:
            self._system_metrics.finish()
        self._wake.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive() or not self._spill.is_empty() or self._list_artifacts():
            logger.warning(
                "MLflow at %s is unreachable: what it lacks of run %s is kept in %s",
                *(self._run.server, self._run.id, self._outbox.parent),
            )
            return False
        shutil.rmtree(self._outbox, ignore_errors=True)  # empty folders
        return True

    def _post(self, content: bytes, name: str) -> None:
        # The rename shows the file to the background thread only once it is complete.
        target = self._outbox / PurePosixPath(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._outbox.parent, delete=False) as draft:
            draft.write(content)
        Path(draft.name).replace(target)

    def _list_artifacts(self) -> list[Path]:
        return sorted(path for path in self._outbox.rglob("*") if path.is_file())

    @cached_property
    def _client(self) -> "MlflowClient":
        return self._run.server.client()

    def _work(self) -> None:
        last_round = False
        while not last_round:
            self._wake.wait(self._send_interval_seconds)
            self._wake.clear()
            last_round = self._closing.is_set()
            with self._transfer_lock:
                self._in_flight = _split_points(
                    self._queue.popleft() for _ in range(len(self._queue))
                )
            try:
                self._deliver(self._in_flight)
            except OSError as error:  # the local disk is full or gone; training continues
                lost = len(self._in_flight)
                self.dropped += lost
                logger.warning("run %s: lost %d points: %s", self._run.id, lost, error)
            self._in_flight = []

    def _deliver(self, points: list[Point]) -> None:
        if not self._spill.is_empty() or not self._send(points):
            self._spill.append(points)
            self.spilled += len(points)
            self._spill.drain(self._send)
        if not self._unreachable:
            self._send_artifacts()

    def _send(self, points: list[Point]) -> bool:
        """Send the points that the run lacks; return False if the server is unreachable."""
        from mlflow.exceptions import MlflowException

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
            if not self._unreachable:
                logger.warning(
                    "MLflow at %s is unreachable (%s): points wait in %s",
                    *(self._run.server, first_cause(error), self._spill.path),
                )
            self._unreachable = True
            return False
        if self._unreachable:
            logger.warning("MLflow at %s is reachable again", self._run.server)
        self._unreachable = False
        return True

    def _send_batch(self, points: list[Point]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [Metric(name, value, time_ms, step) for name, step, time_ms, value in points]
        try:
            self._client.log_batch(self._run.id, metrics=metrics, synchronous=True)
        except MlflowException as error:
            if error.error_code not in _UNSENDABLE:
                raise
            if len(points) > 1:  # one bad point must not cost the others
                self._send_batch(points[: len(points) // 2])
                self._send_batch(points[len(points) // 2 :])
            else:
                self.dropped += 1
                logger.warning("MLflow refuses %s: %s", points[0], first_cause(error))

    def _connect(self) -> dict[str, int]:
        """Return the last logged step of each metric, read once, when the server first answers."""
        if self._last_steps is None:
            metrics = self._client.get_run(self._run.id).data.to_proto().metrics
            self._last_steps = {metric.key: metric.step for metric in metrics}
            if self._system_metrics_interval_seconds is not None and not self._closing.is_set():
                from efae.tracking.system_metrics import SystemMetrics

                self._system_metrics = SystemMetrics(
                    self.log_metrics,
                    self._run,
                    self._system_metrics_interval_seconds,
                    _next_system_step(self._last_steps),
                )
                self._system_metrics.start()
        return self._last_steps

    def _send_artifacts(self) -> None:
        from mlflow.exceptions import MlflowException

        for path in self._list_artifacts():
            folder = path.relative_to(self._outbox).parent.as_posix()
            try:
                self._client.log_artifact(
                    self._run.id, str(path), None if folder == "." else folder
                )
            except (MlflowException, OSError) as error:
                logger.info("artifact %s waits: %s", path.name, first_cause(error))
                return
            path.unlink()


def _split_points(queued: Iterable[tuple[int, int, dict[str, float]]]) -> list[Point]:
    return [
        Point(name, step, time_ms, value)
        for step, time_ms, metrics in queued
        for name, value in metrics.items()
    ]


def _next_system_step(last_steps: Mapping[str, int]) -> int:
    return 1 + max((s for name, s in last_steps.items() if name.startswith("system/")), default=-1)
