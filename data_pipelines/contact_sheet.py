"""Overview of a shard set: ``contact_sheet.png`` and ``statistics.json`` beside its index."""

import argparse
import json
import sys
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_pipelines import storage
from data_pipelines.building.statistics import draw_sample, map_images, measure_set
from data_pipelines.commands import run_command
from data_pipelines.images.codec import decode_image
from data_pipelines.images.tiles import GAP, draw_rows, draw_tile
from data_pipelines.shards.index import SHEET_NAME, STATISTICS_NAME, ShardIndex, load_index
from data_pipelines.shards.intake import LEFT_OUT, LeftOut, SourceFaults, shorten
from data_pipelines.storage import Location, LocationLike
from data_pipelines.storage.location import drop_query

ROWS, COLUMNS = 8, 12
_CAPTION, _INK = 28, (32, 32, 32)


def describe_set(
    uri: LocationLike, index: ShardIndex, output: LocationLike | None = None
) -> dict[str, Any]:
    """Write statistics and contact sheet of the set to `output`, or beside its index.

    Returns:
        The statistics.

    Raises:
        SourceFaults: Images of the sample are damaged; lists all of them.
        StorageError: The output cannot be written.
    """
    statistics = measure_set(uri, index)
    sheet = draw_sheet(uri, index)
    folder = Location.parse(output or uri)
    text = json.dumps(statistics, indent=2, ensure_ascii=False)
    storage.write_bytes(folder / STATISTICS_NAME, f"{text}\n".encode())
    buffer = BytesIO()
    sheet.save(buffer, "PNG", compress_level=6)
    storage.write_bytes(folder / SHEET_NAME, buffer.getvalue())
    return statistics


def draw_sheet(uri: LocationLike, index: ShardIndex) -> Image.Image:
    """Draw a seeded sample of the images, in the order of the set, under one line of text."""
    tiles = map_images(
        lambda data: draw_tile(decode_image(data, 3)),
        uri,
        index,
        draw_sample(index, ROWS * COLUMNS),
    )
    sheet = draw_rows(tiles, COLUMNS, header=_CAPTION)
    font = ImageFont.load_default(15)
    name, figures = _caption(uri, index)
    text, pen = f"{name}: {figures}", ImageDraw.Draw(sheet)
    while name and pen.textlength(text, font) > sheet.width - 4 * GAP:
        name = name[:-1]
        text = f"{name}…: {figures}"
    pen.text((2 * GAP, _CAPTION // 2 + 1), text, _INK, font, anchor="lm")
    return sheet


def _caption(uri: LocationLike, index: ShardIndex) -> tuple[str, str]:
    """Return the name of the source, which copies of a set share, and its counts and size."""
    fingerprint = index.provenance.get("fingerprint", index.provenance)
    source = drop_query(str(fingerprint.get("source", uri))).rstrip("/")
    name = " ".join((source.rsplit("/", 1)[-1] or source).split())  # on one line
    count = sum(len(shard.keys) for shard in index.shards)
    size = "of several sizes"
    if index.image_shape:
        channels, height, width = index.image_shape
        size = f"{width} x {height}, {'grey' if channels == 1 else 'RGB'}"
    left_out = LeftOut.from_json(index.provenance.get(LEFT_OUT, {}))
    more = f", {sum(left_out.counts.values()):,} left out" if left_out.counts else ""
    return name, f"{count:,} images, {size}{more}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with one line that describes an error."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.contact_sheet",
        description=f"Draw {ROWS} x {COLUMNS} images of a shard set on one sheet,"
        f" {SHEET_NAME}, and write statistics of the set to {STATISTICS_NAME}. Reads the index"
        " and a sample of the images; python -m data_pipelines.index_shards writes the index of"
        " existing tars.",
    )
    parser.add_argument("uri", help="a shard set: the folder with index.json")
    parser.add_argument(
        "--output", help="folder or URI for the two files; the folder of the index by default"
    )
    options = parser.parse_args(arguments)
    try:
        index = load_index(options.uri)
        figures = describe_set(options.uri, index, options.output)
    except SourceFaults as error:
        print(shorten(error.faults), flush=True)
        sys.exit(f"contact_sheet: {len(error.faults)} damaged images in {options.uri}")
    except (ValueError, OSError) as error:
        sys.exit(f"contact_sheet: {error}")
    folder = Location.parse(options.output or options.uri)
    print(
        f"{figures['images']} images, {figures['repeated_images']} of them repeated:"
        f" {folder / SHEET_NAME} and {STATISTICS_NAME} written"
    )


if __name__ == "__main__":
    run_command(main)
