"""Files that a build or an index leaves out, and faults of its source.

Nothing is left out silently. Files that are evidently not data, such as the metadata of an
operating system, are counted by reason; anything else that cannot be used is a fault. One pass
finds all faults: it prints the first and writes all of them to ``faults.txt`` beside the output.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipelines import storage
from data_pipelines.storage import Location, LocationLike

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
    "$Recycle.Bin": "deleted file",
    "RECYCLER": "deleted file",
    "#recycle": "deleted file",
    "@Recycle": "deleted file",
    ".stversions": "file of a synchroniser",
    ".dropbox.cache": "file of a synchroniser",
    "lost+found": "deleted file",
}


@dataclass
class LeftOut:
    """Files that were left out: their number and one example, by reason."""

    counts: dict[str, int] = field(default_factory=dict[str, int])
    examples: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Add `count` files that were left out for `reason`; `example` names one."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        if reason not in self.examples:  # names in Latin-1 can be neither printed nor encoded
            self.examples[reason] = example.encode(errors="backslashreplace").decode()

    def merge(self, other: "LeftOut") -> None:
        """Add the counts of `other`."""
        for reason, count in other.counts.items():
            self.add(reason, other.examples[reason], count)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return {reason: {"count": …, "example": …}}, the most frequent reason first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return {
            reason: {"count": count, "example": self.examples[reason]} for reason, count in ordered
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Mapping[str, Any]]) -> "LeftOut":
        """Parse what `to_json` returned."""
        return cls(
            {reason: entry["count"] for reason, entry in tree.items()},
            {reason: entry["example"] for reason, entry in tree.items()},
        )

    def __str__(self) -> str:
        """Return one line per reason, or "" if nothing was left out."""
        lines = [
            f"  {entry['count']} x {reason} (such as {entry['example']})"
            for reason, entry in self.to_json().items()
        ]
        return f"left out:\n{shorten(lines)}" if lines else ""


@dataclass(frozen=True)
class Tolerance:
    """Faults that a source may have."""

    bad_images: int = 0
    """Largest number of bad images to leave out."""
    dotted_keys: bool = False
    """Whether a sample of a tar may have several images that all have a dot in their extension."""


class SourceFaults(ValueError):
    """All faults of a source, for which no index was written.

    Attributes:
        uri: URI of the source.
        faults: One sentence for each fault.
    """

    def __init__(self, uri: str, faults: Iterable[str]):
        self.uri, self.faults = uri, list(faults)
        super().__init__(f"{len(self.faults)} faults in {uri}: {shorten(self.faults, '; ')}")


def shorten(faults: list[str], separator: str = "\n") -> str:
    """Join the first `SHOWN_FAULTS` of `faults`, and the number of the others."""
    more = len(faults) - SHOWN_FAULTS
    return separator.join([*faults[:SHOWN_FAULTS], *([f"… and {more} more"] if more > 0 else [])])


def write_faults(output: LocationLike, faults: list[str]) -> Location:
    """Write all faults beside the output, one per line; return the location of the file.

    Without faults, delete the file.
    """
    location = Location.parse(output) / FAULTS_NAME
    if not faults:
        storage.delete(location)
        return location
    lines = (fault.replace("\n", "\\n") + "\n" for fault in faults)
    storage.write_bytes(location, "".join(lines).encode(errors="backslashreplace"))
    return location


def add_tolerance(parser: argparse.ArgumentParser) -> None:
    """Add the options that `pop_tolerance` reads."""
    parser.add_argument(
        "--bad-images",
        choices=("fail", "skip"),
        default="fail",
        help="treatment of images that cannot be used: fail lists all of them and writes no index;"
        f" skip leaves them out and lists them in OUTPUT/{FAULTS_NAME}",
    )
    parser.add_argument(
        "--most-bad-images",
        type=_parse_count,
        default=MOST_BAD_IMAGES,
        help="with --bad-images skip: fail if more images than this would be left out",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=("dotted-keys",),
        help="dotted-keys: allow samples of a tar with several images that all have a dot in their"
        " extension; the first by name is then the sample's image",
    )


def _parse_count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def pop_tolerance(options: dict[str, Any]) -> Tolerance:
    """Return the tolerance that the command's options set; remove these options."""
    most = options.pop("most_bad_images")
    skips = options.pop("bad_images") == "skip"
    return Tolerance(most if skips else 0, "dotted-keys" in options.pop("allow"))


def describe_faults(error: SourceFaults, tolerance: Tolerance, output: LocationLike) -> str:
    """Describe in one line how many faults there are, where they are listed, and the remedy."""
    is_over = 0 < tolerance.bad_images < len(error.faults)
    more = f", more than --most-bad-images {tolerance.bad_images}" if is_over else ""
    remedy = "" if tolerance.bad_images else ", or use --bad-images skip for those of single images"
    return (
        f"{len(error.faults)} faults in {error.uri}{more}, all listed in"
        f" {Location.parse(output) / FAULTS_NAME}: no index written; fix them{remedy}"
    )


def find_litter(name: str) -> str | None:
    """Return why the file `name`, a path with slashes, is not data; None if it may be data."""
    *folders, base = name.split("/")
    for folder in folders:
        if folder in _LITTER_FOLDERS:
            return _LITTER_FOLDERS[folder]
        if folder.startswith(".Trash-"):
            return "deleted file"
    if base.startswith("._") or base == ".DS_Store":
        return "macOS metadata"
    if base in ("Thumbs.db", "ehthumbs.db", "desktop.ini"):
        return "Windows metadata"
    return None
