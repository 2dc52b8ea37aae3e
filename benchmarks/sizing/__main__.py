"""Sizes of runs: what they need, and whether that is so.

    python -m benchmarks.sizing --table   # what 1, 8, 64 and 512 GPUs need, as in docs/operating.md
    python -m benchmarks.sizing           # the simulation against real bytes and seconds; as root

The measurement takes about four minutes, writes results/sizing.json, and ends with status 0 only
if all is within 15 %.
"""

import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.hosts.network import find_obstacle
from benchmarks.sizing.measure import LINK_BYTES_PER_SECOND, Row, describe, measure
from benchmarks.sizing.table import make_tables

RESULTS = Path(__file__).parents[1] / "results" / "sizing.json"
TOLERANCE = 0.15


@dataclass
class Arguments:
    """What to do."""

    table: bool = False
    """Print the sizing tables and measure nothing."""
    images: int = 750
    """Of the measured set, 200 kB each."""


def main() -> int:
    """Returns the exit status."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.table:
        print(make_tables())
        return 0
    obstacle = find_obstacle()
    if obstacle:
        print(f"cannot measure: {obstacle}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="efae-") as folder:
        rows = measure(Path(folder), arguments.images)
    for row in rows:
        print(_format(row))
    content = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "link_bytes_per_second": LINK_BYTES_PER_SECOND,
        "images": arguments.images,
        "rows": describe(rows),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(map(is_close, rows)) else 1


def is_close(row: Row) -> bool:
    """Whether bytes and seconds are as predicted; where none should move, hardly any did."""
    if not row.predicted_bytes:
        return row.bytes < 100_000
    ratios = (row.byte_ratio or 0.0, row.second_ratio or 0.0)
    return all(abs(ratio - 1) <= TOLERANCE for ratio in ratios)


def _format(row: Row) -> str:
    ratios = [f"{r:.3f}" if r else "  -  " for r in (row.byte_ratio, row.second_ratio)]
    predicted, measured = row.predicted_bytes / 1e6, row.bytes / 1e6
    return (
        f"{row.what:<22} {row.hosts} hosts"
        f"  MB predicted {predicted:6.1f} measured {measured:6.1f} {ratios[0]}"
        f"  s predicted {row.predicted_seconds:5.1f} measured {row.seconds:5.1f} {ratios[1]}"
    )


if __name__ == "__main__":
    sys.exit(main())
