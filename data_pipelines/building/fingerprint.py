"""Identity of sources: hashes of listings, versions of packages, absolute locations."""

import hashlib
import importlib.metadata
from collections.abc import Mapping

from data_pipelines.storage import Location, LocationLike


def digest(sizes: Mapping[str, int]) -> str:
    """Hash names and sizes, which distinguishes listings without reading the files."""
    return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:16]


def find_version(package: str) -> str:
    """Return the installed version of a package that contains images.

    Raises:
        ValueError: The package is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"this source needs the package {package}: `pip install efae[local]`"
        ) from error


def make_absolute(uri: LocationLike) -> Location:
    """Make a location absolute for workers, which run in other folders; drop a final slash.

    Raises:
        ValueError: It is empty, as from an unset shell variable.
    """
    if uri == "":
        raise ValueError("an empty path: name a folder, . for this one")
    location = Location.parse(uri)
    if location.path is not None:
        return Location.parse(location.path.absolute())
    return Location.parse(location.uri.rstrip("/"))
