"""Foreign tars as a source of images."""

import zlib
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from data_pipelines import storage
from data_pipelines.building.checks import open_copy, read_samples, select_tars
from data_pipelines.building.fingerprint import digest, make_absolute
from data_pipelines.building.sample_encoding import (
    EncodedImage,
    Encoding,
    Entry,
    find_folder,
    make_key,
)
from data_pipelines.images.codec import image_extensions
from data_pipelines.shards.intake import LeftOut, SourceFaults
from data_pipelines.shards.tar_members import Fault, TarContent, list_reasons
from data_pipelines.storage import Location

_LISTING_THREADS = 4
_LARGEST_GAP_BYTES = 64 * 2**10


@dataclass(frozen=True)
class _Sample:
    """Location of a sample in a foreign tar."""

    tar: str
    key: str
    image: str
    """Extension of the member that is its image."""
    members: dict[str, tuple[int, int, int]]
    """Members as {extension: (offset, size, crc32)}."""

    def __str__(self) -> str:
        return f"sample {self.key!r} of {self.tar}"


class ForeignTars:
    """Every tar below a URI, by WebDataset's convention; all members of a sample are kept.

    Listing the samples reads each whole tar once and keeps no copy. Loading a sample then reads
    only its own bytes.

    Attributes:
        left_out: Files and members that are left out; complete after `list_entries`.
        faults: Faults of samples, one sentence each; complete after `list_entries`.
        reasons: Counts of the samples of `faults` by reason, for when they are skipped.
        folders: Top-level folders of all samples, also of `faults`; "" for none.
    """

    def __init__(
        self,
        uri: str,
        encoding: Encoding,
        output: Location | None = None,
        dotted_keys: bool = False,
    ):
        storage.check_readable(uri)
        self._folder = make_absolute(uri)
        self._encoding = encoding
        self._dotted_keys = dotted_keys
        self._sizes, self._other_files = select_tars(
            self._folder, storage.list_tree(self._folder), output
        )
        self.left_out, self.reasons, self.faults = LeftOut(), LeftOut(), list[str]()
        self.folders = set[str]()

    def describe(self) -> dict[str, Any]:
        return {"files": digest(self._sizes), "tars": len(self._sizes), "members": "all"}

    def list_entries(self) -> list[Entry]:
        """List all samples, in the order of the tars.

        Raises:
            SourceFaults: A tar is damaged, or repeats a member; lists all other faults, too.
            ValueError: The tars hold no sample.
        """
        from tqdm import tqdm

        entries: list[Entry] = []
        faults: list[Fault] = []
        self.left_out, self.reasons = LeftOut(), LeftOut()
        self.left_out.merge(self._other_files)
        with ThreadPoolExecutor(_LISTING_THREADS) as threads:
            contents = threads.map(self._read_tar, self._sizes)
            total, text = len(self._sizes), f"listing {self._folder}"
            tars = tqdm(contents, total=total, unit="tar", desc=text, disable=None)
            for name, content in zip(self._sizes, tars, strict=True):
                self.left_out.merge(content.left_out)
                faulty = list_reasons(content.faults)
                for key, reason in faulty.items():
                    self.reasons.add(reason, f"{name}: {key}")
                self.folders.update(map(find_folder, {**content.rows, **faulty}))
                for sample in _list_samples(name, content, faulty):
                    key = make_key(sample.key)
                    entries.append(Entry(key, key, sample, find_folder(sample.key)))
                faults += content.faults
        self.faults = [fault.text for fault in faults]
        if not all(fault.skippable for fault in faults):
            raise SourceFaults(f"wds:{self._folder}", self.faults)
        if not entries and not faults:
            raise ValueError(f"wds:{self._folder}: the tars hold no sample")
        return entries

    def load(self, entry: Entry, resolution: int | None) -> EncodedImage:
        sample = entry.place
        data = self._read(sample)
        image = data.pop(sample.image)
        return self._encoding.encode_file(image, resolution, f"{self._folder}: {sample}", data)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}, "faults": []}  # large; remote tasks only load

    def _read_tar(self, name: str) -> TarContent:
        with open_copy(self._folder / name, self._sizes[name]) as path:
            content = read_samples(path, name, name, self._dotted_keys)
        for key, row in content.rows.items():
            for extension in row:
                if extension.startswith("_"):  # TarWriter would drop it
                    text = f"{name}: member {key + '.' + extension!r} cannot be kept: rename it"
                    content.faults.append(Fault("member that cannot be kept", key, text))
        return content

    def _read(self, sample: _Sample) -> dict[str, bytes]:
        """Read {extension: bytes}, in one read if the members are adjacent, as usual."""
        tar = self._folder / sample.tar
        start = min(offset for offset, _, _ in sample.members.values())
        end = max(offset + size for offset, size, _ in sample.members.values())
        total = sum(size for _, size, _ in sample.members.values())
        if end - start - total <= _LARGEST_GAP_BYTES:
            block = storage.read_range(tar, start, end)
            data = {e: block[o - start : o - start + s] for e, (o, s, _) in sample.members.items()}
        else:
            data = {e: storage.read_range(tar, o, o + s) for e, (o, s, _) in sample.members.items()}
        for extension, (_, _, crc32) in sample.members.items():
            if zlib.crc32(data[extension]) != crc32:
                raise ValueError(
                    f"{self._folder}: .{extension} of {sample} changed while it was read"
                )
        return data


def _list_samples(tar: str, content: TarContent, faulty: Container[str]) -> Iterator[_Sample]:
    """Yield the samples of a tar that are not `faulty`, in its order."""
    for key, members in content.rows.items():
        if key not in faulty:
            yield _Sample(tar, key, image_extensions(members)[0], members)
