"""The local stack's S3 server alone, on free ports, for the duration of a benchmark."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cluster import processes
from cluster.serving import find_service, start, wait_until_ready
from cluster.state import StackState


@contextlib.contextmanager
def serve_s3(folder: Path) -> Iterator[dict[str, str]]:
    """Run the server on the data in `folder`; yield the environment of a client.

    Raises:
        RuntimeError: The server did not answer in time; its log is in `folder`.
    """
    state = StackState(folder)
    start(state, "s3")
    try:
        wait_until_ready(state, "s3")
        yield find_service("s3").environment(state)
    finally:
        processes.stop(state.processes["s3"])
