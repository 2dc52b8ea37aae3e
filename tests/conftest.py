"""Real servers for the tests marked `s3` or `ray`: one local stack per session, on free ports."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster import ports
from cluster.services import client_environment
from cluster.state import load

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for a shared core burn it
ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 25.0
"""Of a test that is not marked `slow`, beside its fixtures: ten at rest, and what cores cost that
share one, or a machine that others use, too."""
LONG_TESTS = pytest.StashKey[list[str]]()


def read_held_up_seconds() -> float:
    """How long programs on this machine have waited for a CPU; 0 where Linux does not say."""
    try:
        line = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:
        return 0.0
    return int(line.rpartition("total=")[2]) / 1e6


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Notes a test that takes too long: in CPU time, or by the clock while no CPU was short."""
    cpu, wall = sum(os.times()[:4]), time.monotonic() - read_held_up_seconds()
    yield
    cpu, wall = sum(os.times()[:4]) - cpu, time.monotonic() - read_held_up_seconds() - wall
    if item.get_closest_marker("slow") or item.get_closest_marker("gpu"):
        return
    if max(cpu, wall) > LIMIT_SECONDS:
        item.config.stash.setdefault(LONG_TESTS, []).append(
            f"{item.nodeid}: {cpu:.1f} s of CPU time, {wall:.1f} s by the clock while no program"
            " waited for a CPU"
        )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Names the tests that took too long. They do not fail: machines differ by a factor of two."""
    if long := config.stash.get(LONG_TESTS, []):
        terminalreporter.section(f"over {LIMIT_SECONDS:.0f} s, but not marked `slow`")
        for line in long:
            terminalreporter.write_line(line)


@dataclass(frozen=True)
class RunningStack:
    """A local stack in a folder of its own, driven as a user drives it: by its commands."""

    folder: Path
    variables: dict[str, str]
    """EFAE_LOCAL_DIR and the three ports."""

    def run(self, command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs up, down, ui or status; `changes` replace variables."""
        return subprocess.run(
            [sys.executable, "-m", "cluster.local_stack", command],
            env={**os.environ, **self.variables, **changes},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What `source env` exports."""
        return client_environment(load(self.folder))


def make_stack(prefix: str = "efae-") -> RunningStack:
    """A stack that is not started yet; where its path is short, Unix sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    s3, mlflow, ray = map(str, ports.pick_free(3))
    return RunningStack(
        folder,
        {
            "EFAE_LOCAL_DIR": str(folder),
            "EFAE_S3_PORT": s3,
            "EFAE_MLFLOW_PORT": mlflow,
            "EFAE_RAY_DASHBOARD_PORT": ray,
            "EFAE_RAY_HEAD_CPUS": "2",  # on any machine: two workers fill it
        },
    )


def end_stack(stack: RunningStack) -> None:
    """Ends the stack and removes its folder."""
    result = stack.run("down")
    shutil.rmtree(load(stack.folder).socket_folder, ignore_errors=True)
    shutil.rmtree(stack.folder, ignore_errors=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def session_stack() -> Iterator[RunningStack]:
    """The stack that all tests of the session share."""
    stack = make_stack()
    try:
        result = stack.run("up")
        assert result.returncode == 0, result.stdout + result.stderr
        yield stack
    finally:
        end_stack(stack)


@pytest.fixture(scope="session")
def local_stack(session_stack: RunningStack) -> Iterator[dict[str, str]]:
    """The clients' variables of the session's stack, also set in `os.environ`.

    Ray reads its own when it is imported, which is before any fixture: a test runs a Ray driver in
    a child process, as users do.
    """
    environment = session_stack.environment
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        yield environment


def find_workers(title: str, environment: Mapping[str, str]) -> list[psutil.Process]:
    """Processes of this name that belong to this stack's cluster, and to no other here."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["cmdline"]):
        if title in " ".join(process.info["cmdline"] or []):
            try:
                endpoint = process.environ().get("AWS_ENDPOINT_URL")
            except psutil.Error:
                continue
            if endpoint == environment["AWS_ENDPOINT_URL"]:
                found.append(process)
    return found
