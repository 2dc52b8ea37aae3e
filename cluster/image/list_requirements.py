"""What an image installs: the project's requirements and those of the named extras.

    python cluster/image/list_requirements.py [EXTRA...]

Reads pyproject.toml of the working directory; one requirement a line, for `pip install -r`. So the
image's packages are a layer of their own, which a change of our code leaves as it is.
"""

import sys
import tomllib
from pathlib import Path


def list_requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The requirements, sorted.

    Args:
        pyproject: a project's pyproject.toml.
        extras: names of its optional dependencies.

    Raises:
        ValueError: an extra that it does not have.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    requirements = set[str](project["dependencies"])
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            has = ", ".join(project["optional-dependencies"])
            raise ValueError(f"{pyproject} has no extra {extra!r}, but {has}")
        requirements.update(project["optional-dependencies"][extra])
    return sorted(requirements)


if __name__ == "__main__":
    try:
        print("\n".join(list_requirements(Path("pyproject.toml"), sys.argv[1:])))
    except ValueError as error:
        sys.exit(f"error: {error}")
