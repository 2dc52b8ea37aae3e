"""Storage errors: the transient ones are tried again until a deadline, the others explained.

Transient are connection errors, timeouts, 5xx and throttling. Waits are random, up to a limit that
doubles. Nothing retries on top of this.
"""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from data_pipelines.uris import display, endpoint, local_path, split_uri

Result = TypeVar("Result")

DEADLINE_SECONDS = 60.0

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


class BadDownload(OSError):
    """The bytes that arrived are not the bytes that were expected."""


def retry(
    uri: str, action: Callable[[], Result], deadline_seconds: float = DEADLINE_SECONDS
) -> Result:
    """The result of `action`, tried again after transient errors until the deadline.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: denied, unreachable, or damaged three times.
        Exception: what `action` raised, where `uri` is local.
    """
    give_up_at = time.monotonic() + deadline_seconds
    longest_wait, bad_downloads = 0.2, 0
    while True:
        try:
            return action()
        except Exception as error:
            wait_seconds = random.uniform(0, longest_wait)
            bad_downloads += isinstance(error, BadDownload)
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
    if local_path(uri) is not None and not isinstance(error, BadDownload):
        return error
    scheme, name, status = split_uri(uri)[0], type(error).__name__, getattr(error, "status", None)
    at = f" at {endpoint()}" if scheme == "s3" and endpoint() else ""
    keys = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"}.get(scheme, "your credentials")
    # An HTTP client's text repeats the query, where a presigned URL carries its signature.
    first_line = name if "?" in uri else (str(error) or name).splitlines()[0]
    if isinstance(error, BadDownload):
        return StorageError(f"{display(uri)}: {error}; the object is damaged: write it again")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{display(uri)} does not exist{at}")
    if isinstance(error, PermissionError) or status in (401, 403):
        return StorageError(f"{display(uri)}: access denied{at}; check {keys}")
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(f"{display(uri)}: no credentials{at}; set {keys}")
    if _is_transient(error):
        remedy = "is AWS_ENDPOINT_URL right and the server up?" if at else "is the network open?"
        return StorageError(f"{display(uri)}: no answer{at} ({first_line}); {remedy}")
    return StorageError(f"{display(uri)}: failed{at} ({first_line})")


def describe_missing(uri: str) -> str:
    """That nothing is at `uri`, and what to do."""
    bucket = split_uri(uri)[1].split("/", 1)[0]
    at = f" at {endpoint()}" if endpoint() else ""
    return f"{display(uri)} does not exist{at}: check the name, or create bucket {bucket!r}"
