"""How sources are told apart and found: hashes of listings, versions, places for every process."""

import hashlib
import importlib.metadata
from collections.abc import Mapping

from data_pipelines.storage import Location, LocationLike


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


def make_absolute(uri: LocationLike) -> Location:
    """The same place for a worker, which runs in another folder; without a slash at the end.

    Raises:
        ValueError: it is empty, as a variable of the shell that is not set.
    """
    if uri == "":
        raise ValueError("an empty path: name a folder, . for this one")
    location = Location.parse(uri)
    if location.path is not None:
        return Location.parse(location.path.absolute())
    return Location.parse(location.uri.rstrip("/"))
