"""Operations on objects: local files, s3://, gs:// and http(s)://, through fsspec.

Every write is atomic: a local file is renamed into place, and an object store shows an object only
when its PUT or multipart upload is complete. Every wait is bounded: see `retries`. Credentials
and other settings: see `clients`. Names are literal: `[ ] * ? # %` stand for themselves.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipelines.storage.clients import (
    ATTEMPT_SECONDS,
    delete_objects,
    find_http,
    list_objects,
    open_client,
    read_http_range,
)
from data_pipelines.storage.files import read_file, refuse_endless, renamed_into
from data_pipelines.storage.location import Location, LocationLike
from data_pipelines.storage.retries import (
    DEADLINE_SECONDS,
    BadDownload,
    StorageError,
    describe_missing,
    retry,
)
from data_pipelines.storage.tree import UNLISTABLE, Tree, walk

PREFLIGHT_SECONDS = 5.0
_SLOWEST_BYTES_PER_SECOND = 2**18
_TRANSFER_THREADS = 4
_SYSTEM_FOLDER = "lost+found"


def read_bytes(uri: LocationLike) -> bytes:
    """Read the whole object.

    Raises:
        FileNotFoundError: There is none.
        StorageError: Access is denied, or there is no answer within the deadline.
    """
    location = Location.parse(uri)
    if location.path is not None:
        return read_file(location.path)
    limit = _attempt_seconds(2**24)  # objects that are read whole are small
    return retry(location, lambda: open_client(location).cat_file(location.uri, timeout=limit))


def read_range(
    uri: LocationLike, start: int, end: int, deadline_seconds: float = DEADLINE_SECONDS
) -> bytes:
    """Read bytes [start, end) of the object, no fewer; thread-safe.

    One attempt takes at most `ATTEMPT_SECONDS`, or the deadline if that is shorter. HTTP servers
    without Range support are tolerated for objects up to 16 MiB.

    Raises:
        ValueError: The range is negative or reversed.
        FileNotFoundError: There is no such object.
        StorageError: Access is denied, the server unreachable, or three attempts returned another
            number of bytes.
    """
    location = Location.parse(uri)
    if not 0 <= start <= end:
        raise ValueError(f"{location.display}: there is no range of bytes [{start}, {end})")
    if start == end:
        return b""
    limit = min(ATTEMPT_SECONDS, deadline_seconds)

    def read_once() -> bytes:
        data: Any
        if location.path is not None:
            data = read_file(location.path, start, end)
        elif location.is_http:
            data = read_http_range(location, start, end, limit)
        else:
            client = open_client(location)
            data = client.cat_file(location.uri, start=start, end=end, timeout=limit)
        if len(data) != end - start:
            raise BadDownload(f"{len(data)} bytes arrived, {end - start} expected from {start} on")
        return data

    return retry(location, read_once, deadline_seconds)


def write_bytes(uri: LocationLike, data: bytes, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Create or replace the object, atomically."""
    location = Location.parse(uri)
    path = location.path
    if path is None:
        _refuse_read_only(location)
        retry(
            location, lambda: open_client(location).pipe_file(location.uri, data), deadline_seconds
        )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_into(path, len(data)) as part:
        part.write_bytes(data)


def exists(uri: LocationLike) -> bool:
    """Return whether an object or a folder that is not empty has this name."""
    location = Location.parse(uri)
    if location.path is not None:
        return location.path.exists()
    try:
        if location.is_http:
            return retry(location, lambda: _is_served(location, ATTEMPT_SECONDS))
        found = retry(location, lambda: open_client(location).info(location.uri))
    except FileNotFoundError:
        return False
    # SeaweedFS keeps empty folders, as objects of no size, after their last file is deleted.
    return found["type"] == "file" or bool(list_files(location))


def read_version(uri: LocationLike) -> str:
    """Return a text that changes with the object's content; "" if the server tells none.

    Raises:
        FileNotFoundError: There is no such object.
        StorageError: Access is denied, or the server unreachable.
    """
    location = Location.parse(uri)
    if location.path is not None:
        facts = location.path.stat()
        # Unlike the time of modification, this one is new after a backup is restored.
        return f"{facts.st_size} {facts.st_ctime_ns}"
    if location.is_http:
        return retry(location, lambda: find_http(location, ATTEMPT_SECONDS))
    found: Any = retry(location, lambda: open_client(location).info(location.uri))
    return str(found.get("ETag") or found.get("etag") or "")  # S3's, Google's


def list_files(uri: LocationLike) -> dict[str, int]:
    """List every file below `uri`, as {relative name: bytes}, sorted; {} if there is none.

    Raises:
        ValueError: The URI is http, which cannot be listed.
        StorageError: A folder below it may not be listed, so files could be missing.
    """
    location = Location.parse(uri)
    tree = list_tree(location)
    hidden = [
        location.uri_of(name)
        for name, reason in tree.others.items()
        if reason == UNLISTABLE and name != _SYSTEM_FOLDER
    ]
    if hidden:
        more = f" and {len(hidden) - 3} more" if len(hidden) > 3 else ""
        raise StorageError(
            f"{', '.join(hidden[:3])}{more} may not be listed: allow this user to read and search"
            " the folder, or move it elsewhere"
        )
    return tree.files


def list_tree(uri: LocationLike) -> Tree:
    """List every file below `uri`, and the entries that are no readable files.

    Links to files and folders are followed, except those whose files would be found twice. In an
    object store, an empty object whose name ends in a slash stands for a folder and is left out.

    Raises:
        ValueError: The URI is http, which cannot be listed.
        StorageError: Access is denied, or the server unreachable.
    """
    location = Location.parse(uri)
    if location.path is not None:
        return walk(location.path)
    _refuse_read_only(location, "be listed")
    found = list_objects(location)
    return Tree(
        {name: found[name] for name in sorted(found) if not name.endswith("/")},
        {
            name: "object whose name ends in a slash"
            for name in sorted(found)
            if name.endswith("/") and found[name]
        },
    )


def download(
    uri: LocationLike,
    path: str | Path,
    expected_bytes: int | None = None,
    sha256: str | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> None:
    """Copy one object to `path`, which appears only once it is complete and as expected.

    Raises:
        FileNotFoundError: There is no such object.
        StorageError: Access is denied, the server unreachable, the disk full, or three attempts
            returned another size or sha256.
    """
    path, location = Path(path), Location.parse(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    # An object of unknown size may be a large one.
    limit = _attempt_seconds(2**30 if expected_bytes is None else expected_bytes, deadline_seconds)

    def copy_once() -> None:
        with renamed_into(path, expected_bytes) as part:
            if location.path is not None:
                shutil.copyfile(refuse_endless(location.path), part)
            else:
                open_client(location).get_file(location.uri, str(part), timeout=limit)
            _check_content(part, expected_bytes, sha256)

    retry(location, copy_once, deadline_seconds)


def download_folder(uri: LocationLike, path: str | Path) -> None:
    """Copy every file below `uri` into the folder `path`.

    Raises:
        FileNotFoundError: The folder does not exist or is empty.
        StorageError: A name cannot be a file below a folder, such as `../x` and `a//b`.
    """
    location, folder = Location.parse(uri), Path(path)
    sizes = list_files(location)
    if not sizes:
        raise FileNotFoundError(f"{location} does not exist or is empty")
    for name in sizes:
        if not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
            raise StorageError(
                f"{location.uri_of(name)!r} cannot be a file below {folder}: rename it"
            )
    _transfer(lambda name: download(location / name, folder / name, sizes[name]), list(sizes))


def upload_folder(path: str | Path, uri: LocationLike) -> None:
    """Copy every file below the folder `path` to the same name below `uri`.

    Raises:
        ValueError: The path is no folder, or holds what cannot be copied, such as a broken link.
    """
    folder, location = Path(path), Location.parse(uri)
    if not folder.is_dir():
        raise ValueError(f"cannot upload {folder}: it is not a folder")
    tree = walk(folder)
    if tree.others:
        name, reason = next(iter(tree.others.items()))
        raise ValueError(f"cannot upload {folder}: {name} is a {reason}; remove or repair it")
    _transfer(lambda name: upload(folder / name, location / name), list(tree.files))


def upload(path: str | Path, uri: LocationLike) -> None:
    """Copy one local file to `uri`, atomically."""
    location, path = Location.parse(uri), refuse_endless(Path(path))
    target = location.path
    if path.is_dir():  # which s3fs skips silently
        raise IsADirectoryError(f"cannot upload {path} as one object: it is a folder")
    if target is None:
        _refuse_read_only(location)
        limit = _attempt_seconds(path.stat().st_size)
        retry(
            location,
            lambda: open_client(location).put_file(str(path), location.uri, timeout=limit),
        )
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with renamed_into(target, path.stat().st_size) as part:
        shutil.copyfile(path, part)


def delete(uri: LocationLike) -> None:
    """Delete the object, or the folder and all below it; a missing one is no error.

    Raises:
        ValueError: The URI is a whole bucket.
        StorageError: Access is denied, or the server unreachable.
    """
    location = Location.parse(uri)
    path = location.path
    if path is not None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    _refuse_read_only(location, "be deleted")
    if "/" not in location.uri.removeprefix(f"{location.scheme}://").strip("/"):
        raise ValueError(f"{location} is a whole bucket: name a folder in it")
    with contextlib.suppress(FileNotFoundError):  # the bucket
        delete_objects(location)


def check_readable(uri: LocationLike) -> None:
    """Check within seconds that something can be read at `uri`.

    Over http, where a folder need not have a page, check only that the server answers.

    Raises:
        StorageError: The object is missing, access is denied, or the server unreachable; one
            sentence with a remedy.
    """
    location = Location.parse(uri)
    if location.path is not None:
        if not location.path.exists():
            raise StorageError(f"{location} does not exist on this machine: check the path")
        if not os.access(location.path, os.R_OK):
            raise StorageError(f"{location} cannot be read: check its permissions")
        return
    client = open_client(location)

    def ask() -> None:
        if location.is_http:
            _is_served(location, PREFLIGHT_SECONDS)
        else:
            client.info(location.uri, timeout=PREFLIGHT_SECONDS)

    try:
        retry(location, ask, PREFLIGHT_SECONDS / 2)
    except FileNotFoundError as error:
        remedy = "or write shards there with python -m data_pipelines.build_shards"
        raise StorageError(f"{describe_missing(location)}, {remedy}") from error


def _is_served(location: Location, timeout_seconds: float) -> bool:
    """Return whether the address exists; public buckets answer 403 for a missing object."""
    try:
        find_http(location, timeout_seconds)
    except FileNotFoundError:
        return False
    except Exception as error:
        if getattr(error, "status", None) != 403:
            raise
        return False
    return True


def check_writable(uri: LocationLike) -> None:
    """Check within seconds that objects below `uri` can be written, by writing one.

    Raises:
        StorageError: The bucket is missing, access is denied, or the server unreachable; one
            sentence with a remedy.
    """
    location = Location.parse(uri)
    probe = location / f".write-check-{uuid.uuid4().hex}"
    if location.path is not None:
        try:
            write_bytes(probe, b"")
            delete(probe)
        except OSError as error:
            raise StorageError(f"{location} cannot be written ({error.strerror})") from error
        return
    _refuse_read_only(location)
    client = open_client(location)

    def write_probe() -> None:
        if location.scheme == "s3":  # some servers create a missing bucket on PUT
            with contextlib.suppress(PermissionError):
                bucket = client.split_path(location.uri)[0]
                client.call_s3("head_bucket", Bucket=bucket, timeout=PREFLIGHT_SECONDS)
        client.pipe_file(probe.uri, b"", timeout=PREFLIGHT_SECONDS)
        client.rm_file(probe.uri)

    try:
        retry(location, write_probe, PREFLIGHT_SECONDS / 2)
    except FileNotFoundError as error:
        raise StorageError(describe_missing(location)) from error


def _attempt_seconds(size: int, deadline_seconds: float = DEADLINE_SECONDS) -> float:
    return min(ATTEMPT_SECONDS, deadline_seconds) + size / _SLOWEST_BYTES_PER_SECOND


def _refuse_read_only(location: Location, operation: str = "be written") -> None:
    if location.is_http:
        raise ValueError(
            f"{location.display} cannot {operation} over http: use s3://, gs:// or a path"
        )


def _check_content(path: Path, expected_bytes: int | None, sha256: str | None) -> None:
    size = path.stat().st_size
    if expected_bytes is not None and size != expected_bytes:
        raise BadDownload(f"{size} bytes arrived, {expected_bytes} expected")
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise BadDownload(f"sha256 is {found[:12]}…, {sha256[:12]}… expected")


def _transfer(copy: Callable[[str], None], names: list[str]) -> None:
    with ThreadPoolExecutor(_TRANSFER_THREADS) as threads:
        list(threads.map(copy, names))
