"""Read every byte of a shard set and compare it with its index; name each fault."""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipelines import storage, uris
from data_pipelines.image_codec import decode_image
from data_pipelines.shard_index import INDEX_NAME, Shard, ShardIndex, index_tar, load_index


def find_faults(uri: str) -> Iterator[str]:
    """One sentence for each fault of the set at `uri`: sizes, checksums, index, keys, pixels."""
    try:
        index = load_index(uri)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    keys: dict[str, str] = {}
    for shard in index.shards:
        for key in shard.keys:
            if key in keys:
                yield f"{uri}: key {key!r} is in {keys[key]} and in {shard.name}"
            keys[key] = shard.name
    names = {shard.name for shard in index.shards}
    try:
        for name in storage.list_files(uri):
            if name.endswith(".tar") and name not in names:
                yield f"{uris.join(uri, name)}: not in the index"
    except ValueError:  # http cannot be listed
        pass
    with tempfile.TemporaryDirectory() as folder:
        for shard in index.shards:
            yield from _find_shard_faults(uris.join(uri, shard.name), shard, index, folder)


def _find_shard_faults(uri: str, shard: Shard, index: ShardIndex, folder: str) -> Iterator[str]:
    path = uris.local_path(uri) or Path(folder) / "shard.tar"
    try:
        if uris.local_path(uri) is None:
            storage.download(uri, path)
        found = index_tar(path, uri)
    except (ValueError, OSError) as error:
        yield str(error) if uri in str(error) else f"{uri}: {error}"
        return
    if found.bytes != shard.bytes:
        yield f"{uri}: {found.bytes} bytes, the index says {shard.bytes}"
    if found.sha256 != shard.sha256:
        yield f"{uri}: sha256 {found.sha256[:12]}…, the index says {shard.sha256[:12]}…"
    if found.keys != shard.keys:
        yield f"{uri}: holds {len(found.keys)} samples, not the index's {len(shard.keys)} in order"
        return
    for extension in sorted({*found.members, *shard.members}):
        here, there = found.members.get(extension), shard.members.get(extension)
        if here is None or there is None:
            yield f"{uri}: members .{extension} are only in the {'index' if there else 'tar'}"
            continue
        for column in ("offset", "size", "crc32"):
            differs = np.flatnonzero(getattr(here, column) != getattr(there, column))
            for row in differs:
                yield f"{uri}, sample {shard.keys[row]!r}: .{extension} has another {column}"
    data = path.read_bytes()
    for key, offset, size in zip(found.keys, *found.image_place(), strict=True):
        fault = _find_image_fault(data[offset : offset + size], index)
        if fault:
            yield f"{uri}, sample {key!r}: {fault}"


def _find_image_fault(data: bytes, index: ShardIndex) -> str | None:
    channels = index.image_shape[0] if index.image_shape else 3
    try:
        shape = decode_image(data, channels).shape
    except ValueError as error:
        return str(error)
    if index.image_shape and shape != index.image_shape:
        return f"shape {shape}, the index says {index.image_shape}"
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 1 where there is any fault."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.verify_shards",
        description="Read a whole shard set again: sizes, checksums, index, keys, every image."
        " Prints each fault; exit status 1 if there is any.",
    )
    parser.add_argument("uri", help="a shard set, or a folder with the sets train/ and held_out/")
    uri = parser.parse_args(arguments).uri
    try:
        storage.check_readable(uri)
        parts = [uris.join(uri, part) for part in ("train", "held_out")]
        split = [part for part in parts if storage.exists(uris.join(part, INDEX_NAME))]
        faults = 0
        for part in split or [uri]:
            for fault in find_faults(part):
                faults += 1
                print(fault, flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"verify_shards: {error}")
    if faults:
        sys.exit(f"verify_shards: {faults} faults in {uri}")
    samples = {part: sum(len(s.keys) for s in load_index(part).shards) for part in split or [uri]}
    print("no faults: " + ", ".join(f"{count} images in {part}" for part, count in samples.items()))


if __name__ == "__main__":
    main()
