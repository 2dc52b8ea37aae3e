"""The clients behind `storage`: one per process and identity, with their limits and credentials.

Credentials come from the environment or a role, never from the URI. What users set:

- s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN; or AWS_PROFILE and the shared
  files; or nothing, where an instance, container or web identity has a role. FSSPEC_S3_ANON=true
  reads a public bucket without any. AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL) names another server.
- gs: GOOGLE_APPLICATION_CREDENTIALS or a role; FSSPEC_GS_TOKEN=anon for a public bucket.
- http: FSSPEC_HTTP='{"headers": {"Authorization": "Bearer …"}}', or a presigned URL.

fsspec reads the FSSPEC_ variables (any option of s3fs, gcsfs or its HTTP client) when it is
imported: set them before the program starts.
"""

import os
from typing import Any

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import fsspec.asyn  # pyright: ignore[reportMissingTypeStubs]
import fsspec.config  # pyright: ignore[reportMissingTypeStubs]

from data_pipelines.retries import StorageError
from data_pipelines.uris import display, endpoint, split_uri

ATTEMPT_SECONDS = 30.0
"""The longest silence of a server, and the longest that one attempt at a range takes."""
_CONNECT_SECONDS = 3.0
_CONNECTIONS = 32
"""As many at once as threads fetch, and some more; botocore allows 10."""
_LARGEST_PREFIX_BYTES = 2**24

_filesystems: dict[tuple[Any, ...], Any] = {}


def open_client(uri: str) -> Any:
    """One client per process and environment, shared by its threads but not across a fork."""
    scheme, _ = split_uri(uri)
    settings: dict[str, Any] = fsspec.config.conf.get(scheme, {})  # the FSSPEC_ variables
    identity = tuple(item for item in sorted(os.environ.items()) if item[0].startswith("AWS_"))
    key = (os.getpid(), scheme, identity, repr(settings))
    if key not in _filesystems:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
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
        elif scheme in ("http", "https"):
            from aiohttp import ClientTimeout  # local use does without aiohttp

            wait = ClientTimeout(sock_connect=_CONNECT_SECONDS, sock_read=ATTEMPT_SECONDS)
            options["client_kwargs"] = {"timeout": wait, **settings.get("client_kwargs", {})}
        try:
            filesystem = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            package = {"gs": "gcsfs", "s3": "s3fs"}.get(scheme, "aiohttp")
            raise StorageError(
                f"cannot open {display(uri)}: {scheme}:// needs `pip install {package}`"
            ) from error
        filesystem.retries = 1  # s3fs would retry inside our retries
        _filesystems.setdefault(key, filesystem)  # another thread may have been faster
    return _filesystems[key]


def read_http_range(uri: str, start: int, end: int, timeout_seconds: float) -> bytes:
    """Bytes [start, end), fewer where the object ends before.

    fsspec's own would fetch the whole object where ranges are not known.
    """
    client = open_client(uri)
    data: Any = fsspec.asyn.sync(
        client.loop, _get_http_range, client, uri, start, end, timeout=timeout_seconds
    )
    return data


async def _get_http_range(client: Any, uri: str, start: int, end: int) -> bytes:
    session, options = await client.set_session(), client.kwargs
    headers = {**options.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    headers["Accept-Encoding"] = "identity"
    async with session.get(client.encode_url(uri), **{**options, "headers": headers}) as response:
        client._raise_not_found_for_status(response, uri)
        if response.status == 206:
            return await response.read()
        size = response.content_length
        if size is None or size > _LARGEST_PREFIX_BYTES:
            raise StorageError(
                f"{display(uri)}: the server ignores Range and would send the whole object for"
                " every part of it: use one that knows ranges, or copy the object to s3:// or here"
            )
        return (await response.read())[start:end]
