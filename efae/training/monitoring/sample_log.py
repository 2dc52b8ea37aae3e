"""A log of the samples of each step, to audit that none is lost or repeated."""

import json
import time
from collections.abc import Sequence
from pathlib import Path


class SampleLog:
    """One file per training process, FOLDER/TIME_NS-RANK.jsonl, with one line per step.

    A line is [seconds since 1970, step, world size, [key, ...]]. It is written before the step
    begins, so that after a kill the log includes the interrupted step.

    Args:
        folder: Local folder, created if need be; "" writes nothing.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        OSError: The folder cannot be written, here and in `write`.
    """

    def __init__(self, folder: str, rank: int, world_size: int):
        self._world_size = world_size
        self._path = Path(folder) / f"{time.time_ns()}-{rank}.jsonl" if folder else None
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, keys: Sequence[str]) -> None:
        """Record that `step` (counted from 0) trains on these samples of this rank."""
        if self._path:
            line = json.dumps([time.time(), step, self._world_size, list(keys)])
            with self._path.open("a") as file:
                file.write(f"{line}\n")
