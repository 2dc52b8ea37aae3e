"""Metric points that wait on the local disk while the tracking server is away."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

_POINTS_PER_CALL = 1000


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    step: int
    time_ms: int
    value: float


class Spill:
    """Points that wait for the server, one JSON object a line, oldest first."""

    def __init__(self, path: Path):
        self.path = path
        self._sent_bytes = 0
        if not self.is_empty() and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")  # the last writer was killed in mid-line

    def is_empty(self) -> bool:
        return not self.path.exists()

    def append(self, points: list[Point]) -> None:
        if points:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(point._asdict()) + "\n" for point in points)

    def drain(self, send: Callable[[list[Point]], bool]) -> None:
        """Passes the points to `send` in order until it returns False or none is left."""
        while not self.is_empty():
            with self.path.open("rb") as file:
                file.seek(self._sent_bytes)
                lines = [line for _, line in zip(range(_POINTS_PER_CALL), file, strict=False)]
            if lines and not send([point for line in lines if (point := _parse_point(line))]):
                return
            self._sent_bytes += sum(map(len, lines))
            if self._sent_bytes >= self.path.stat().st_size:
                self.path.unlink()
                self._sent_bytes = 0


def _parse_point(line: bytes) -> Point | None:
    try:
        return Point(**json.loads(line))
    except (ValueError, TypeError):
        logger.warning("a half-written line of a spill file is skipped")
        return None
