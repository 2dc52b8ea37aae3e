"""Server processes that outlive the command that started them.

A process is recorded by pid *and* start time, so a recycled pid is never mistaken for it. Each
process leads its own session. Its children are found as its descendants and by that session, which
a child keeps when its parent dies.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_CLOCK_SLACK_SECONDS = 2.0


class ProcessRecord(NamedTuple):
    """One process that we started."""

    pid: int
    started: float
    """Start time in seconds since the epoch; psutil moves it when the clock is set."""
    mark: str = ""
    """Boot of the machine, and clock ticks from it to the start, which setting the clock does not
    move; "" on other systems than Linux, and in records of older versions."""


def start(command: Sequence[str], environment: dict[str, str], log: Path) -> ProcessRecord:
    """Start a server in a new session; append its output to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.returncode = 0  # It outlives this process: Popen must not warn about it.
    started = psutil.Process(process.pid).create_time()
    return ProcessRecord(process.pid, started, _read_mark(process.pid))


def is_running(record: ProcessRecord) -> bool:
    """Return whether exactly this process still runs."""
    return _leader(record) is not None


def is_live(process: psutil.Process) -> bool:
    """Return whether the process runs; a zombie does not."""
    return process.is_running() and not _is_zombie(process.pid)


def stop(record: ProcessRecord, grace_seconds: float = 10.0) -> int:
    """Stop the process and all that it started; return the number of processes stopped.

    The leader gets SIGTERM and `grace_seconds` to stop its own children; without a leader, the
    children get the signal themselves. Processes that remain are killed.
    """
    owned = _family(record)
    leader = _leader(record)
    for process in owned if leader is None else {leader}:
        _signal(process, signal.SIGTERM)
    # List the family again: a child may have started during the wait.
    alive = _wait(owned, grace_seconds) | _family(record)
    for process in alive:
        _signal(process, signal.SIGKILL)
    _wait(alive, 5.0)
    return len(owned | alive)


def _wait(processes: set[psutil.Process], seconds: float) -> set[psutil.Process]:
    """Wait for processes to end; return those that did not."""
    deadline = time.monotonic() + seconds
    alive: set[psutil.Process] = set(filter(is_live, processes))
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = set(filter(is_live, alive))
    return alive


def _leader(record: ProcessRecord) -> psutil.Process | None:
    try:
        process = psutil.Process(record.pid)
    except psutil.NoSuchProcess:
        return None
    if record.mark:
        ours = _read_mark(record.pid) == record.mark
    else:
        ours = abs(process.create_time() - record.started) < _CLOCK_SLACK_SECONDS
    return process if ours and is_live(process) else None


def _read_mark(pid: int) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # not Linux, or no such process any more
        return ""
    # The fields after the name, which may hold spaces and brackets, begin with the third.
    return f"{boot} {stat.rpartition(')')[2].split()[22 - 3]}"


def _family(record: ProcessRecord) -> set[psutil.Process]:
    leader = _leader(record)
    if leader is None and psutil.pid_exists(record.pid) and not _is_zombie(record.pid):
        return set()  # Another process has the pid now, so the session is not ours.
    family: set[psutil.Process] = set()
    if leader is not None:
        family = {leader, *leader.children(recursive=True)}
    for process in psutil.process_iter():
        try:
            in_session = os.getsid(process.pid) == record.pid
        except (ProcessLookupError, PermissionError):
            continue
        if in_session and is_live(process):
            # Ray starts each job's driver in a new session: include the members' children.
            family |= {process, *_children(process)}
    return family


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
