"""Packages of wallpapers: downloaded by apt or found in a folder, and unpacked."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package of wallpapers."""

    licences: str
    """Licences of its photographs; usr/share/doc/PACKAGE/copyright has those of each file."""
    drawings: tuple[str, ...]
    """Patterns of the names of the pictures that are not photographs, chosen by eye."""


PACKAGES = {
    "lomiri-wallpapers-16.04": Package("CC BY 4.0, CC BY-SA 4.0, CC0", ("umang_by_*",)),
    "lomiri-wallpapers-20.04": Package(
        "CC BY-SA 3.0", ("Fossa_by_*", "Infinite-Sea_by_*", "Painting-Colors_by_*")
    ),
    "mate-backgrounds": Package("GPL 2 or later", ("mate/abstract/*", "mate/desktop/*")),
    "plasma-workspace-wallpapers": Package(
        "GPL 2 or later",
        (
            *("Altai", "Autumn", "Canopee", "Cascade", "Cluster", "Elarun", "Flow", "FlyingKonqui"),
            *("Honeywave", "IceCold", "Kay", "Kokkini", "MilkyWay", "Opal", "PastelHills", "Patak"),
            *("SafeLanding", "Shell", "Volna"),
        ),
    ),
}
"""The packages that are fetched, by name."""

_REMEDY = "download the .deb files on another machine and name their folder with --packages"


@dataclass(frozen=True)
class Unpacked:
    """An unpacked package."""

    name: str
    version: str
    folder: Path


def fetch_packages(folder: Path, names: Sequence[str] = tuple(PACKAGES)) -> list[Path]:
    """Download packages with apt, in the versions of this machine's release; return the files.

    Raises:
        ValueError: This machine has no apt, or apt cannot download a package.
    """
    if shutil.which("apt-get") is None:
        raise ValueError(f"this machine has no apt-get: {_REMEDY}")
    for name in names:
        print(f"apt-get download {name}", flush=True)
        run = subprocess.run(
            ["apt-get", "download", name], cwd=folder, capture_output=True, text=True, check=False
        )
        if run.returncode:
            errors = [line for line in run.stderr.splitlines() if line.startswith("E:")]
            raise ValueError(
                f"apt-get download {name} failed ({'; '.join(errors) or run.stderr.strip()}): run"
                f" apt-get update and check the network, or {_REMEDY}"
            )
    return find_packages(folder)


def find_packages(folder: Path) -> list[Path]:
    """Return the .deb files of a folder.

    Raises:
        ValueError: There are none.
    """
    found = sorted(folder.glob("*.deb"))
    if not found:
        raise ValueError(f"--packages {folder}: holds no .deb files")
    return found


def unpack(archives: Sequence[Path], folder: Path) -> list[Unpacked]:
    """Unpack .deb files below `folder`; return the packages in the order of their names.

    Raises:
        ValueError: There is no dpkg-deb, a file is damaged, or two files hold one package.
    """
    packages: dict[str, Unpacked] = {}
    for archive in archives:
        name, version = (_run_dpkg("-f", archive, field) for field in ("Package", "Version"))
        if name in packages:
            raise ValueError(f"{archive.parent} holds package {name} twice: remove one of them")
        packages[name] = Unpacked(name, version, folder / name)
        (folder / name).mkdir(parents=True)
        _run_dpkg("-x", archive, folder / name)
    return [packages[name] for name in sorted(packages)]


def _run_dpkg(option: str, archive: Path, argument: str | Path) -> str:
    if shutil.which("dpkg-deb") is None:
        raise ValueError("this machine has no dpkg-deb, which unpacks packages: install dpkg")
    run = subprocess.run(
        ["dpkg-deb", option, str(archive), str(argument)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise ValueError(f"{archive}: {run.stderr.strip()}; download it again")
    return run.stdout.strip()
