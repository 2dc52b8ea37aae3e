"""Python and the packages here are those that this checkout pins.

    python -m cluster.check_image
    ray job submit --working-dir . -- python -m cluster.check_image

The first runs while an image is built, with --only-pins. The second runs on the cluster, with the
pins of the checkout that submits: whether the image and the client agree, before anything trains.
"""

import argparse
import platform
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[1]
# torch for CUDA pins these itself, one by one.
CUDA_PREFIXES = ("nvidia-", "cuda-", "triton")
UNPINNED = {"efae", "pip"}
REMEDY = (
    "build the image from this checkout (cluster/image/Dockerfile) and start the cluster with it,"
    " or submit from the checkout that its image was built from"
)


def read_pins(path: Path) -> dict[str, str]:
    """Version by package name, both normalised.

    Args:
        path: of lines NAME==VERSION; # begins a comment.

    Raises:
        ValueError: another kind of line.
    """
    pins: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, equals, version = text.partition("==")
        if not equals:
            raise ValueError(f"{path.name}:{number}: {text!r} is no pin: write NAME==VERSION")
        pins[canonicalize_name(name)] = version
    return pins


def list_installed() -> dict[str, str]:
    """Version by package name; torch's suffix for the kind of build stays."""
    found: dict[str, str] = {}
    for distribution in distributions():
        # The first in the path is what an import finds.
        found.setdefault(canonicalize_name(distribution.name), distribution.version)
    return found


def find_differences(
    pins: Mapping[str, str], required: list[str], python: str, installed: Mapping[str, str]
) -> list[str]:
    """What is not as the checkout has it, one line each.

    Args:
        pins: of `read_pins`.
        required: requirements of the project, as in pyproject.toml.
        python: which versions of Python it is for, such as ">=3.11,<3.12".
        installed: of `list_installed`.
    """
    lines: list[str] = []
    if platform.python_version() not in SpecifierSet(python):
        lines.append(f"Python {platform.python_version()} here, {python} in the checkout")
    names = {canonicalize_name(Requirement(text).name) for text in required}
    if missing := sorted(names - installed.keys()):
        lines.append(f"not here: {', '.join(f'{name} {pins[name]}' for name in missing)}")
    for name, version in sorted(installed.items()):
        wanted = pins.get(name)
        if wanted is not None and wanted not in (version, version.partition("+")[0]):
            lines.append(f"{name} {version} here, {wanted} in the checkout")
    return lines


def list_unpinned(pins: Mapping[str, str], installed: Mapping[str, str]) -> list[str]:
    """Packages that are here and that nothing pins."""
    return [
        f"{name} {version}"
        for name, version in sorted(installed.items())
        if name not in {*pins, *UNPINNED} and not name.startswith(CUDA_PREFIXES)
    ]


def check(checkout: Path, only_pins: bool) -> str:
    """Compare this environment with a checkout's pins; one line that says what is here.

    Args:
        checkout: holds constraints.txt and pyproject.toml.
        only_pins: whether a package that nothing pins is an error too.

    Raises:
        ValueError: they differ.
    """
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    pins, installed = read_pins(checkout / "constraints.txt"), list_installed()
    wrong = find_differences(pins, project["dependencies"], project["requires-python"], installed)
    if only_pins and (unpinned := list_unpinned(pins, installed)):
        wrong.append(f"not in constraints.txt: {', '.join(unpinned)}")
    if wrong:
        raise ValueError("\n  ".join(["this environment and the checkout differ:", *wrong, REMEDY]))
    return (
        f"as in constraints.txt: Python {platform.python_version()}, ray {installed['ray']},"
        f" torch {installed['torch']} and {len(installed) - 2} more packages"
    )


def main(arguments: list[str]) -> int:
    """Exit status 0 only if they agree."""
    parser = argparse.ArgumentParser("python -m cluster.check_image", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only-pins", action="store_true", help="refuse what nothing pins")
    options = parser.parse_args(arguments)
    try:
        print(check(CHECKOUT, options.only_pins))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
