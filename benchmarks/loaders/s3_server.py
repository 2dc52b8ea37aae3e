"""The local stack's S3 server alone, on free ports, for the time of a benchmark."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import ports, processes
from cluster.services import SERVICES, Service
from cluster.state import StackState


@contextlib.contextmanager
def serve_s3(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a client, while the server runs on what lies in `folder`.

    Raises:
        RuntimeError: it did not answer in time; its log is in `folder`.
    """
    service = next(service for service in SERVICES if service.name == "s3")
    names = ["s3", *(f"s3.{name}" for name in service.hidden_ports)]
    state = StackState(folder)
    state.ports.update(zip(names, ports.pick_free(len(names)), strict=True))
    (folder / "s3").mkdir(parents=True, exist_ok=True)
    environment = service.environment(state)
    record = processes.start(service.command(state), environment, folder / "s3.log")
    try:
        _wait(service, state)
        yield environment
    finally:
        processes.stop(record)


def _wait(service: Service, state: StackState) -> None:
    deadline = time.monotonic() + service.start_seconds
    while True:
        try:
            return service.check(state)
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {error}") from error
        time.sleep(0.2)
