"""A folder that, alone on the import path, is an environment of a few distributions."""

import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def find_closure(names: tuple[str, ...]) -> list[Distribution]:
    """The distributions of these names and all that they require here."""
    found: dict[str, Distribution] = {}
    waiting = [(name, "") for name in names]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for another platform than this build
            continue
        for text in found[name].requires or []:
            needed = Requirement(text)
            if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
                continue
            pairs = {(needed.name, extra) for extra in {"", *needed.extras}} - seen
            waiting += sorted(pairs)
            seen |= pairs
    return list(found.values())


def make_environment(folder: Path, *names: str) -> Path:
    """Links to the modules of these distributions and of all that they require."""
    folder.mkdir()
    for found in find_closure(names):
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists() and not top.endswith(".pth"):
                link.symlink_to(Path(str(found.locate_file(top))))
    return folder


def run_alone(environment: Path, script: str, *arguments: str) -> str:
    """What the script prints in a process that can import the environment and the standard library.

    Its first line must not be a __future__ import.
    """
    head = f"import sys; sys.path.append({str(environment)!r})\n"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", head + script, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
