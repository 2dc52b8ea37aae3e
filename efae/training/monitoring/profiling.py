"""A trace of a few training steps, and on a GPU their memory, as files that torch's tools show."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import profiler

from efae.config.run import STEPS_BEFORE_PROFILE

_memory = cast(Any, torch.cuda.memory)  # documented, though the names are private
_MEMORY_EVENTS = 100_000


class StepProfiler:
    """Profiles a few steps of this process, then saves what it found.

    The trace opens in ui.perfetto.dev or chrome://tracing, the memory snapshot in
    pytorch.org/memory_viz.

    Args:
        steps: Number of steps.
        device: Device of training.
        save: Function that takes a file, which is removed afterwards, and a name for it.
    """

    def __init__(self, steps: int, device: torch.device, save: Callable[[Path, str], None]):
        self._save, self._gpu = save, device.type == "cuda"
        self._steps, self._left = steps, STEPS_BEFORE_PROFILE + steps
        kinds = profiler.ProfilerActivity
        self._profile = profiler.profile(
            activities=[kinds.CPU, kinds.CUDA] if self._gpu else [kinds.CPU],
            schedule=cast(Any, profiler).schedule(
                skip_first=STEPS_BEFORE_PROFILE - 2, wait=1, warmup=1, active=steps, repeat=1
            ),
            on_trace_ready=self._save_trace,
            profile_memory=True,
            record_shapes=True,
        )
        self._profile.start()
        if self._gpu:
            _memory._record_memory_history(max_entries=_MEMORY_EVENTS)

    def step(self) -> None:
        """Note the end of a step; after the last one, save the profile and stop."""
        if self._left == 0:
            return
        self._left -= 1
        self._profile.step()
        if self._left == 0:
            self._profile.stop()

    def close(self, say: Callable[[str], None]) -> None:
        """Stop; if training ended too early, save what was found so far, and say what is missing.

        Args:
            say: Function that prints one line.
        """
        if self._left == 0:
            return
        say(
            f"training.profile_steps={self._steps}: training ended before the last"
            f" {min(self._left, self._steps)} of them; the profile begins {STEPS_BEFORE_PROFILE}"
            " steps after a start or resume"
        )
        self._left = 0
        self._profile.stop()

    def _save_trace(self, found: profiler.profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json.gz"
            found.export_chrome_trace(str(trace))
            self._save(trace, f"profile/{trace.name}")
            if self._gpu:
                memory = Path(folder) / "memory.pickle"
                _memory._dump_snapshot(str(memory))
                _memory._record_memory_history(enabled=None)
                self._save(memory, f"profile/{memory.name}")
