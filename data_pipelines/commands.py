"""Run a command: exit with its status, and quietly if the reader closes the pipe."""

import gc
import os
import select
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import NoReturn, TextIO, cast

from data_pipelines.images.logs import ignore_metadata

_CLOSED = 141
"""Shell status of a program that SIGPIPE ended."""


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with the status that it returns; None is 0.

    A reader that closes the pipe, such as `head -1`, ends the command without a traceback.
    Characters that the output's encoding lacks are printed as backslash escapes.
    """
    # By default, the collector runs hundreds of times while torch is imported: half a second.
    gc.set_threshold(20_000)
    ignore_metadata()
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        # `main` may have caught the error and exited.
        if not closed or BrokenPipeError not in map(type, (error, error.__context__)):
            raise
        devnull = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:  # the interpreter flushes it again at exit
            os.dup2(devnull, stream.fileno())
        status = _CLOSED
    # The interpreter's last collections would visit every object of torch and MLflow: 1.5 s.
    gc.freeze()
    sys.exit(status)


def _is_closed(stream: TextIO) -> bool:
    """Return whether the stream is a pipe without a reader."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
