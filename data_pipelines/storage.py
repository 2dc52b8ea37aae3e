"""The only place that opens a URI: local files, s3://, gs:// and http(s)://, through fsspec.

Credentials come from the environment or the instance's role, never from the URI. Transient errors
(connection, timeout, 5xx, throttling) are retried here, with jitter, until a deadline; nothing
retries on top of it. Every write is whole or absent: a local file is renamed into place, an object
store shows an object only when its PUT or multipart upload is complete.
"""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec

Result = TypeVar("Result")

DEADLINE_SECONDS = 60.0
PREFLIGHT_SECONDS = 5.0
_REMOTE_SCHEMES = ("s3", "gs", "http", "https")
_ALLOWED = "a file path, file://, s3://, gs://, http:// or https://"
_TRANSFER_THREADS = 4

_PERMANENT_ERRNOS = {
    errno.EINVAL,
    errno.EPERM,
    errno.ENOSYS,
    errno.ENAMETOOLONG,
    errno.EMSGSIZE,
    errno.EREMCHG,
    errno.ENOSPC,
    errno.EROFS,
    errno.EDQUOT,
}
_PERMANENT_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
# Errors of botocore and aiohttp that are not OSErrors, by name: neither is imported for local use.
_TRANSIENT_NAMES = {
    "EndpointConnectionError",
    "HTTPClientError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ResponseParserError",
}


class StorageError(OSError):
    """Storage refused or did not answer; the message names the URI, the endpoint and a remedy."""


class _BadDownload(OSError):
    """The bytes that arrived are not the bytes that were expected."""


def join(uri: str, *names: str) -> str:
    """`uri` with `names` appended, one slash between each."""
    return "/".join([uri.rstrip("/") or "/", *names]).replace("//", "/", uri == "/")


def check_uri(uri: str) -> None:
    """Refuse what this module would not open, without touching the network.

    Raises:
        ValueError: an unknown scheme, or user name and password inside the URI.
    """
    scheme, rest = _split(uri)
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
    scheme, rest = _split(uri)
    if scheme == "":
        return Path(uri)
    return Path(rest) if scheme == "file" else None


def read_bytes(uri: str) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError: there is none.
        StorageError: access denied, or no answer within the deadline.
    """
    path = local_path(uri)
    if path is not None:
        return path.read_bytes()
    return _retry(uri, lambda: _filesystem(uri).cat_file(uri))


def write_bytes(uri: str, data: bytes) -> None:
    """Create or replace the object, atomically."""
    path = local_path(uri)
    if path is None:
        _refuse_read_only(uri)
        _retry(uri, lambda: _filesystem(uri).pipe_file(uri, data))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _renamed_into(path) as part:
        part.write_bytes(data)


def exists(uri: str) -> bool:
    """Whether an object, or a folder with something in it, has this name."""
    path = local_path(uri)
    if path is not None:
        return path.exists()
    try:
        found = _retry(uri, lambda: _filesystem(uri).info(uri))
    except FileNotFoundError:
        return False
    # SeaweedFS keeps empty folders, as objects of no size, after their last file is deleted.
    return found["type"] == "file" or bool(list_files(uri))


def list_files(uri: str) -> dict[str, int]:
    """Every file below `uri`, as {name relative to it: bytes}, sorted; {} when there is none."""
    path = local_path(uri)
    if path is not None:
        files = (Path(root) / name for root, _, names in os.walk(path) for name in names)
        found = {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
        return dict(sorted(found.items()))
    _refuse_read_only(uri, "be listed")
    filesystem = _filesystem(uri)
    prefix = filesystem._strip_protocol(uri).rstrip("/") + "/"
    details = _retry(uri, lambda: filesystem.find(uri, detail=True))
    return {
        name.removeprefix(prefix): int(details[name]["size"])
        for name in sorted(details)
        if name.startswith(prefix) and not name.endswith("/")
    }


def download(
    uri: str,
    path: str | Path,
    expected_bytes: int | None = None,
    sha256: str | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> None:
    """Copy one object to `path`, which appears only when it is whole and as expected.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: denied, unreachable, or still not `expected_bytes` long or of this `sha256`
            when the deadline passed.
    """
    path, source = Path(path), local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)

    def copy_once() -> None:
        with _renamed_into(path) as part:
            if source is not None:
                shutil.copyfile(source, part)
            else:
                _filesystem(uri).get_file(uri, str(part))
            _check_content(part, expected_bytes, sha256)

    _retry(uri, copy_once, deadline_seconds)


def download_folder(uri: str, path: str | Path) -> None:
    """Copy every file below `uri` into the folder `path`.

    Raises:
        FileNotFoundError: nothing is there.
    """
    sizes = list_files(uri)
    if not sizes:
        raise FileNotFoundError(f"{uri} does not exist or is empty")
    _transfer(lambda name: download(join(uri, name), Path(path) / name, sizes[name]), list(sizes))


def upload_folder(path: str | Path, uri: str) -> None:
    """Copy every file below the folder `path` to the same name below `uri`."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"cannot upload {folder}: it is not a folder")
    _transfer(lambda name: upload(folder / name, join(uri, name)), list(list_files(str(folder))))


def upload(path: str | Path, uri: str) -> None:
    """Copy one local file to `uri`, atomically."""
    target = local_path(uri)
    if target is None:
        _refuse_read_only(uri)
        _retry(uri, lambda: _filesystem(uri).put_file(str(path), uri))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _renamed_into(target) as part:
        shutil.copyfile(path, part)


def delete(uri: str) -> None:
    """Remove the object, or the folder and all below it; nothing there is no error."""
    path = local_path(uri)
    if path is not None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    _refuse_read_only(uri)
    with contextlib.suppress(FileNotFoundError):
        _retry(uri, lambda: _filesystem(uri).rm(uri, recursive=True))


def check_readable(uri: str) -> None:
    """Answer within seconds whether something can be read at `uri`.

    Raises:
        StorageError: missing, denied or unreachable, in one sentence with a remedy.
    """
    path = local_path(uri)
    if path is not None:
        if not path.exists():
            raise StorageError(f"{uri} does not exist on this machine: check the path")
        if not os.access(path, os.R_OK):
            raise StorageError(f"{uri} cannot be read: check its permissions")
        return
    filesystem = _filesystem(uri)
    try:
        _retry(uri, lambda: filesystem.info(uri, timeout=PREFLIGHT_SECONDS), PREFLIGHT_SECONDS / 2)
    except FileNotFoundError as error:
        remedy = "or write shards there with python -m data_pipelines.build_shards"
        raise StorageError(f"{_missing(uri)}, {remedy}") from error


def check_writable(uri: str) -> None:
    """Answer within seconds whether objects below `uri` can be written, by writing one.

    Raises:
        StorageError: missing bucket, denied or unreachable, in one sentence with a remedy.
    """
    probe = join(uri, f".write-check-{uuid.uuid4().hex}")
    if local_path(uri) is not None:
        try:
            write_bytes(probe, b"")
            delete(probe)
        except OSError as error:
            raise StorageError(f"{uri} cannot be written ({error.strerror})") from error
        return
    _refuse_read_only(uri)
    filesystem = _filesystem(uri)

    def write_probe() -> None:
        if _split(uri)[0] == "s3":  # some servers create a missing bucket on PUT
            with contextlib.suppress(PermissionError):
                bucket = _split(uri)[1].split("/", 1)[0]
                filesystem.call_s3("head_bucket", Bucket=bucket, timeout=PREFLIGHT_SECONDS)
        filesystem.pipe_file(probe, b"", timeout=PREFLIGHT_SECONDS)
        filesystem.rm_file(probe)

    try:
        _retry(uri, write_probe, PREFLIGHT_SECONDS / 2)
    except FileNotFoundError as error:
        raise StorageError(_missing(uri)) from error


def _split(uri: str) -> tuple[str, str]:
    """(scheme, rest); a plain path has scheme ''. ``pipe:cmd`` has one although it has no //."""
    head, colon, rest = uri.partition(":")
    if not colon or "/" in head or not head:
        return "", uri
    return head.lower(), rest.removeprefix("//")


_filesystems: dict[tuple, Any] = {}


def _filesystem(uri: str) -> Any:
    """One client per process and environment; none is shared across a fork."""
    scheme, _ = _split(uri)
    identity = [os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    key = (os.getpid(), scheme, _endpoint(), *identity, os.environ.get("AWS_SESSION_TOKEN"))
    if key not in _filesystems:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if scheme == "s3":
            options |= {
                "endpoint_url": _endpoint(),
                "config_kwargs": {
                    "connect_timeout": 3,
                    "read_timeout": 30,
                    "retries": {"total_max_attempts": 1},
                },
            }
        try:
            filesystem = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            package = {"gs": "gcsfs", "s3": "s3fs"}.get(scheme, "aiohttp")
            raise ValueError(f"cannot open {uri}: {scheme}:// needs `pip install {package}`") from (
                error
            )
        filesystem.retries = 1  # s3fs would retry inside our retries
        _filesystems[key] = filesystem
    return _filesystems[key]


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _retry(
    uri: str, action: Callable[[], Result], deadline_seconds: float = DEADLINE_SECONDS
) -> Result:
    """The result of `action`, tried again after transient errors until the deadline."""
    give_up_at = time.monotonic() + deadline_seconds
    longest_wait, bad_downloads = 0.2, 0
    while True:
        try:
            return action()
        except Exception as error:
            wait_seconds = random.uniform(0, longest_wait)
            bad_downloads += isinstance(error, _BadDownload)
            hopeless = not _is_transient(error) or bad_downloads == 3
            if hopeless or time.monotonic() + wait_seconds > give_up_at:
                raise _explain(uri, error) from (None if "?" in uri else error)
        time.sleep(wait_seconds)
        longest_wait = min(2 * longest_wait, 10.0)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, _PERMANENT_ERRORS):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status == 429
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS
    return any(cls.__name__ in _TRANSIENT_NAMES for cls in type(error).__mro__)


def _explain(uri: str, error: Exception) -> Exception:
    """The error that the user sees: what was asked, of whom, and what to do."""
    if local_path(uri) is not None and not isinstance(error, _BadDownload):
        return error
    scheme, name, status = _split(uri)[0], type(error).__name__, getattr(error, "status", None)
    at = f" at {_endpoint()}" if scheme == "s3" and _endpoint() else ""
    keys = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"}.get(scheme, "your credentials")
    # An HTTP client's text repeats the query, where a presigned URL carries its signature.
    first_line = name if "?" in uri else (str(error) or name).splitlines()[0]
    if isinstance(error, _BadDownload):
        return StorageError(f"{_display(uri)}: {error}; the object is damaged: write it again")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{_display(uri)} does not exist{at}")
    if isinstance(error, PermissionError) or status in (401, 403):
        return StorageError(f"{_display(uri)}: access denied{at}; check {keys}")
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(f"{_display(uri)}: no credentials{at}; set {keys}")
    if _is_transient(error):
        remedy = "is AWS_ENDPOINT_URL right and the server up?" if at else "is the network open?"
        return StorageError(f"{_display(uri)}: no answer{at} ({first_line}); {remedy}")
    return StorageError(f"{_display(uri)}: failed{at} ({first_line})")


def _missing(uri: str) -> str:
    bucket = _split(uri)[1].split("/", 1)[0]
    at = f" at {_endpoint()}" if _endpoint() else ""
    return f"{_display(uri)} does not exist{at}: check the name, or create bucket {bucket!r}"


def _display(uri: str) -> str:
    """`uri` without its query, where presigned URLs carry their signature."""
    return uri.split("?", 1)[0]


def _refuse_read_only(uri: str, operation: str = "be written") -> None:
    if _split(uri)[0] in ("http", "https"):
        raise ValueError(
            f"{_display(uri)} cannot {operation} over http: use s3://, gs:// or a path"
        )


def _check_content(path: Path, expected_bytes: int | None, sha256: str | None) -> None:
    size = path.stat().st_size
    if expected_bytes is not None and size != expected_bytes:
        raise _BadDownload(f"{size} bytes arrived, {expected_bytes} expected")
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise _BadDownload(f"sha256 is {found[:12]}…, {sha256[:12]}… expected")


@contextlib.contextmanager
def _renamed_into(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` that replaces it when the block succeeds."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _transfer(copy: Callable[[str], None], names: list[str]) -> None:
    with ThreadPoolExecutor(_TRANSFER_THREADS) as threads:
        list(threads.map(copy, names))
