"""Listing of a local folder: its files, and the entries that are no readable files."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

UNLISTABLE = "folder that may not be listed"
NOT_UTF8 = "name that is not UTF-8"
FOLDER_NOT_UTF8 = "folder whose name is not UTF-8"

# Path, relative name with a final slash, (device, inode) of the folder and of all its parents.
_Folder = tuple[Path, str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Tree:
    """The content of a folder.

    Attributes:
        files: Sizes, {name relative to the folder: bytes}, sorted.
        others: Entries that are no readable files, {name: reason}, sorted.
    """

    files: dict[str, int]
    others: dict[str, str]


def walk(root: Path) -> Tree:
    """List the folder `root` recursively; the result is empty if there is no such folder.

    Links to files and folders are followed, except those to a folder of this tree or above it,
    whose files would be found twice.
    """
    files: dict[str, int] = {}
    others: dict[str, str] = {}
    try:
        top = root.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Tree(files, others)
    inside = f"{root.resolve()}{os.sep}"
    waiting: list[_Folder] = []
    if stat.S_ISDIR(top.st_mode):
        waiting.append((root, "", ((top.st_dev, top.st_ino),)))
    while waiting:
        folder, prefix, above = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                found = [(entry, _look_at(entry)) for entry in listing]
        except PermissionError:  # to read it, or to search it
            others[prefix.rstrip("/") or "."] = UNLISTABLE
            continue
        except FileNotFoundError:  # deleted since its parent was listed
            continue
        for entry, facts in found:
            name = f"{prefix}{entry.name}"
            if facts is None:
                continue
            if not _is_utf8(entry.name):
                printable = os.fsencode(name).decode(errors="backslashreplace")
                is_folder = not isinstance(facts, str) and stat.S_ISDIR(facts.st_mode)
                others[printable] = FOLDER_NOT_UTF8 if is_folder else NOT_UTF8
            elif isinstance(facts, str):
                others[name] = facts
            elif stat.S_ISREG(facts.st_mode):
                files[name] = facts.st_size
            elif not stat.S_ISDIR(facts.st_mode):
                others[name] = "named pipe, socket or device"
            elif (identity := (facts.st_dev, facts.st_ino)) in above:
                others[name] = "link to a folder above it"
            elif entry.is_symlink() and os.path.realpath(entry.path).startswith(inside):
                others[name] = "link to a folder of the same tree"
            else:
                waiting.append((folder / entry.name, f"{name}/", (*above, identity)))
    return Tree(dict(sorted(files.items())), dict(sorted(others.items())))


def _look_at(entry: os.DirEntry[str]) -> os.stat_result | str | None:
    """Return the status of the entry's target, the fault of a link, or None if just deleted."""
    try:
        return entry.stat()
    except OSError as error:
        if not entry.is_symlink():
            if isinstance(error, FileNotFoundError):
                return None
            raise
        if isinstance(error, PermissionError):
            return "link to what may not be read"
        return "broken link"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
