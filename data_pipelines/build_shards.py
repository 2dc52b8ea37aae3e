"""Images -> WebDataset tars and their index, on any storage.

The tars are byte-reproducible. Every finished shard leaves a small record in ``.unfinished/``, so a
build that was cut off goes on where it was; the index is written last, so a set is whole or not
there. A second run over a whole set only compares what it was built from.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from data_pipelines import storage, uris
from data_pipelines.image_sources import (
    SOURCES,
    EncodedImage,
    Entry,
    SampleSource,
    check_keys,
    open_source,
)
from data_pipelines.shard_index import (
    INDEX_NAME,
    Shape,
    ShardIndex,
    common_shape,
    dump_index,
    index_tar,
    load_index,
    parse_index,
    write_index,
)

UNFINISHED = ".unfinished"
TRAIN, HELD_OUT = "train", "held_out"


def build_shards(
    source: str,
    output: str,
    resolution: int | None = None,
    samples_per_shard: int = 1000,
    held_out: int = 0,
) -> str:
    """Write the shard set, or what is missing of it; the arguments are those of the command.

    Returns:
        One sentence: what is there now.

    Raises:
        ValueError: a bad argument, a damaged image, or an output built from something else.
        StorageError: the output cannot be written.
    """
    for name, value, least in (
        ("resolution", resolution, 1),
        ("samples-per-shard", samples_per_shard, 1),
        ("held-out", held_out, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    uris.check_uri(output)
    origin = open_source(source)
    fingerprint = {
        "source": source,
        "resolution": resolution,
        "samples_per_shard": samples_per_shard,
        "held_out": held_out,
        **origin.describe(),
    }
    parts = [HELD_OUT, TRAIN] if held_out else [""]
    outputs = {part: uris.join(output, part) if part else output for part in parts}
    storage.check_writable(output)
    if _find_finished(output, outputs, fingerprint):
        sets = [load_index(uri) for uri in outputs.values()]
        return f"{_summarize(sets, outputs)} were complete: nothing to do"
    entries = origin.list_entries()
    check_keys(entries)
    selections = split_entries(entries, held_out) if held_out else {"": entries}
    sets = [
        _write_set(origin, _shuffle(selections[part]), uri, fingerprint)
        for part, uri in outputs.items()
    ]
    return f"{_summarize(sets, outputs)} written"


def _find_finished(output: str, outputs: dict[str, str], fingerprint: dict[str, Any]) -> bool:
    """Whether every set is there; refuses an output that holds anything else."""
    finished: set[str] = set()
    for part in ("", HELD_OUT, TRAIN):
        uri = uris.join(output, part) if part else output
        if storage.exists(uris.join(uri, INDEX_NAME)):
            _refuse_other(uri, load_index(uri).provenance.get("fingerprint", {}), fingerprint)
            finished.add(part)
    return finished == set(outputs)


def _refuse_other(uri: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = [
        f"{name} {found.get(name)!r} instead of {wanted.get(name)!r}"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(
            f"{uri} already holds shards with {', '.join(differences)}: choose another --output,"
            " or delete that one"
        )


def split_entries(entries: Sequence[Entry], held_out: int) -> dict[str, list[Entry]]:
    """`held_out` images, by a hash of their family, and the rest; families stay together."""
    if held_out >= len(entries):
        raise ValueError(f"--held-out {held_out}: the source has only {len(entries)} images")
    families: dict[str, list[Entry]] = {}
    for entry in entries:
        families.setdefault(entry.family, []).append(entry)
    selections: dict[str, list[Entry]] = {HELD_OUT: [], TRAIN: []}
    for family in sorted(families, key=lambda name: _hash(f"split {name}")):
        fits = len(selections[HELD_OUT]) + len(families[family]) <= held_out
        selections[HELD_OUT if fits else TRAIN] += families[family]
    return selections


def _shuffle(entries: Sequence[Entry]) -> list[Entry]:
    """In the order of a hash of the key: shards are mixtures, the same ones on every machine."""
    return sorted(entries, key=lambda entry: _hash(f"order {entry.key}"))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_set(
    source: SampleSource, entries: list[Entry], uri: str, fingerprint: dict[str, Any]
) -> ShardIndex:
    """Write the shards that are not there yet, then the index."""
    from tqdm import tqdm

    there = storage.list_files(uri)
    if INDEX_NAME in there:
        return load_index(uri)
    _claim(uri, there, fingerprint)
    per_shard = fingerprint["samples_per_shard"]
    records: list[ShardIndex] = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(entries), unit="image", desc=uri, disable=None) as progress,
    ):
        for first in range(0, len(entries), per_shard):
            chunk = entries[first : first + per_shard]
            name = f"shard-{first // per_shard:06d}.tar"
            record = _read_record(uri, name, there)
            if record is None:
                images = threads.map(source.load, chunk, repeat(fingerprint["resolution"]))
                record = _write_shard(Path(folder) / name, chunk, images)
                storage.upload(Path(folder) / name, uris.join(uri, name))
                storage.write_bytes(uris.join(uri, _record(name)), dump_index(record))
                (Path(folder) / name).unlink()
            records.append(record)
            progress.update(len(chunk))
    shapes = {record.image_shape for record in records}
    known = {shape for shape in shapes if shape is not None}
    index = ShardIndex(
        tuple(shard for record in records for shard in record.shards),
        common_shape(known) if known == shapes else None,
        {"fingerprint": fingerprint, **source.describe()},
    )
    write_index(uri, index)
    storage.delete(uris.join(uri, UNFINISHED))
    return index


def _claim(uri: str, there: Mapping[str, int], fingerprint: dict[str, Any]) -> None:
    """Mark `uri` as being built from `fingerprint`, or see that it already is."""
    marker = f"{UNFINISHED}/build.json"
    if marker in there:
        found = json.loads(storage.read_bytes(uris.join(uri, marker)))
        _refuse_other(f"{uri} (unfinished)", found, fingerprint)
    elif any(name.endswith(".tar") and "/" not in name for name in there):
        raise ValueError(
            f"{uri} holds tars but no {INDEX_NAME}: not written by this command; choose another"
            " --output"
        )
    else:
        storage.write_bytes(uris.join(uri, marker), json.dumps(fingerprint).encode())


def _record(name: str) -> str:
    return f"{UNFINISHED}/{name}.json"


def _read_record(uri: str, name: str, there: Mapping[str, int]) -> ShardIndex | None:
    """What an interrupted build noted of the shard, or None where it has to be written."""
    if _record(name) not in there:
        return None
    record_uri = uris.join(uri, _record(name))
    record = parse_index(storage.read_bytes(record_uri), record_uri)
    return record if there.get(name) == record.shards[0].bytes else None


def _write_shard(path: Path, entries: list[Entry], images: Iterable[EncodedImage]) -> ShardIndex:
    """Write one tar to the local `path`; returns an index of it alone."""
    from webdataset.writer import TarWriter

    shapes: set[Shape] = set()
    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for entry, image in zip(entries, images, strict=True):
            writer.write({"__key__": entry.key, image.extension: image.data})
            shapes.add(image.shape)
    return ShardIndex((index_tar(path, path.name),), common_shape(shapes))


def _summarize(sets: Sequence[ShardIndex], outputs: Mapping[str, str]) -> str:
    texts: list[str] = []
    for index, uri in zip(sets, outputs.values(), strict=True):
        images = sum(len(shard.keys) for shard in index.shards)
        megabytes = sum(shard.bytes for shard in index.shards) / 1e6
        texts.append(f"{images} images in {len(index.shards)} shards ({megabytes:.1f} MB) at {uri}")
    return " and ".join(texts)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with one line on what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.build_shards",
        description="Pack images into WebDataset shards with an index. Restartable: what is"
        " already written is kept, a complete set is left alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--source", required=True, help=f"one of {SOURCES}")
    parser.add_argument(
        "--output", required=True, help="where the shards go: a path, s3://bucket/folder or gs://…"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        help="make every image N x N pixels (centre crop and resize; small grey sets are padded);"
        " left out, images keep their size",
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=1000, help="images in a shard, at most"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=0,
        help="N > 0 writes N images to OUTPUT/held_out and the rest to OUTPUT/train; variants of"
        " one drawing stay together",
    )
    options = parser.parse_args(arguments)
    try:
        summary = build_shards(**vars(options))
    except (ValueError, OSError) as error:
        sys.exit(f"build_shards: {error}")
    print(f"{summary}; check: python -m data_pipelines.verify_shards {options.output}")


if __name__ == "__main__":
    main()
