"""Checkpoints written by a background thread, one in flight: training pauses only for the copy."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from data_pipelines.storage import Location, LocationLike
from efae.checkpoints.checkpoint import checkpoint_name, write_checkpoint
from efae.checkpoints.events import record_event
from efae.checkpoints.run_folder import prune_checkpoints
from efae.config import AnyConfig
from efae.training.state import TrainState

_SLOW_SECONDS = 30


class CheckpointWriter:
    """Writes a run's checkpoints from memory to storage and deletes those no longer kept.

    Args:
        run: Folder of the run.
        config: Configuration, which says how many checkpoints to keep.

    Attributes:
        saved: Number of checkpoints saved so far.
        stall_seconds: Time that training paused for them: copies to the host, and waits for an
            upload that was still running when the next was due.
    """

    def __init__(self, run: LocationLike, config: AnyConfig):
        self.saved = 0
        self.stall_seconds = 0.0
        self._run, self._config = Location.parse(run), config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="efae-checkpoint")
        self._in_flight: Future[None] | None = None

    def save(self, state: TrainState, extra: Mapping[str, Any]) -> None:
        """Copy the state and return; the upload continues in the background.

        Args:
            state: State of training.
            extra: JSON values to store with it; "scores" ranks checkpoints.

        Raises:
            StorageError: The previous upload failed for good.
        """
        started = time.monotonic()
        self.wait()
        tensors, metadata = state.snapshot()
        self._in_flight = self._thread.submit(self._write, tensors, {**metadata, **extra})
        self.saved += 1
        self.stall_seconds += time.monotonic() - started

    def wait(self) -> None:
        """Return when no upload is in flight.

        Raises:
            StorageError: The upload failed for good.
        """
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def _write(self, tensors: dict[str, Any], metadata: dict[str, Any]) -> None:
        step, keep, started = metadata["step"], self._config.ray, time.monotonic()
        write_checkpoint(
            str(self._run / checkpoint_name(step)),
            **tensors,
            metadata=metadata,
            config=self._config,
            scores=metadata["scores"],
        )
        prune_checkpoints(self._run, step, keep.checkpoints_to_keep, keep.best_checkpoint_by)
        seconds = time.monotonic() - started
        if seconds > _SLOW_SECONDS:
            what = f"storage was slow or unreachable: checkpoint {step} took {seconds:.0f} s"
            record_event(self._run, "outage", what)
