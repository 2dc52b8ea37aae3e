"""Events of a run: one small object per event in its folder, written by the process that saw it.

The driver that ends the run reads them for the summary, also those of earlier drivers.
"""

import json
import logging
import time
import uuid
from dataclasses import dataclass
from typing import Any

from data_pipelines import storage
from data_pipelines.storage import Location, LocationLike
from data_pipelines.storage.retries import StorageError

logger = logging.getLogger(__name__)

_FOLDER = "events"


@dataclass(frozen=True)
class RunEvent:
    """One event.

    Attributes:
        time: Time in seconds since 1970.
        kind: Kind: "start" (a worker group started), "failure" (a worker was lost), "damage" (a
            checkpoint could not be used), "rollback", "memory" (a forward pass did not fit into
            it), "notice" (a node will be removed), "standstill" (workers cannot start) or
            "outage".
        facts: JSON values; "what" is one line for people.
    """

    time: float
    kind: str
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"{time.strftime('%H:%M:%S', time.localtime(self.time))}  {self.facts['what']}"


def record_event(run_uri: LocationLike, kind: str, what: str, **facts: Any) -> None:
    """Add an event; if storage is unreachable, log it instead, so that training continues.

    Args:
        run_uri: Folder of the run.
        kind: Kind, as in `RunEvent`.
        what: Description in one line, for people.
        facts: JSON values.
    """
    now = time.time_ns()
    location = Location.parse(run_uri) / _FOLDER / f"{now}-{kind}-{uuid.uuid4().hex[:8]}.json"
    event = {"time": now / 1e9, "kind": kind, "facts": {"what": what, **facts}}
    try:
        storage.write_bytes(location, json.dumps(event).encode(), deadline_seconds=5)
    except StorageError as error:
        logger.warning("event not recorded (%s): %s", error, what)


def read_events(run_uri: LocationLike) -> list[RunEvent]:
    """Read all events of the run by time; skip objects that are no events, with a warning.

    Raises:
        StorageError: The storage refuses or does not answer.
    """
    folder = Location.parse(run_uri) / _FOLDER
    events: list[RunEvent] = []
    for name in sorted(storage.list_files(folder)):
        try:
            events.append(_parse_event(storage.read_bytes(folder / name)))
        except (ValueError, TypeError, KeyError, RecursionError):
            where = folder.uri_of(name)
            logger.warning("ignored %s: it is not an event that efae wrote", where)
    return sorted(events, key=lambda event: event.time)


def _parse_event(data: bytes) -> RunEvent:
    tree = json.loads(data)
    facts = {**tree["facts"], "what": str(tree["facts"]["what"])}
    return RunEvent(float(tree["time"]), str(tree["kind"]), facts)
