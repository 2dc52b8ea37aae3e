import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

MANY = "for _ in range(10_000): print('a line of what was found', flush={flush})\n"
CATCHING = """
    try:
{body}
    except OSError as error:
        sys.exit(f"command: {{error}}")
"""
BODIES = {
    "buffered": f"    {MANY.format(flush=False)}    return 3",
    "line by line": f"    {MANY.format(flush=True)}    return 3",
    "caught": CATCHING.format(body=f"        {MANY.format(flush=True)}"),
}


def run(body: str, tail: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys\n"
        "from data_pipelines.commands import run_command\n"
        f"def main():\n{body}\n"
        "run_command(main)\n"
    )
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {tail}', sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("tail", ["| head -1", "2>&1 | head -1"])
def test_a_reader_that_has_enough_ends_a_command_quietly(body, tail):
    result = run(body, tail)
    assert result.stdout == "a line of what was found\n"
    assert result.stderr == ""
    assert result.returncode == 141


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("    print('done')", 0, ""),
        ("    return 2", 2, ""),
        ("    sys.exit('command: no')", 1, "command: no\n"),
        ("    raise BrokenPipeError('a server went away')", 1, "a server went away"),
    ],
)
def test_other_ends_stay_as_they_are(body, status, said):
    result = run(body, "")
    assert result.returncode == status
    assert said in result.stderr


def test_a_name_in_latin_1_is_printed():
    result = run("    print('caf\\udce9.jpg')", "")
    assert (result.returncode, result.stdout, result.stderr) == (0, "caf\\udce9.jpg\n", "")
