"""The set-up takes the oldest Python that serves, unless EFAE_PYTHON or the environment says."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "cluster" / "set_up.sh"


@pytest.fixture
def set_up(tmp_path: Path):
    """Runs the script where only the given commands exist; what it wrote."""

    def run(versions: dict[str, str], **environment: str) -> str:
        for command, version in versions.items():
            path = tmp_path / command
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                f'#!/bin/sh\n[ "$1" = -c ] && echo {version} || {{ echo "$0 $*"; exit 3; }}\n'
            )
            path.chmod(0o755)
        finished = subprocess.run(
            ["/bin/bash", SCRIPT, "env"],
            cwd=tmp_path,
            env={"PATH": str(tmp_path), **environment},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == (1 if finished.stderr else 3)
        return finished.stdout.replace(f"{tmp_path}/", "") + finished.stderr

    return run


@pytest.mark.parametrize(
    ("versions", "taken"),
    [
        ({"python3.13": "3.13", "python3.12": "3.12", "python3.11": "3.11"}, "python3.11"),
        ({"python3.13": "3.13", "python3.12": "3.12"}, "python3.12"),
        ({"python3.13": "3.13", "python3": "3.12"}, "python3.13"),
        ({"python3.11": "", "python3": "3.14", "python": "3.12"}, "python"),
    ],
)
def test_the_oldest_python_that_serves_is_taken(set_up, versions, taken):
    assert set_up(versions).endswith(f"\n{taken} -m venv --clear env\n")


def test_another_python_is_named_by_the_user(set_up):
    said = set_up({"python3.11": "3.11", "own/python": "3.13"}, EFAE_PYTHON="own/python")
    assert said.endswith("\nown/python -m venv --clear env\n")


def test_an_environment_keeps_its_python_until_another_is_named(set_up):
    versions = {"python3.11": "3.11", "env/bin/python": "3.12"}
    assert set_up(versions).endswith("\nenv/bin/python -m venv env\n")
    named = set_up(versions, EFAE_PYTHON="python3.11")
    assert named.endswith("\npython3.11 -m venv --clear env\n")


def test_no_python_that_serves_is_an_error_with_a_remedy(set_up):
    assert "install one" in set_up({"python3": "3.10"})
    said = set_up({"python3.11": "3.11", "old": "3.10"}, EFAE_PYTHON="old")
    assert "EFAE_PYTHON=old" in said
    assert "3.10" in said
