"""The URIs that shards and runs are named by: file paths, file://, s3://, gs:// and http(s)://."""

import os
from pathlib import Path

_REMOTE_SCHEMES = ("s3", "gs", "http", "https")
_ALLOWED = "a file path, file://, s3://, gs://, http:// or https://"


def join(uri: str, *names: str) -> str:
    """`uri` with `names` appended, one slash between each."""
    return "/".join([uri.rstrip("/") or "/", *names]).replace("//", "/", uri == "/")


def check_uri(uri: str) -> None:
    """Refuse what `storage` would not open, without touching the network.

    Raises:
        ValueError: an unknown scheme, or user name and password inside the URI.
    """
    scheme, rest = split_uri(uri)
    if scheme and "@" in rest.split("/", 1)[0]:
        host = rest.split("/", 1)[0].rsplit("@", 1)[1]
        raise ValueError(
            f"the URI {scheme}://***@{host} holds credentials: take them out and pass them in the"
            " environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by an instance role"
        )
    if scheme not in ("", "file", *_REMOTE_SCHEMES):
        raise ValueError(f"cannot open {uri!r}: scheme {scheme!r} is refused; use {_ALLOWED}")
    if scheme in _REMOTE_SCHEMES and not rest.strip("/"):
        raise ValueError(f"cannot open {uri!r}: the bucket or host is missing")


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
    """`uri` without its query, where presigned URLs carry their signature."""
    return uri.split("?", 1)[0]
