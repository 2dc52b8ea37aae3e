"""What tells one version of a source from another: hashes of listings, versions of packages."""

import hashlib
import importlib.metadata
from collections.abc import Mapping


def digest(sizes: Mapping[str, int]) -> str:
    """A hash of names and sizes: tells listings apart without reading the files."""
    return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:16]


def find_version(package: str) -> str:
    """The installed version of a package that holds images.

    Raises:
        ValueError: not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"this source needs the package {package}: `pip install efae[local]`"
        ) from error
