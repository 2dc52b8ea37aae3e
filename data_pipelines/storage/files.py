"""Local files: reads that never block forever, and atomic writes."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Generator
from pathlib import Path

from data_pipelines.storage.retries import StorageError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk or quota."""
_LONGEST_NAME_BYTES = 200
"""Longest part of a file's name in that of its temporary file, which has 255 bytes at most."""


def read_file(path: Path, start: int = 0, end: int | None = None) -> bytes:
    """Read bytes [start, end) of a file, fewer if it ends before; None is its end."""
    # O_NONBLOCK: do not wait for a writer of a named pipe; it has no effect on files.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        refuse_endless(path, facts.st_mode)
        if stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        end = facts.st_size if end is None else end
        blocks: list[bytes] = []
        try:
            while start < end and (block := os.pread(descriptor, end - start, start)):
                blocks.append(block)
                start += len(block)
        except OSError as error:
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def refuse_endless(path: Path, mode: int | None = None) -> Path:
    """Return the path; raise for a named pipe, socket or device: reading those may never end."""
    mode = path.stat().st_mode if mode is None else mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "named pipe" if stat.S_ISFIFO(mode) else "socket or device"
        raise StorageError(f"{path} is a {kind}: copy its content to a file, and name that")
    return path


@contextlib.contextmanager
def renamed_into(path: Path, size: int | None) -> Generator[Path]:
    """Provide a temporary file beside `path`, which replaces it when the block succeeds."""
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
