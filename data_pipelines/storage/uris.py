"""The URIs that shards and runs are named by: file paths, file://, s3://, gs:// and http(s)://."""

import os
from pathlib import Path
from urllib.parse import quote

_REMOTE_SCHEMES = ("s3", "gs", "http", "https")
_KEY_BYTES = 1024
"""The longest name of an object in S3 and Google's storage."""
_ALLOWED = "a file path, file://, s3://, gs://, http:// or https://"


def join(uri: str, *names: str) -> str:
    """`uri` with `names` appended, one slash between each; over http with %XX where a URL wants it.

    Args:
        uri: Folder.
        names: Names below it, as they are: none is syntax.
    """
    if split_uri(uri)[0] in ("http", "https"):
        names = tuple(quote(name) for name in names)
    return "/".join([uri.rstrip("/") or "/", *names]).replace("//", "/", uri == "/")


def check_uri(uri: str) -> None:
    """Refuse what `storage` would not open, without touching the network.

    Raises:
        ValueError: an unknown scheme, user name and password inside the URI, or a name that no
            storage of this scheme can hold.
    """
    scheme, rest = split_uri(uri)
    if "\0" in uri:
        raise ValueError(f"cannot open {uri!r}: it holds a zero byte: remove that")
    if scheme and "@" in rest.split("/", 1)[0]:
        host = rest.split("/", 1)[0].rsplit("@", 1)[1]
        raise ValueError(
            f"the URI {scheme}://***@{host} holds credentials: take them out and pass them in the"
            " environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by an instance role"
        )
    if scheme not in ("", "file", *_REMOTE_SCHEMES):
        raise ValueError(
            f"cannot open {uri!r}: scheme {scheme!r} is refused; use {_ALLOWED}; a file of this"
            f" name is {'./' + uri!r}"
        )
    if scheme and not uri.startswith(scheme):
        raise ValueError(f"cannot open {uri!r}: write {scheme}: in small letters")
    if scheme in _REMOTE_SCHEMES:
        if not uri.startswith(f"{scheme}://"):
            raise ValueError(f"cannot open {display(uri)!r}: write {scheme}:// with two slashes")
        _check_remote(uri, scheme, rest)


def _check_remote(uri: str, scheme: str, rest: str) -> None:
    if not rest.strip("/"):
        raise ValueError(f"cannot open {uri!r}: the bucket or host is missing")
    path = display(uri)[len(scheme) + 3 :]
    if "/." in path and not {".", ".."}.isdisjoint(path.split("/")):
        raise ValueError(f"cannot open {display(uri)!r}: take . and .. out of it")
    try:
        length = len(rest.partition("/")[2].encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"cannot open {display(uri)!r}: the name is not UTF-8: rename it"
        ) from error
    if length > _KEY_BYTES and scheme in ("s3", "gs"):
        raise ValueError(
            f"cannot open {uri[:80]!r}…: the name has {length} bytes, {scheme}:// takes"
            f" {_KEY_BYTES}: choose a shorter one"
        )


def local_path(uri: str) -> Path | None:
    """The path that `uri` names on this machine, or None when it is remote."""
    check_uri(uri)
    scheme, rest = split_uri(uri)
    if scheme == "":
        return Path(uri)
    return Path(rest) if scheme == "file" else None


def split_uri(uri: str) -> tuple[str, str]:
    """(scheme, rest); a plain path has scheme ''. ``pipe:cmd`` has one although it has no //."""
    head, colon, rest = uri.partition(":")
    if not colon or "/" in head or not head:
        return "", uri
    return head.lower(), rest.removeprefix("//")


def endpoint() -> str | None:
    """Address of the server that s3:// means; None is Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def display(uri: str) -> str:
    """`uri`; over http without its query, where presigned URLs carry their signature."""
    return uri.split("?", 1)[0] if "http://" in uri or "https://" in uri else uri
