"""MLflow's sampler of CPU, memory, disk, network and GPU, delivered by a tracker."""

from collections.abc import Callable, Mapping
from typing import cast

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from efae.tracking.runs import Run


class SystemMetrics(SystemMetricsMonitor):
    """MLflow's own sampler of CPU, memory, disk, network and GPU, delivered by a tracker.

    MLflow's own delivery ends for good at the first request that fails.

    Args:
        log_metrics: Function that takes the number of a sample and its values by name.
        run: Run that is sampled.
        interval_seconds: Time between two samples.
        first_step: Number of the first sample.
    """

    def __init__(
        self,
        log_metrics: Callable[[int, Mapping[str, float]], None],
        run: Run,
        interval_seconds: float,
        first_step: int,
    ):
        super().__init__(run.id, tracking_uri=run.server.uri)
        self._log_metrics = log_metrics
        self._interval_seconds = interval_seconds
        self._logging_step = first_step

    def monitor(self) -> None:
        while not self._shutdown_event.wait(self._interval_seconds):
            self.collect_metrics()
            metrics = cast(dict[str, float], self.aggregate_metrics())  # MLflow does not type it
            self._log_metrics(
                self._logging_step, {f"system/{name}": value for name, value in metrics.items()}
            )
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()
