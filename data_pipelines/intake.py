"""What a build or an index does not take: files that it leaves out, and faults of its source.

Nothing is left out without a word. Files that no user means, such as the metadata of an operating
system, are counted by reason; what a user surely means is a fault. All faults are found in one
pass: the first are printed, and all of them are written to ``faults.txt`` beside the output.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from data_pipelines import storage, uris

BadImages = Literal["fail", "skip"]
FAULTS_NAME = "faults.txt"
LEFT_OUT, FAULTS = "left_out", "faults"
"""Keys of an index's provenance."""
SHOWN_FAULTS = 20
MOST_BAD_IMAGES = 1000
_LITTER_FOLDERS = {
    "__MACOSX": "macOS metadata",
    ".AppleDouble": "macOS metadata",
    ".Spotlight-V100": "macOS metadata",
    ".fseventsd": "macOS metadata",
    ".ipynb_checkpoints": "notebook checkpoint",
    "@eaDir": "NAS thumbnail",
    ".@__thumb": "NAS thumbnail",
    ".thumbnails": "thumbnail",
    ".sync": "file of a synchroniser",
    ".Trash": "deleted file",
    ".Trashes": "deleted file",
    "$RECYCLE.BIN": "deleted file",
    "#recycle": "deleted file",
    "lost+found": "deleted file",
}


@dataclass
class LeftOut:
    """Files that were seen and not taken: their number by reason, and one of them."""

    counts: dict[str, int] = field(default_factory=dict[str, int])
    examples: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count `count` files that were left out for `reason`; `example` names one."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        if reason not in self.examples:  # a name in Latin-1 can be neither printed nor encoded
            self.examples[reason] = example.encode(errors="backslashreplace").decode()

    def merge(self, other: "LeftOut") -> None:
        """Add the counts of `other`."""
        for reason, count in other.counts.items():
            self.add(reason, other.examples[reason], count)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """{reason: {"count": …, "example": …}}, the most frequent reason first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return {
            reason: {"count": count, "example": self.examples[reason]} for reason, count in ordered
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Mapping[str, Any]]) -> "LeftOut":
        """The inverse of `to_json`."""
        return cls(
            {reason: entry["count"] for reason, entry in tree.items()},
            {reason: entry["example"] for reason, entry in tree.items()},
        )

    def __str__(self) -> str:
        """One line; "" where nothing was left out."""
        parts = [
            f"{entry['count']} x {reason} (such as {entry['example']})"
            for reason, entry in self.to_json().items()
        ]
        return f"not taken: {', '.join(parts)}" if parts else ""


class SourceFaults(ValueError):
    """Faults of a source, all of them; nothing was written for it.

    Attributes:
        faults: One sentence for each fault.
    """

    def __init__(self, uri: str, faults: Iterable[str]):
        self.uri, self.faults = uri, list(faults)
        super().__init__(f"{len(self.faults)} faults in {uri}: {shorten(self.faults, '; ')}")


def shorten(faults: list[str], separator: str = "\n") -> str:
    """The first `SHOWN_FAULTS` of `faults`, and how many more there are."""
    more = len(faults) - SHOWN_FAULTS
    return separator.join([*faults[:SHOWN_FAULTS], *([f"… and {more} more"] if more > 0 else [])])


def write_faults(output: str, faults: list[str]) -> str:
    """Write all faults beside the output, one a line; returns the URI of the file.

    Without a fault there is no file.
    """
    uri = uris.join(output, FAULTS_NAME)
    if not faults:
        storage.delete(uri)
        return uri
    lines = (fault.replace("\n", "\\n") + "\n" for fault in faults)
    storage.write_bytes(uri, "".join(lines).encode(errors="backslashreplace"))
    return uri


def add_bad_images(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what becomes of bad images."""
    parser.add_argument(
        "--bad-images",
        choices=("fail", "skip"),
        default="fail",
        help="what becomes of images that cannot be taken: fail finds and lists all of them and"
        f" writes no index; skip leaves them out and lists them in OUTPUT/{FAULTS_NAME}",
    )
    parser.add_argument(
        "--most-bad-images",
        type=int,
        default=MOST_BAD_IMAGES,
        help="with --bad-images skip: fail where more than so many would be left out",
    )


def pop_most_bad_images(options: dict[str, Any]) -> int:
    """Bad images that may be skipped, from the options of `add_bad_images`, which are removed."""
    most = options.pop("most_bad_images")
    return most if options.pop("bad_images") == "skip" else 0


def find_litter(name: str) -> str | None:
    """Why no user means the file `name`, a path with slashes; None for all others."""
    path = PurePosixPath(name)
    for part in path.parts[:-1]:
        if part in _LITTER_FOLDERS:
            return _LITTER_FOLDERS[part]
        if part.startswith(".Trash-"):
            return "deleted file"
    if path.name.startswith("._") or path.name == ".DS_Store":
        return "macOS metadata"
    if path.name in ("Thumbs.db", "ehthumbs.db", "desktop.ini"):
        return "Windows metadata"
    return None
