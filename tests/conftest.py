"""Real servers for the tests marked `s3` or `ray`: one local stack per session, on free ports."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster import ports
from cluster.services import client_environment
from cluster.state import load

ROOT = Path(__file__).parents[1]


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
