"""The clients behind `storage`: one per process and identity, with their limits and credentials.

Credentials come from the environment or a role, never from the URI. Users set:

- s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN; or AWS_PROFILE and the shared
  files; or nothing, if an instance, container or web identity has a role. FSSPEC_S3_ANON=true
  reads a public bucket without any. AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL) names another server.
- gs: GOOGLE_APPLICATION_CREDENTIALS or a role; FSSPEC_GS_TOKEN=anon for a public bucket.
- http: FSSPEC_HTTP='{"headers": {"Authorization": "Bearer …"}}', or a presigned URL.

fsspec reads the FSSPEC_ variables (any option of s3fs, gcsfs or its HTTP client) when it is
imported: set them before the program starts.
"""

import contextlib
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import fsspec.asyn  # pyright: ignore[reportMissingTypeStubs]
import fsspec.config  # pyright: ignore[reportMissingTypeStubs]

from data_pipelines.storage.location import Location, endpoint
from data_pipelines.storage.retries import StorageError, retry

ATTEMPT_SECONDS = 30.0
"""Longest silence of a server, and longest attempt to read a range."""
_CONNECT_SECONDS = 3.0
_CONNECTIONS = 32
"""Most connections: more than the fetching threads; botocore's default is 10."""
_LARGEST_PREFIX_BYTES = 2**24
_KEYS_PER_REQUEST = 1000
_DELETING_THREADS = 8
_TRANSIENT_CODES = {"InternalError", "SlowDown", "ServiceUnavailable", "OperationAborted"}

_filesystems: dict[tuple[Any, ...], Any] = {}


def open_client(location: Location) -> Any:
    """Return the client of this process and environment: threads share it, forks do not."""
    scheme = location.scheme
    settings: dict[str, Any] = fsspec.config.conf.get(scheme, {})  # the FSSPEC_ variables
    identity = tuple(item for item in sorted(os.environ.items()) if item[0].startswith("AWS_"))
    key = (os.getpid(), scheme, identity, repr(settings))
    if key not in _filesystems:
        if scheme == "s3":
            _check_credentials()
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if scheme in ("s3", "gs"):
            options["version_aware"] = False  # else gcsfs reads `#123` as a generation
        if scheme == "s3":
            config: dict[str, Any] = {
                "connect_timeout": _CONNECT_SECONDS,
                "read_timeout": ATTEMPT_SECONDS,
                "max_pool_connections": _CONNECTIONS,
            }
            options["config_kwargs"] = {
                **config,
                **settings.get("config_kwargs", {}),
                "retries": {"total_max_attempts": 1},
            }
            if endpoint():
                options["endpoint_url"] = endpoint()
        elif location.is_http:
            from aiohttp import ClientTimeout  # local use does not need aiohttp

            wait = ClientTimeout(sock_connect=_CONNECT_SECONDS, sock_read=ATTEMPT_SECONDS)
            options["client_kwargs"] = {"timeout": wait, **settings.get("client_kwargs", {})}
        try:
            filesystem = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            package = {"gs": "gcsfs", "s3": "s3fs"}.get(scheme, "aiohttp")
            raise StorageError(
                f"cannot open {location.display}: {scheme}:// needs `pip install {package}`"
            ) from error
        filesystem.retries = 1  # s3fs would retry inside our retries
        if scheme == "s3":
            filesystem.split_path = partial(_split_literally, filesystem)
        _filesystems.setdefault(key, filesystem)  # another thread may have stored one first
    return _filesystems[key]


def _split_literally(client: Any, path: str) -> tuple[str, str, None]:
    """Return (bucket, key, None): s3fs's own function cuts a key at `?versionId=`."""
    path = path.removeprefix("s3://").lstrip("/")
    bucket, key = client._find_bucket_key(path)  # a bucket may be an ARN, with slashes
    return bucket, key, None


def list_objects(location: Location) -> dict[str, int]:
    """List all objects below `location`, folder markers too, as {relative name: bytes}.

    Raises:
        FileNotFoundError: There is no such bucket.
        StorageError: Access is denied, or the server unreachable.
    """
    client = open_client(location)
    if location.scheme == "gs":
        prefix = client._strip_protocol(location.uri).rstrip("/") + "/"
        found = retry(location, lambda: client.find(location.uri, detail=True))
        return {
            name.removeprefix(prefix): int(facts["size"])
            for name, facts in found.items()
            if name.startswith(prefix)
        }
    bucket, key, _ = client.split_path(location.uri.rstrip("/"))
    # s3fs's own listing strips a leading slash off the prefix, and lists another folder.
    prefix = f"{key}/" if key else ""
    objects: dict[str, int] = {}
    page: dict[str, Any] = {"NextContinuationToken": None}
    while "NextContinuationToken" in page:
        token = page["NextContinuationToken"]
        where = {"Bucket": bucket, "Prefix": prefix}
        if token is not None:
            where["ContinuationToken"] = token
        page = retry(location, partial(client.call_s3, "list_objects_v2", **where))
        for entry in page.get("Contents", []):
            if entry["Key"].startswith(prefix):
                objects[entry["Key"].removeprefix(prefix)] = int(entry["Size"])
    return objects


def delete_objects(location: Location) -> None:
    """Delete the object of this name and all below it; no name is a pattern.

    Raises:
        FileNotFoundError: There is no such bucket.
        StorageError: Access is denied, or the server unreachable.
    """
    client, many = open_client(location), location.scheme == "s3"
    found = [*map(location.uri_of, list_objects(location)), location.uri.rstrip("/")]
    # A bulk request is XML, which cannot carry control characters.
    together = [uri for uri in found if many and uri.isprintable()]
    single = [uri for uri in found if not many or not uri.isprintable()]
    for start in range(0, len(together), _KEYS_PER_REQUEST):
        batch = together[start : start + _KEYS_PER_REQUEST]
        retry(location, partial(_delete_together, client, batch))

    def delete_one(uri: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            retry(location, lambda: client.rm_file(uri))

    with ThreadPoolExecutor(_DELETING_THREADS) as threads:
        list(threads.map(delete_one, single))


def _delete_together(client: Any, names: Sequence[str]) -> None:
    places = [client.split_path(name) for name in names]
    objects = {"Objects": [{"Key": key} for _, key, _ in places], "Quiet": True}
    answer: dict[str, Any] = client.call_s3("delete_objects", Bucket=places[0][0], Delete=objects)
    failed: list[dict[str, str]] = [
        error for error in answer.get("Errors", []) if error.get("Code") != "NoSuchKey"
    ]
    if any(error.get("Code") in _TRANSIENT_CODES for error in failed):
        raise OSError(errno.EBUSY, f"{len(failed)} of {len(names)} objects were not deleted")
    if failed:
        first = failed[0]
        raise StorageError(
            f"{names[0].split('://')[0]}://{places[0][0]}/{first.get('Key')} could not be deleted"
            f" ({first.get('Code')}: {first.get('Message', '')}), as {len(failed)} of"
            f" {len(names)} objects: check that your credentials may delete there"
        )


def _check_credentials() -> None:
    """Refuse keys that no request can carry, before hours of work or minutes of retries.

    Raises:
        StorageError: A key is malformed; the message names the variable, not its value.
    """
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        value = os.environ.get(name, "")
        if not value.isascii():
            fault = "a character outside ASCII"
        elif not value.isprintable():
            fault = "a line break or another control character"
        elif " " in value:
            fault = "a space"
        else:
            continue
        raise StorageError(f"{name} holds {fault}: set it again, to the key alone")


def find_http(location: Location, timeout_seconds: float) -> str:
    """Request the first byte: fsspec's own check takes each failure for a missing object.

    Returns:
        The object's version; "" if the server tells none.

    Raises:
        FileNotFoundError: There is no such object.
        Exception: An error of aiohttp: the server refuses or does not answer.
    """
    client = open_client(location)
    version: Any = fsspec.asyn.sync(
        client.loop, _find_http, client, location.uri, timeout=timeout_seconds
    )
    return version


async def _find_http(client: Any, uri: str) -> str:
    session, options = await client.set_session(), client.kwargs
    headers = {**options.get("headers", {}), "Range": "bytes=0-0"}
    async with session.get(client.encode_url(uri), **{**options, "headers": headers}) as response:
        if response.status != 416:  # an empty object
            client._raise_not_found_for_status(response, uri)
        tags = [response.headers.get(name) for name in ("ETag", "Last-Modified")]
        return " ".join(filter(None, tags))


def read_http_range(location: Location, start: int, end: int, timeout_seconds: float) -> bytes:
    """Read bytes [start, end), fewer if the object ends before.

    fsspec's own function fetches the whole object if the server does not support ranges.
    """
    client = open_client(location)
    data: Any = fsspec.asyn.sync(
        client.loop, _get_http_range, client, location, start, end, timeout=timeout_seconds
    )
    return data


async def _get_http_range(client: Any, location: Location, start: int, end: int) -> bytes:
    session, options = await client.set_session(), client.kwargs
    headers = {**options.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    headers["Accept-Encoding"] = "identity"
    async with session.get(
        client.encode_url(location.uri), **{**options, "headers": headers}
    ) as response:
        client._raise_not_found_for_status(response, location.uri)
        if response.status == 206:
            return await response.read()
        size = response.content_length
        if size is None or size > _LARGEST_PREFIX_BYTES:
            raise StorageError(
                f"{location.display}: the server ignores Range and would send the whole object for"
                " every part of it: use one with Range support, or copy the object to s3:// or here"
            )
        return (await response.read())[start:end]
