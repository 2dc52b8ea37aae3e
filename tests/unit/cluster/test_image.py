"""The image: its Dockerfile passes the linter, runs unprivileged, and installs pinned packages;
and what a job brings to it.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "cluster" / "image" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_instructions(name: str) -> list[str]:
    """Arguments of each of the Dockerfile's instructions of one kind, lines joined."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def test_dockerfile_passes_the_linter():
    linter = Path(sys.executable).with_name("hadolint")
    said = subprocess.run([linter, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


def test_a_submitted_job_brings_every_file_of_the_packages():
    excluded = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    files = [p for name in ("efae", "data_pipelines", "jobs") for p in (ROOT / name).rglob("*.*")]
    assert ROOT / "efae/web_page/static/index.html" in files
    lost = [path for path in files if any(ignores(path) for ignores in excluded)]
    assert [path for path in lost if path.suffix != ".pyc"] == []


def test_files_to_copy_exist():
    copied = [line.split()[:-1] for line in read_instructions("COPY") if "--from" not in line]
    assert ["constraints.txt", "pyproject.toml"] in copied
    assert all((ROOT / name).exists() for names in copied for name in names)


def test_image_runs_as_nobody_special_and_asks_for_a_token():
    assert read_instructions("USER")[-1] == "1000:1000"
    environment = read_instructions("ENV")[-1].split()
    assert all(re.fullmatch(r"[A-Z_]+=\S+", setting) for setting in environment)
    assert {"RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"} <= set(environment)
    # ray up takes the home folder from here, and root's without it.
    assert "HOME=/home/ray" in environment


def test_last_stage_has_what_kuberay_and_ray_up_call_and_no_compiler():
    last = DOCKERFILE.read_text().rpartition("\nFROM ")[2]
    installed = re.search(r"apt-get install -y --no-install-recommends ([^\\]*)\\", last)
    assert installed is not None
    assert installed[1].split() == ["openssh-client", "rsync", "wget"]
    assert "pip" not in last


def test_base_is_a_python_that_the_project_is_for():
    base = re.fullmatch(r"BASE=python:(\d+\.\d+\.\d+)-slim-\w+", read_instructions("ARG")[0])
    assert base is not None
    assert base[1] in SpecifierSet(PROJECT["requires-python"])


def test_only_named_folders_reach_the_build():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    let_in = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert let_in == {"constraints.txt", "pyproject.toml", "efae", "data_pipelines", "jobs"}
    assert all((ROOT / name).exists() for name in let_in)


def test_the_image_lists_the_requirements_of_its_launcher():
    [command] = re.findall(
        r"&& (python -c .*)> /tmp/requirements.txt", "\n".join(read_instructions("RUN"))
    )
    for launcher, added in (("", set()), ("aws", {"boto3"})):
        shell = ["sh", "-c", f"LAUNCHER={launcher}; {command}"]
        said = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True)
        assert set(said.stdout.split()) == {*PROJECT["dependencies"], *added}
    shell = ["sh", "-c", f"LAUNCHER=azure; {command}"]
    assert subprocess.run(shell, cwd=ROOT, capture_output=True).returncode


def test_all_that_an_image_requires_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    extras = PROJECT["optional-dependencies"]
    required = [*PROJECT["dependencies"], *extras["aws"], *extras["gcp"]]
    assert not {canonicalize_name(re.split(r"\[|[<>=]", name)[0]) for name in required} - pins
