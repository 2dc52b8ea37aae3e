"""TCP ports on loopback: those that the environment requests, and those that are free."""

import os
import socket
from contextlib import ExitStack

LOOPBACK = "127.0.0.1"


def is_free(port: int) -> bool:
    """Return whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def pick_free(count: int) -> list[int]:
    """Return `count` different loopback ports that are free now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def read_port(variable: str) -> int | None:
    """Return the port that an environment variable requests; None if it is unset or empty.

    Raises:
        ValueError: The value is not a port.
    """
    text = os.environ.get(variable, "")
    if not text:
        return None
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise ValueError(f"{variable}={text!r}: use a port number from 1024 to 65535")
    return int(text)
