"""The command `python -m benchmarks.photographs`; the package describes it."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.photographs as package
from benchmarks.photographs.crops import Crops
from benchmarks.photographs.packages import (
    PACKAGES,
    Unpacked,
    fetch_packages,
    find_packages,
    unpack,
)
from benchmarks.photographs.pictures import find_photographs, split
from data_pipelines import storage
from data_pipelines.build_shards import HELD_OUT, TRAIN, build_set
from data_pipelines.building.sample_encoding import ENCODINGS, Encoding
from data_pipelines.commands import run_command
from data_pipelines.shards.index import load_index
from data_pipelines.shards.intake import LEFT_OUT, LeftOut
from data_pipelines.storage import Location

NAME = "Debian's wallpapers"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the sets; exit with one line that describes an error."""
    options = _parse(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            archives = (
                find_packages(options.packages)
                if options.packages
                else fetch_packages(Path(folder))
            )
            packages = unpack(archives, Path(folder) / "unpacked")
            make_sets(packages, options)
    except (ValueError, OSError) as error:
        sys.exit(f"photographs: {error}")


def make_sets(packages: Sequence[Unpacked], options: argparse.Namespace) -> dict[str, Any]:
    """Write the sets of every side, and photographs.json beside them; return what it holds."""
    photographs, dropped = find_photographs(packages)
    parts = dict(zip((TRAIN, HELD_OUT), split(photographs), strict=True))
    counts = {TRAIN: options.crops, HELD_OUT: options.held_out_crops}
    versions = {each.name: each.version for each in packages}
    summary: dict[str, Any] = {
        "packages": {
            name: {
                "version": version,
                "photographs": sum(each.name.startswith(f"{name}/") for each in photographs),
                "licences": PACKAGES[name].licences if name in PACKAGES else None,
                "copyright": f"/usr/share/doc/{name}/copyright",
            }
            for name, version in versions.items()
        },
        "photographs": {part: [each.name for each in chosen] for part, chosen in parts.items()},
        "dropped": dropped.to_json(),
        "seed": options.seed,
        "sets": {},
    }
    encoding = Encoding(options.encoding, options.quality)
    for side in options.side:
        for part, chosen in parts.items():
            uri = options.output / str(side) / part
            crops = Crops(chosen, side, counts[part], options.seed, encoding, versions)
            print(build_set(crops, NAME, uri), flush=True)
            index = load_index(uri)
            summary["sets"][f"{side}/{part}"] = {
                "crops": sum(len(shard.keys) for shard in index.shards),
                "bytes": sum(shard.bytes for shard in index.shards),
                "left_out": index.provenance.get(LEFT_OUT, {}),
            }
    path = options.output / "photographs.json"
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    storage.write_bytes(path, text.encode())
    print(
        f"{len(photographs)} photographs, {len(parts[HELD_OUT])} of them held out, from"
        f" {len(packages)} packages: {path.display}\n{LeftOut.from_json(summary['dropped'])}"
    )
    return summary


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.photographs",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Location.parse, required=True, help="folder for the sets, or s3:// URI"
    )
    parser.add_argument(
        "--side",
        type=_positive,
        nargs="+",
        default=[64, 128, 256],
        help="sides, in pixels (64 128 256)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the crops (0)")
    parser.add_argument("--crops", type=_positive, default=4200, help="crops to train on (4200)")
    parser.add_argument(
        "--held-out-crops", type=_positive, default=240, help="held-out crops (240)"
    )
    parser.add_argument(
        "--packages",
        type=Path,
        help=f"folder of .deb files to use instead of fetching {', '.join(PACKAGES)}",
    )
    parser.add_argument(
        "--encoding", default="png", choices=ENCODINGS, help="encoding of the crops (png)"
    )
    parser.add_argument("--quality", type=int, default=95, help="quality of jpeg (95)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    run_command(main)
