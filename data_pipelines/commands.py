"""How a command ends: with its status, and quietly where nobody reads on what it prints."""

import os
import select
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import NoReturn, TextIO, cast

_CLOSED = 141
"""The status of a program that the shell's own signal for a closed pipe ended."""


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with the status that it returns; None is 0.

    A reader that has enough, as `head -1` has, ends the command without a traceback. What the
    output's encoding lacks, as a name in Latin-1, is printed with backslashes.
    """
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        # `main` may have caught it, as the error of a file.
        if not closed or BrokenPipeError not in map(type, (error, error.__context__)):
            raise
        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:  # which the interpreter flushes once more when it ends
            os.dup2(nothing, stream.fileno())
        status = _CLOSED
    sys.exit(status)


def _is_closed(stream: TextIO) -> bool:
    """Whether it is a pipe that nobody reads."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
