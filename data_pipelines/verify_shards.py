"""Read every byte of a shard set and compare it with its index; print each fault."""

import argparse
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipelines import storage
from data_pipelines.building import ray_tasks
from data_pipelines.building.checks import find_repeated_keys, leaves_folder, map_file, open_copy
from data_pipelines.commands import run_command
from data_pipelines.images.codec import decode_image, image_extensions
from data_pipelines.shards.index import INDEX_NAME, Shape, Shard, load_index, make_shard
from data_pipelines.shards.intake import find_litter
from data_pipelines.shards.latent_format import EXTENSION, LatentFormat, find_format, read_bits
from data_pipelines.shards.tar_members import read_members
from data_pipelines.storage import Location, LocationLike


def find_faults(uri: LocationLike) -> Iterator[str]:
    """Yield one sentence for each fault of the set at `uri`: sizes, checksums, index, keys, pixels.

    Several shards are read in parallel; the faults are in the order of the shards.
    """
    from tqdm import tqdm

    try:
        index = load_index(uri)
        latents = find_format(index.provenance, str(uri))
    except (ValueError, OSError) as error:
        yield str(error)
        return
    base = Location.parse(index.base or uri)
    yield from (f"{uri}: {fault}" for fault in find_repeated_keys(index.shards))
    names = {shard.name for shard in index.shards}
    try:
        for name in storage.list_files(base):
            foreign = name.lower().endswith(".tar") and name not in names
            if foreign and not find_litter(name):
                yield f"{base.uri_of(name)}: not in the index"
    except ValueError:  # http cannot be listed
        pass
    results = ray_tasks.run_tasks(
        _check_shard, (base, index.image_shape, latents), index.shards, threads=os.cpu_count() or 1
    )
    total = len(index.shards)
    for _, faults in tqdm(results, total=total, unit="shard", desc=str(uri), disable=None):
        yield from faults


def _check_shard(
    place: tuple[Location, Shape | None, LatentFormat | None], shard: Shard
) -> list[str]:
    base, shape, latents = place
    uri = base.uri_of(shard.name)
    try:
        with open_copy(base / shard.name) as path:
            return list(_compare(path, uri, shard, shape, latents))
    except (ValueError, OSError) as error:
        return [str(error) if uri in str(error) else f"{uri}: {error}"]


def _compare(
    path: Path, uri: str, shard: Shard, shape: Shape | None, latents: LatentFormat | None
) -> Iterator[str]:
    """Yield the differences between the tar in `path` and its index `shard`."""
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"{uri}: {size} bytes, the index says {shard.bytes}"
    if size == 0:
        return
    yield from _find_other_bytes(path, uri, shard)
    content = read_members(path, shard.name, uri, set(shard.keys))
    left_out = set(shard.left_out)
    unexpected = [f for f in content.faults if not (f.skippable and f.key in left_out)]
    yield from (fault.text for fault in unexpected)
    if unexpected:
        yield from _find_bad_headers(path, uri, shard)
        return
    found = make_shard(shard.name, content)
    if left_out:
        found = found.leave_out(left_out)
    if found.sha256 != shard.sha256:
        yield f"{uri}: sha256 {found.sha256[:12]}…, the index says {shard.sha256[:12]}…"
    bad = list(_find_bad_samples(uri, found, latents is not None))
    yield from bad
    yield from _find_other_places(uri, found, shard)
    if bad:
        return
    if latents is None:
        sizes = shard.sizes if found.keys == shard.keys else None
        yield from _find_bad_images(path, uri, replace(found, sizes=sizes), shape)
    else:
        yield from _find_bad_latents(path, uri, found, latents)


def _find_other_bytes(path: Path, uri: str, shard: Shard) -> Iterator[str]:
    """Yield members whose bytes at the index's offsets are wrong, whatever the tar's headers."""
    with map_file(path) as content:
        for extension, members in sorted(shard.members.items()):
            rows = zip(shard.keys, members.offset, members.size, members.crc32, strict=True)
            lost: list[str] = []
            for key, offset, size, crc32 in rows:
                if offset < 0:
                    continue
                if offset + size > len(content):
                    lost.append(key)
                elif zlib.crc32(content[offset : offset + size]) != crc32:
                    yield f"{uri}, sample {key!r}: .{extension} has another crc32 than the index"
            if lost:
                more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
                yield f"{uri}, sample {lost[0]!r}{more}: .{extension} lies beyond the tar's end"


def _find_bad_samples(uri: str, shard: Shard, latents: bool) -> Iterator[str]:
    """Yield keys that extraction would write outside the folder, and samples without a payload."""
    complete: set[int] = set()
    for extension in [EXTENSION] if latents else image_extensions(shard.members):
        if extension in shard.members:
            complete.update((shard.members[extension].offset >= 0).nonzero()[0].tolist())
    for row, key in enumerate(shard.keys):
        if leaves_folder(key):
            yield f"{uri}: sample {key!r} leaves the folder: rename its members"
        if row not in complete:
            yield f"{uri}: sample {key!r} has no {'latent' if latents else 'image'} member"


def _find_bad_headers(path: Path, uri: str, shard: Shard) -> Iterator[str]:
    """Yield members whose tar header, the block before their bytes, is damaged."""
    with map_file(path) as content:
        for extension, members in sorted(shard.members.items()):
            for key, offset in zip(shard.keys, members.offset, strict=True):
                if 512 <= offset <= len(content):
                    try:
                        tarfile.TarInfo.frombuf(content[offset - 512 : offset], "utf-8", "replace")
                    except tarfile.HeaderError:
                        yield f"{uri}, sample {key!r}: the tar header of .{extension} is damaged"


def _find_other_places(uri: str, found: Shard, shard: Shard) -> Iterator[str]:
    """Yield samples and members whose order or offsets differ between tar and index."""
    if found.keys != shard.keys:
        pairs = zip([*found.keys, None], [*shard.keys, None], strict=False)
        row, (here, there) = next(
            (row, pair) for row, pair in enumerate(pairs) if pair[0] != pair[1]
        )
        yield f"{uri}: sample {row} is {here!r}, the index says {there!r}"
        return
    for extension in sorted({*found.members, *shard.members}):
        here, there = found.members.get(extension), shard.members.get(extension)
        if here is None or there is None:
            yield f"{uri}: members .{extension} are only in the {'index' if there else 'tar'}"
            continue
        for column in ("offset", "size"):
            for row in np.flatnonzero(getattr(here, column) != getattr(there, column)):
                yield f"{uri}, sample {shard.keys[row]!r}: .{extension} has another {column}"


def _find_bad_images(path: Path, uri: str, found: Shard, shape: Shape | None) -> Iterator[str]:
    channels = shape[0] if shape else 3
    with map_file(path) as content:
        for row, (key, offset, size) in enumerate(
            zip(found.keys, *found.image_place(), strict=True)
        ):
            try:
                decoded = decode_image(content[offset : offset + size], channels).shape
            except ValueError as error:
                yield f"{uri}, sample {key!r}: {error}"
                continue
            if shape and decoded != shape:
                yield f"{uri}, sample {key!r}: shape {decoded}, the index says {shape}"
            expected = None if found.sizes is None else tuple(found.sizes[row].tolist())
            if expected not in (None, decoded[1:]):
                yield f"{uri}, sample {key!r}: size {decoded[1:]}, the index says {expected}"


def _find_bad_latents(path: Path, uri: str, found: Shard, latents: LatentFormat) -> Iterator[str]:
    if not found.keys:
        return
    members = found.members[EXTENSION]
    with map_file(path) as content:
        for key, offset, size in zip(found.keys, members.offset, members.size, strict=True):
            try:
                read_bits(content[offset : offset + size], latents)
            except ValueError as error:
                yield f"{uri}, sample {key!r}: {error}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with status 1 if there is any fault."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.verify_shards",
        description="Verify a whole shard set: sizes, checksums, index, keys, every image or"
        " latent. Prints each fault; exits with status 1 if there is any.",
    )
    parser.add_argument("uri", help="a shard set, or a folder with the sets train/ and held_out/")
    uri = parser.parse_args(arguments).uri
    try:
        location = Location.parse(uri)
        storage.check_readable(location)
        parts = [location / part for part in ("train", "held_out")]
        split = [part for part in parts if storage.exists(part / INDEX_NAME)] or [location]
        faults = 0
        for part in split:
            for fault in find_faults(part):
                faults += 1
                print(fault, flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"verify_shards: {error}")
    if faults:
        sys.exit(f"verify_shards: {faults} faults in {uri}")
    samples = {part: sum(len(s.keys) for s in load_index(part).shards) for part in split}
    print(
        "no faults: " + ", ".join(f"{count} samples in {part}" for part, count in samples.items())
    )


if __name__ == "__main__":
    run_command(main)
