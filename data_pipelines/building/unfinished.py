"""Records from which an interrupted build resumes: ``.unfinished/`` in its output.

``build.json`` is the fingerprint of the build; ``NAME.json`` is the index of one finished shard. A
complete set has no such folder.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_pipelines import storage
from data_pipelines.shards.index import ShardIndex, dump_index, parse_index
from data_pipelines.storage import Location

FOLDER = ".unfinished"
_MARKER = f"{FOLDER}/build.json"
_LISTING = ("files", "images", "tars")
"""Keys of a fingerprint that change with the source's files."""
_READING_THREADS = 8


def claim(output: Location, there: Mapping[str, int], fingerprint: Mapping[str, Any]) -> None:
    """Mark `output` as being built from `fingerprint`, or check that it already is.

    Only the source's files may differ from before, for example after bad ones were fixed; the
    caller then decides which records are still valid.

    Args:
        output: Folder of the set.
        there: Files of the output, from `storage.list_files`.
        fingerprint: Source and options of the build, as JSON types.

    Raises:
        ValueError: The output holds an unfinished build of something else.
    """
    if found := read_claim(output, there):
        listing = {name: fingerprint.get(name) for name in _LISTING if name in found}
        refuse_other(f"{output} (unfinished)", {**found, **listing}, fingerprint)
        if found == fingerprint:
            return
    storage.write_bytes(output / _MARKER, json.dumps(fingerprint).encode())


def read_claim(output: Location, there: Mapping[str, int]) -> dict[str, Any]:
    """Return the fingerprint that marks `output` as being built; empty if none does.

    Raises:
        ValueError: The mark is damaged.
    """
    if not is_claimed(there):
        return {}
    try:
        return json.loads(storage.read_bytes(output / _MARKER))
    except ValueError as error:
        raise ValueError(
            f"{output / _MARKER} is damaged ({error}): delete {output / FOLDER}"
        ) from error


def is_claimed(there: Mapping[str, int]) -> bool:
    """Return whether the output holds an unfinished build."""
    return _MARKER in there


def refuse_other(
    output: Location | str, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raise ValueError, naming the differences, if `output` was made from something else."""
    differences = [
        f"{name} {found.get(name)!r} instead of {wanted.get(name)!r}"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(
            f"{output} already holds shards with {', '.join(differences)}: choose another --output,"
            " or delete that one"
        )


def keep_record(output: Location, name: str, record: ShardIndex) -> None:
    """Record that the shard `name` is finished; `record` is an index of it alone."""
    storage.write_bytes(output / _record(name), dump_index(record))


def read_records(
    output: Location, names: Iterable[str], there: Mapping[str, int]
) -> dict[str, ShardIndex]:
    """Read {shard: its record} for those of `names` that an earlier run finished.

    A record that cannot be parsed counts as missing: a power cut may have emptied it.
    """

    def read(name: str) -> ShardIndex | None:
        location = output / _record(name)
        try:
            return parse_index(storage.read_bytes(location), location)
        except ValueError:
            return None

    finished = [name for name in names if _record(name) in there]
    with ThreadPoolExecutor(_READING_THREADS) as threads:
        found = zip(finished, threads.map(read, finished), strict=True)
        return {name: record for name, record in found if record is not None}


def require_shards(output: Location, records: Mapping[str, ShardIndex]) -> None:
    """Check that every shard lies in the output, as its record says.

    Args:
        output: Folder of the set.
        records: Records of all finished shards, by name; one without shards wrote no file.

    Raises:
        ValueError: A shard does not; names it.
    """
    there = storage.list_files(output)
    for name, record in records.items():
        if record.shards and there.get(name) != record.shards[0].bytes:
            raise ValueError(
                f"{output.uri_of(name)} was written by another node and is not visible here: use an"
                " --output on object storage or on a shared disk, or --on here"
            )


def clear(output: Location) -> None:
    """Delete the records of a complete set."""
    storage.delete(output / FOLDER)


def _record(name: str) -> str:
    return f"{FOLDER}/{name}.json"
