"""Observers of training: on rank 0, curves, validation, progress and checkpoints."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from efae.config import AnyConfig
from efae.training.checkpoint_writer import CheckpointWriter
from efae.training.monitoring.flops import Utilization
from efae.training.monitoring.profiling import StepProfiler
from efae.training.process import Process
from efae.training.state import TrainState
from efae.training.tasks.task import Measurement

if TYPE_CHECKING:
    from efae.tracking.sender import Tracker

_SAY_EVERY_SECONDS = 10.0


class Observer:
    """Ignores every event of `train`. Subclass it to observe training.

    Args:
        validation: Measurement on held-out images, on all ranks; None measures nothing.
    """

    _validation: Measurement | None = None  # also of subclasses that do not call __init__

    def __init__(self, validation: Measurement | None = None):
        self._validation = validation

    def resume(self, metadata: Mapping[str, Any]) -> None:
        """Note that training resumes from a checkpoint with this metadata."""

    def end_step(self) -> None:
        """Note the end of a step, without waiting for the device."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics after `step` updates: those of `Meter.read`, and more."""

    def validate(self, state: TrainState) -> dict[str, float]:
        """Validate the model and return measures by name; {} if nothing is measured."""
        return self._validation.measure(state) if self._validation else {}

    def save(self, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Write a checkpoint, or begin to; `metadata` holds JSON values to store with it."""

    def wait(self) -> None:
        """Return when all checkpoints are in storage."""


class RunObserver(Observer):
    """Rank 0's observer: curves to MLflow, checkpoints to storage, progress to the terminal.

    Args:
        config: Configuration of the experiment.
        process: This process.
        writer: Writer of the checkpoints.
        tracker: Sender of the curves.
        validation: Measurement on held-out images.
        say: Function that prints one line of progress.
    """

    def __init__(
        self,
        config: AnyConfig,
        process: Process,
        writer: CheckpointWriter,
        tracker: "Tracker",
        validation: Measurement,
        say: Callable[[str], None],
    ):
        super().__init__(validation)
        self._writer, self._tracker = writer, tracker
        self._progress = Progress(config.training.steps, say)
        self._utilization = Utilization(config, process.device, process.world_size)
        if self._utilization.unknown_card:
            say(
                f"{self._utilization.unknown_card}: the peak of this GPU is not in the table of"
                " efae/training/monitoring/flops.py, so no MFU is shown"
            )
        self._say, self._profiler = say, None
        if config.training.profile_steps:
            self._profiler = StepProfiler(
                config.training.profile_steps, process.device, tracker.log_figure
            )

    def resume(self, metadata: Mapping[str, Any]) -> None:
        self._tracker.resend(metadata["unsent_metrics"])
        self._progress.start_from(metadata["step"])

    def end_step(self) -> None:
        if self._profiler:
            self._profiler.step()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        metrics = {**metrics, **self._utilization.measure(metrics["images_per_second"])}
        self._tracker.log_metrics(step, metrics)
        self._progress.tick(step, metrics)

    def validate(self, state: TrainState) -> dict[str, float]:
        measured = super().validate(state)
        curves = {f"held_out/{name.removeprefix('held_out_')}": measured[name] for name in measured}
        self._tracker.log_metrics(state.step, curves)
        return measured

    def save(self, state: TrainState, metadata: Mapping[str, Any]) -> None:
        speed = metadata["totals"]["images_per_second"]
        totals = metadata["totals"] | {
            **self._utilization.measure(speed),
            "checkpoints": self._writer.saved,
            "checkpoint_stall_seconds": self._writer.stall_seconds,
        }
        # As text where JSON has no number: fp16 skips a step whose gradient is infinite.
        unsent = [
            point if math.isfinite(point.value) else (*point[:3], str(point.value))
            for point in self._tracker.unsent()
        ]
        self._writer.save(state, {**metadata, "totals": totals, "unsent_metrics": unsent})

    def wait(self) -> None:
        if self._profiler:
            self._profiler.close(self._say)
        self._writer.wait()


class Progress:
    """Prints the progress of the run, at most every few seconds.

    Args:
        steps: Length of the run, optimizer updates.
        say: Function that prints one line.
    """

    def __init__(self, steps: int, say: Callable[[str], None]):
        self._steps, self._say = steps, say
        self._began = self._said = time.monotonic()
        self._first = 0

    def start_from(self, step: int) -> None:
        """Set the step that this process starts from."""
        self._first = step

    def tick(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the progress, if it is due."""
        now = time.monotonic()
        if now - self._said < _SAY_EVERY_SECONDS and step < self._steps:
            return
        self._said = now
        left = (now - self._began) / (step - self._first) * (self._steps - step)
        filled = 20 * step // self._steps
        busy = ""
        if "flop_utilization" in metrics:
            busy = (
                f"  MFU {metrics['flop_utilization']:.0%}"
                f" ({metrics['flop_utilization_as_dense']:.0%} as dense)"
            )
        self._say(
            f"[{'#' * filled}{'.' * (20 - filled)}] step {step}/{self._steps}"
            f"  loss {metrics['loss']:.4f}  {metrics['images_per_second']:.0f} images/s{busy}"
            f"  data wait {metrics['data_wait_fraction']:.1%}"
            f"  {int(left // 60)}:{int(left % 60):02d} left"
        )
