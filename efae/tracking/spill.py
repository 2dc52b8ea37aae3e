"""Metric points that wait on the local disk while the tracking server is unreachable."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

_POINTS_PER_CALL = 1000


class Point(NamedTuple):
    """One value of one metric.

    Attributes:
        name: Name of the metric.
        step: Training step; for system metrics, the number of the sample.
        time_ms: Time of logging, in milliseconds since 1970.
        value: Value; may be nan or infinite.
    """

    name: str
    step: int
    time_ms: int
    value: float


class Spill:
    """Points that wait for the server, one JSON object per line, oldest first.

    One process writes at a time. Points that a killed process left behind are kept.

    Args:
        path: Local file; it exists only while points wait.

    Raises:
        OSError: The disk refuses, here and in the methods.
    """

    def __init__(self, path: Path):
        self.path = path
        self._sent_bytes = 0
        if not self.is_empty() and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")  # the last writer was killed in the middle of a line

    def is_empty(self) -> bool:
        """Return whether no point waits."""
        return not self.path.exists()

    def append(self, points: list[Point]) -> None:
        """Append points after those that wait."""
        if points:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(point._asdict()) + "\n" for point in points)

    def read(self) -> list[Point]:
        """Return the points that wait, and some that were sent since; [] when none wait."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [point for line in lines if (point := _parse_point(line))]

    def drain(self, send: Callable[[list[Point]], bool]) -> None:
        """Pass the points to `send` in order until it returns False or none is left.

        This object never passes a sent point twice; after a crash the next one may.
        """
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
        logger.warning("skipped a half-written line of a spill file")
        return None
