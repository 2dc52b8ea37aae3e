"""What a build or an index does not take: files that it leaves out, and faults of its source.

Nothing is left out without a word. Files that no user means, such as the metadata of an operating
system, are counted by reason; what a user surely means is a fault. All faults are found in one
pass: the first are printed, and all of them are written to ``faults.txt`` beside the output.
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
        """One line for each reason; "" where nothing was left out."""
        lines = [
            f"  {entry['count']} x {reason} (such as {entry['example']})"
            for reason, entry in self.to_json().items()
        ]
        return f"not taken:\n{shorten(lines)}" if lines else ""


@dataclass(frozen=True)
class Tolerance:
    """What a source may have wrong."""

    bad_images: int = 0
    """Most images that are left out because they cannot be taken."""
    dotted_keys: bool = False
    """Whether a sample of a tar may have several images that all have a dot in their extension."""


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


def write_faults(output: LocationLike, faults: list[str]) -> Location:
    """Write all faults beside the output, one a line; returns the location of the file.

    Without a fault there is no file.
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
        help="what becomes of images that cannot be taken: fail finds and lists all of them and"
        f" writes no index; skip leaves them out and lists them in OUTPUT/{FAULTS_NAME}",
    )
    parser.add_argument(
        "--most-bad-images",
        type=_parse_count,
        default=MOST_BAD_IMAGES,
        help="with --bad-images skip: fail where more than so many would be left out",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=("dotted-keys",),
        help="dotted-keys: samples of a tar with several images that all have a dot in their"
        " extension; the one whose name comes first is then the sample's image",
    )


def _parse_count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def pop_tolerance(options: dict[str, Any]) -> Tolerance:
    """The tolerance that the command's options ask for; removes these options."""
    most = options.pop("most_bad_images")
    skips = options.pop("bad_images") == "skip"
    return Tolerance(most if skips else 0, "dotted-keys" in options.pop("allow"))


def describe_faults(error: SourceFaults, tolerance: Tolerance, output: LocationLike) -> str:
    """One line: how many there are, where they are listed, and what to do."""
    is_over = 0 < tolerance.bad_images < len(error.faults)
    more = f", more than --most-bad-images {tolerance.bad_images}" if is_over else ""
    remedy = "" if tolerance.bad_images else ", or use --bad-images skip for those of single images"
    return (
        f"{len(error.faults)} faults in {error.uri}{more}, all listed in"
        f" {Location.parse(output) / FAULTS_NAME}: no index written; mend them{remedy}"
    )


def find_litter(name: str) -> str | None:
    """Why no user means the file `name`, a path with slashes; None for all others."""
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
