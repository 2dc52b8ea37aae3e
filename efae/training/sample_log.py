"""Which samples each step consumed, written down for audits: that none is lost or repeated."""

import json
import time
from collections.abc import Sequence
from pathlib import Path


class SampleLog:
    """One file per training process, FOLDER/TIME_NS-RANK.jsonl, with one line per step.

    A line is [seconds since 1970, step, world size, [key, ...]], flushed when the step's batch is
    taken: after a kill it tells what was under way.

    Args:
        folder: local; made if need be. "" writes nothing.
        rank: of this process.
        world_size: number of processes.

    Raises:
        OSError: the folder cannot be written, here and in `write`.
    """

    def __init__(self, folder: str, rank: int, world_size: int):
        self._file = None
        self._world_size = world_size
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = (Path(folder) / f"{time.time_ns()}-{rank}.jsonl").open("w", buffering=1)

    def write(self, step: int, keys: Sequence[str]) -> None:
        """Notes that `step` (counted from 0) trains on these samples of this rank."""
        if self._file:
            line = [time.time(), step, self._world_size, list(keys)]
            self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
