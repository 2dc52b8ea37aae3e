"""Storage errors: transient ones are retried until a deadline, others are explained.

Transient are connection errors, timeouts, 5xx and throttling. Waits are random, up to a limit that
doubles, and at least the server's Retry-After. Nothing retries on top of this. No attempt starts
after the deadline; the caller bounds the duration of an attempt.
"""

import email.utils
import errno
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from data_pipelines.storage.location import Location, endpoint

Result = TypeVar("Result")

DEADLINE_SECONDS = 180.0
"""Longest storage outage that operations wait for; a minute is common."""

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
_TRANSIENT_STATUSES = (408, 409, 425, 429)
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


_CREDENTIALS = {
    "s3": (
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the role",
        " (FSSPEC_S3_ANON=true reads a public bucket without any)",
    ),
    "gs": (
        "GOOGLE_APPLICATION_CREDENTIALS or the role",
        " (FSSPEC_GS_TOKEN=anon reads a public bucket without any)",
    ),
    **dict.fromkeys(("http", "https"), ("FSSPEC_HTTP, or the URL's signature", "")),
}
_CLOCK_SECONDS = 900
"""Largest clock difference; servers refuse requests signed further from their time."""
_CLOCK = (
    "this machine's clock is more than 15 minutes off the server's: set it, and keep it set with"
    " chrony or systemd-timesyncd"
)
_TOKEN = "the session token has expired or is malformed: renew AWS_SESSION_TOKEN or the login"
_REGION = (
    "the bucket is in another region: set AWS_DEFAULT_REGION to it, and AWS_ENDPOINT_URL, if you"
    " set that, to the region's server"
)
# Remedies by S3's error code. The answer to a HEAD has no body: then the code is the status.
_S3_CAUSES = {
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "TokenRefreshRequired"), _TOKEN),
    "400": f"without a reason; most often {_TOKEN}, or unset it",
    **dict.fromkeys(("RequestTimeTooSkewed", "RequestExpired"), _CLOCK),
    **dict.fromkeys(
        (
            *("PermanentRedirect", "TemporaryRedirect", "Redirect", "301", "307"),
            *("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
        ),
        _REGION,
    ),
    "InvalidAccessKeyId": "the server does not know the access key: check AWS_ACCESS_KEY_ID,"
    " AWS_PROFILE or the role, and whether the endpoint is theirs",
    "SignatureDoesNotMatch": "the secret is not the one of the access key: check"
    " AWS_SECRET_ACCESS_KEY",
    "InvalidBucketName": "no name of a bucket: 3 to 63 of a-z 0-9 . and -",
}


class StorageError(OSError):
    """Storage refused or did not answer; the message names the URI, endpoint and a remedy."""


class BadDownload(OSError):
    """The bytes that arrived are not the bytes that were expected."""


def retry(
    location: Location, action: Callable[[], Result], deadline_seconds: float = DEADLINE_SECONDS
) -> Result:
    """Return the result of `action`, retried after transient errors until the deadline.

    Raises:
        FileNotFoundError: There is no such object.
        StorageError: Access is denied, the server unreachable, or three downloads were damaged.
        Exception: The error of `action`, if `location` is local.
    """
    give_up_at = time.monotonic() + deadline_seconds
    longest_wait, bad_downloads = 0.2, 0
    while True:
        try:
            return action()
        except Exception as error:
            wait_seconds = max(random.uniform(0, longest_wait), _asked_wait_seconds(error))
            bad_downloads += _is_damage(error)
            hopeless = not (_is_transient(error) or _is_damage(error)) or bad_downloads == 3
            if hopeless or time.monotonic() + wait_seconds > give_up_at:
                raise _explain(location, error) from (None if _is_signed(location) else error)
        time.sleep(wait_seconds)
        longest_wait = min(2 * longest_wait, 10.0)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, TimeoutError):
        return True
    if isinstance(error, (StorageError, *_PERMANENT_ERRORS)):
        return False
    status, _ = _answer(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in _TRANSIENT_STATUSES
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS
    return any(cls.__name__ in _TRANSIENT_NAMES for cls in type(error).__mro__)


def _is_damage(error: Exception) -> bool:
    # botocore's, by name: the body does not match the server's checksum of the object.
    return isinstance(error, BadDownload) or type(error).__name__ == "FlexibleChecksumError"


def _answer(error: Exception) -> tuple[int | None, Mapping[str, str]]:
    """Return status and headers of the server's answer, if any; in s3fs the cause holds it."""
    response: Any = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        metadata: dict[str, Any] = cast(dict[str, Any], response).get("ResponseMetadata", {})
        return metadata.get("HTTPStatusCode"), metadata.get("HTTPHeaders", {})
    status: Any = getattr(error, "status", None)
    return (status if isinstance(status, int) else None), getattr(error, "headers", None) or {}


def _asked_wait_seconds(error: Exception) -> float:
    _, headers = _answer(error)
    text = headers.get("retry-after") or headers.get("Retry-After") or ""
    return float(text) if text.isdecimal() else 0.0


def _explain(location: Location, error: Exception) -> Exception:
    """Return the error that the user sees: the URI, the server and a remedy."""
    if isinstance(error, StorageError):
        return error
    if location.path is not None and not _is_damage(error):
        return error
    where, name, (status, _) = location.display, type(error).__name__, _answer(error)
    at = f" at {endpoint()}" if location.scheme == "s3" and endpoint() else ""
    keys, public = _CREDENTIALS.get(location.scheme, ("", ""))
    # An HTTP client's text repeats the query, where a presigned URL carries its signature.
    text = name if _is_signed(location) else " ".join((str(error) or name).split())[:300]
    if _is_damage(error):
        remedy = "damaged, or not what was indexed: write it again"
        return StorageError(f"{where}: {error}; {remedy}")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{where} does not exist{at}")
    denied = isinstance(error, PermissionError) or status in (401, 403)
    cause = _find_s3_cause(error) if location.scheme == "s3" else ""
    if cause:
        what = "access denied" if denied else "refused"
        return StorageError(f"{where}: {what}{at}; {cause}")
    if denied:
        return StorageError(f"{where}: access denied{at}; check {keys}{public}")
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(f"{where}: no credentials{at}; set {keys}{public}")
    if status == 416:
        return StorageError(
            f"{where}: the object ends before the bytes that were asked for: it is not the"
            " one that was indexed, or cut short; write it, or its index, again"
        )
    if isinstance(error, TimeoutError) and not str(error):
        text = "too slow, or silent"
    if _is_transient(error):
        remedy = "is AWS_ENDPOINT_URL right and the server up?" if at else "is the network open?"
        return StorageError(f"{where}: no answer{at} ({text}); {remedy}")
    return StorageError(f"{where}: failed{at} ({text})")


def _is_signed(location: Location) -> bool:
    return location.display != location.uri


def _find_s3_cause(error: Exception) -> str:
    """Return cause and remedy for S3's error code; "" if it is unknown."""
    response: Any = getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return ""
    answer = cast(dict[str, Any], response)
    code = str(answer.get("Error", {}).get("Code", ""))
    _, headers = _answer(error)
    cause = _S3_CAUSES.get(code, "")
    if cause is _REGION and (region := headers.get("x-amz-bucket-region")):
        cause = cause.replace("another region", f"region {region}")
    date = email.utils.parsedate_tz(headers.get("date", "")) if code == "403" else None
    if date and abs(time.time() - email.utils.mktime_tz(date)) > _CLOCK_SECONDS:
        cause = _CLOCK
    if code == "InvalidAccessKeyId" and os.environ.get("AWS_SESSION_TOKEN"):
        cause += "; a session token that has expired also looks like this: renew AWS_SESSION_TOKEN"
    return cause


def describe_missing(location: Location) -> str:
    """Return a message that nothing is at `location`, with a remedy."""
    if location.scheme not in ("s3", "gs"):
        return f"{location.display} does not exist: check the address"
    bucket = location.uri.split("/")[2]
    at = f" at {endpoint()}" if location.scheme == "s3" and endpoint() else ""
    return f"{location} does not exist{at}: check the name, or create bucket {bucket!r}"
