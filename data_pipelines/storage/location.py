"""Locations of objects: file paths, file://, s3://, gs:// and http(s)://, each parsed once."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

_HTTP_SCHEMES = ("http", "https")
_REMOTE_SCHEMES = ("s3", "gs", *_HTTP_SCHEMES)
_KEY_BYTES = 1024
"""Longest name of an object in S3 and Google's storage, in bytes."""
_ALLOWED = "a file path, file://, s3://, gs://, http:// or https://"


@dataclass(frozen=True, slots=True)
class Location:
    """The place of an object or a folder; `str` gives its URI as the user wrote it.

    A URI that storage cannot open is refused here, without touching the network.

    Args:
        uri: URI or file path.

    Attributes:
        scheme: Scheme in lower case; "" for a plain path.
        path: Local path; None if the location is remote.
        is_http: Whether it is on a web server, which can neither be listed nor written.

    Raises:
        ValueError: An unknown scheme, user name and password inside the URI, or a name that no
            storage of this scheme can hold.
    """

    uri: str
    scheme: str = field(init=False, compare=False, repr=False)
    path: Path | None = field(init=False, compare=False, repr=False)
    is_http: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        head, colon, rest = self.uri.partition(":")
        # ``pipe:command`` has a scheme although it has no //.
        scheme = head.lower() if colon and head and "/" not in head else ""
        rest = rest.removeprefix("//") if scheme else self.uri
        if "\0" in self.uri:
            raise ValueError(f"cannot open {self.uri!r}: it holds a zero byte: remove that")
        if scheme:
            _check(self.uri, scheme, rest)
        path = Path(rest) if scheme in ("", "file") else None
        object.__setattr__(self, "scheme", scheme)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "is_http", scheme in _HTTP_SCHEMES)

    @classmethod
    def parse(cls, place: "LocationLike") -> "Location":
        """Return the location that a URI or a path names; a location is returned unchanged."""
        return place if isinstance(place, Location) else cls(str(place))

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Location":
        """Return the location `name` below this folder.

        Args:
            name: Name, taken literally, except that a slash separates folders.
        """
        return Location(self.uri_of(name))

    def uri_of(self, name: str) -> str:
        """Return the URI of `name` below this folder, unchecked, for messages about bad names.

        Over http it is percent-encoded.
        """
        name = quote(name) if self.is_http else name
        return f"/{name}" if self.uri == "/" else f"{self.uri.rstrip('/') or '/'}/{name}"

    @property
    def display(self) -> str:
        """URI for messages, without its query: see `drop_query`."""
        return drop_query(self.uri)


LocationLike = str | Path | Location
"""Types that functions of storage accept."""


def endpoint() -> str:
    """Return the address of the server behind s3://; "" is Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def drop_query(text: str) -> str:
    """Return `text` without the query of a URL, where presigned URLs carry their signature."""
    return text.split("?", 1)[0] if "http://" in text or "https://" in text else text


def _check(uri: str, scheme: str, rest: str) -> None:
    if "@" in rest.split("/", 1)[0]:
        host = rest.split("/", 1)[0].rsplit("@", 1)[1]
        raise ValueError(
            f"the URI {scheme}://***@{host} holds credentials: take them out and pass them in the"
            " environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by an instance role"
        )
    if scheme not in ("file", *_REMOTE_SCHEMES):
        raise ValueError(
            f"cannot open {uri!r}: scheme {scheme!r} is refused; use {_ALLOWED}; a file of this"
            f" name is {'./' + uri!r}"
        )
    if not uri.startswith(scheme):
        raise ValueError(f"cannot open {uri!r}: write {scheme}: in lower case")
    if scheme in _REMOTE_SCHEMES:
        if not uri.startswith(f"{scheme}://"):
            shown = drop_query(uri)
            raise ValueError(f"cannot open {shown!r}: write {scheme}:// with two slashes")
        _check_remote(uri, scheme, rest)


def _check_remote(uri: str, scheme: str, rest: str) -> None:
    if not rest.strip("/"):
        raise ValueError(f"cannot open {uri!r}: the bucket or host is missing")
    shown = drop_query(uri)
    path = shown[len(scheme) + 3 :]
    if "/." in path and not {".", ".."}.isdisjoint(path.split("/")):
        raise ValueError(f"cannot open {shown!r}: take . and .. out of it")
    try:
        length = len(rest.partition("/")[2].encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"cannot open {shown!r}: the name is not UTF-8: rename it") from error
    if length > _KEY_BYTES and scheme in ("s3", "gs"):
        raise ValueError(
            f"cannot open {uri[:80]!r}…: the name has {length} bytes, {scheme}:// takes"
            f" {_KEY_BYTES}: choose a shorter one"
        )
