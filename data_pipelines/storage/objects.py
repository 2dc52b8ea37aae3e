"""The only place that opens a URI: local files, s3://, gs:// and http(s)://, through fsspec.

Every write is whole or absent: a local file is renamed into place, an object store shows an object
only when its PUT or multipart upload is complete. Every wait has an end: see `retries`. Credentials
and other settings: see `clients`. Names are literal: `[ ] * ? # %` stand for themselves.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Generator
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
from data_pipelines.storage.retries import (
    DEADLINE_SECONDS,
    BadDownload,
    StorageError,
    describe_missing,
    retry,
)
from data_pipelines.storage.tree import UNLISTABLE, Tree, walk
from data_pipelines.storage.uris import display, join, local_path, split_uri

PREFLIGHT_SECONDS = 5.0
_SLOWEST_BYTES_PER_SECOND = 2**18
_TRANSFER_THREADS = 4
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors where there is no room for a file."""
_LONGEST_NAME_BYTES = 200
"""Of a file in its temporary neighbour's name, which has 255 bytes at most."""
_SYSTEM_FOLDER = "lost+found"


def read_bytes(uri: str) -> bytes:
    """The whole object.

    Raises:
        FileNotFoundError: there is none.
        StorageError: access denied, or no answer within the deadline.
    """
    path = local_path(uri)
    if path is not None:
        return _read_file(path)
    limit = _attempt_seconds(2**24)  # what is read at once is small
    return retry(uri, lambda: open_client(uri).cat_file(uri, timeout=limit))


def read_range(uri: str, start: int, end: int, deadline_seconds: float = DEADLINE_SECONDS) -> bytes:
    """Bytes [start, end) of the object, all of them; many threads may call it at once.

    One attempt takes at most `ATTEMPT_SECONDS`, or the deadline where that is shorter. An HTTP
    server that knows no ranges is borne with for objects of at most 16 MiB.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: denied, unreachable, or still not end - start bytes after three attempts.
    """
    if not 0 <= start <= end:
        raise ValueError(f"{display(uri)}: there is no range of bytes [{start}, {end})")
    if start == end:
        return b""
    path = local_path(uri)
    limit = min(ATTEMPT_SECONDS, deadline_seconds)

    def read_once() -> bytes:
        data: Any
        if path is not None:
            data = _read_file(path, start, end)
        elif _is_http(uri):
            data = read_http_range(uri, start, end, limit)
        else:
            data = open_client(uri).cat_file(uri, start=start, end=end, timeout=limit)
        if len(data) != end - start:
            raise BadDownload(f"{len(data)} bytes arrived, {end - start} expected from {start} on")
        return data

    return retry(uri, read_once, deadline_seconds)


def write_bytes(uri: str, data: bytes, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Create or replace the object, atomically."""
    path = local_path(uri)
    if path is None:
        _refuse_read_only(uri)
        retry(uri, lambda: open_client(uri).pipe_file(uri, data), deadline_seconds)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _renamed_into(path, len(data)) as part:
        part.write_bytes(data)


def exists(uri: str) -> bool:
    """Whether an object, or a folder with something in it, has this name."""
    path = local_path(uri)
    if path is not None:
        return path.exists()
    try:
        if _is_http(uri):
            return retry(uri, lambda: _is_served(uri, ATTEMPT_SECONDS))
        found = retry(uri, lambda: open_client(uri).info(uri))
    except FileNotFoundError:
        return False
    # SeaweedFS keeps empty folders, as objects of no size, after their last file is deleted.
    return found["type"] == "file" or bool(list_files(uri))


def list_files(uri: str) -> dict[str, int]:
    """Every file below `uri`, as {name relative to it: bytes}, sorted; {} when there is none.

    Raises:
        StorageError: a folder below it may not be listed, so that files could be missing.
    """
    tree = list_tree(uri)
    hidden = [
        join(uri, name)
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


def list_tree(uri: str) -> Tree:
    """Every file below `uri`, and what is there and no file that can be read.

    Links are followed, to folders too, but for those to a folder that they lie in. In an object
    store, objects whose names end in a slash stand for folders and are left out.

    Raises:
        ValueError: `uri` cannot be listed over http.
        StorageError: denied or unreachable.
    """
    path = local_path(uri)
    if path is not None:
        return walk(path)
    _refuse_read_only(uri, "be listed")
    found = list_objects(uri)
    return Tree(
        {name: found[name] for name in sorted(found) if not name.endswith("/")},
        {
            name: "object whose name ends in a slash"
            for name in sorted(found)
            if name.endswith("/") and found[name]
        },
    )


def _read_file(path: Path, start: int = 0, end: int | None = None) -> bytes:
    """Bytes [start, end) of a file, fewer where it ends before; None is its end."""
    # Without waiting for somebody to write into a named pipe; for a file it means nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        _refuse_endless(path, facts.st_mode)
        if stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        end = facts.st_size if end is None else end
        blocks: list[bytes] = []
        while start < end and (block := os.pread(descriptor, end - start, start)):
            blocks.append(block)
            start += len(block)
    finally:
        os.close(descriptor)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def _refuse_endless(path: Path, mode: int | None = None) -> Path:
    """The path, unless it is a named pipe, a socket or a device, where reading may never end."""
    mode = path.stat().st_mode if mode is None else mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "named pipe" if stat.S_ISFIFO(mode) else "socket or device"
        raise StorageError(f"{path} is a {kind}: copy its content to a file, and name that")
    return path


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
        StorageError: denied, unreachable, the disk full, or not `expected_bytes` long or of this
            `sha256` three times.
    """
    path, source = Path(path), local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    # An object of unknown size may be a large one.
    limit = _attempt_seconds(2**30 if expected_bytes is None else expected_bytes, deadline_seconds)

    def copy_once() -> None:
        with _renamed_into(path, expected_bytes) as part:
            if source is not None:
                shutil.copyfile(_refuse_endless(source), part)
            else:
                open_client(uri).get_file(uri, str(part), timeout=limit)
            _check_content(part, expected_bytes, sha256)

    retry(uri, copy_once, deadline_seconds)


def download_folder(uri: str, path: str | Path) -> None:
    """Copy every file below `uri` into the folder `path`.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: a name there is none of a file below a folder, as `../x` and `a//b`.
    """
    sizes = list_files(uri)
    if not sizes:
        raise FileNotFoundError(f"{uri} does not exist or is empty")
    for name in sizes:
        if not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
            raise StorageError(f"{join(uri, name)!r} cannot be a file below {path}: rename it")
    _transfer(lambda name: download(join(uri, name), Path(path) / name, sizes[name]), list(sizes))


def upload_folder(path: str | Path, uri: str) -> None:
    """Copy every file below the folder `path` to the same name below `uri`.

    Raises:
        ValueError: it is no folder, or holds what cannot be copied, as a broken link.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"cannot upload {folder}: it is not a folder")
    tree = walk(folder)
    if tree.others:
        name, reason = next(iter(tree.others.items()))
        raise ValueError(f"cannot upload {folder}: {name} is a {reason}; remove or repair it")
    _transfer(lambda name: upload(folder / name, join(uri, name)), list(tree.files))


def upload(path: str | Path, uri: str) -> None:
    """Copy one local file to `uri`, atomically."""
    target, path = local_path(uri), _refuse_endless(Path(path))
    if path.is_dir():  # which s3fs leaves out without a word
        raise IsADirectoryError(f"cannot upload {path} as one object: it is a folder")
    if target is None:
        _refuse_read_only(uri)
        limit = _attempt_seconds(path.stat().st_size)
        retry(uri, lambda: open_client(uri).put_file(str(path), uri, timeout=limit))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _renamed_into(target, path.stat().st_size) as part:
        shutil.copyfile(path, part)


def delete(uri: str) -> None:
    """Remove the object, or the folder and all below it; nothing there is no error.

    Raises:
        ValueError: `uri` is a whole bucket.
        StorageError: denied or unreachable.
    """
    path = local_path(uri)
    if path is not None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    _refuse_read_only(uri, "be deleted")
    if "/" not in split_uri(uri)[1].strip("/"):
        raise ValueError(f"{uri} is a whole bucket: name a folder in it")
    with contextlib.suppress(FileNotFoundError):  # the bucket
        delete_objects(uri)


def check_readable(uri: str) -> None:
    """Answer within seconds whether something can be read at `uri`.

    Over http, where a folder need not have a page of its own, whether the server answers.

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
    filesystem = open_client(uri)
    if _is_http(uri):
        retry(uri, lambda: _is_served(uri, PREFLIGHT_SECONDS), PREFLIGHT_SECONDS / 2)
        return
    try:
        retry(uri, lambda: filesystem.info(uri, timeout=PREFLIGHT_SECONDS), PREFLIGHT_SECONDS / 2)
    except FileNotFoundError as error:
        remedy = "or write shards there with python -m data_pipelines.build_shards"
        raise StorageError(f"{describe_missing(uri)}, {remedy}") from error


def _is_served(uri: str, timeout_seconds: float) -> bool:
    """Whether something has this address; public buckets answer 403 where nothing has."""
    try:
        find_http(uri, timeout_seconds)
    except FileNotFoundError:
        return False
    except Exception as error:
        if getattr(error, "status", None) != 403:
            raise
        return False
    return True


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
    filesystem = open_client(uri)

    def write_probe() -> None:
        if split_uri(uri)[0] == "s3":  # some servers create a missing bucket on PUT
            with contextlib.suppress(PermissionError):
                bucket = filesystem.split_path(uri)[0]
                filesystem.call_s3("head_bucket", Bucket=bucket, timeout=PREFLIGHT_SECONDS)
        filesystem.pipe_file(probe, b"", timeout=PREFLIGHT_SECONDS)
        filesystem.rm_file(probe)

    try:
        retry(uri, write_probe, PREFLIGHT_SECONDS / 2)
    except FileNotFoundError as error:
        raise StorageError(describe_missing(uri)) from error


def _attempt_seconds(size: int, deadline_seconds: float = DEADLINE_SECONDS) -> float:
    return min(ATTEMPT_SECONDS, deadline_seconds) + size / _SLOWEST_BYTES_PER_SECOND


def _is_http(uri: str) -> bool:
    return split_uri(uri)[0] in ("http", "https")


def _refuse_read_only(uri: str, operation: str = "be written") -> None:
    if _is_http(uri):
        raise ValueError(f"{display(uri)} cannot {operation} over http: use s3://, gs:// or a path")


def _check_content(path: Path, expected_bytes: int | None, sha256: str | None) -> None:
    size = path.stat().st_size
    if expected_bytes is not None and size != expected_bytes:
        raise BadDownload(f"{size} bytes arrived, {expected_bytes} expected")
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise BadDownload(f"sha256 is {found[:12]}…, {sha256[:12]}… expected")


@contextlib.contextmanager
def _renamed_into(path: Path, size: int | None) -> Generator[Path]:
    """A temporary neighbour of `path` that replaces it when the block has written `size` bytes."""
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME_BYTES])
    part = path.with_name(f".{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        amount = "an object" if size is None else f"{size} bytes"
        raise StorageError(
            f"{path.parent}: no room to write {amount} ({error.strerror}): free some space there,"
            " or name another folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _transfer(copy: Callable[[str], None], names: list[str]) -> None:
    with ThreadPoolExecutor(_TRANSFER_THREADS) as threads:
        list(threads.map(copy, names))
