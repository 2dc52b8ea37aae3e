"""The notes that let a cut-off build go on: in ``.unfinished/`` of its output, until it is whole.

``build.json`` says what is being built; ``NAME.json`` is the index of one finished shard.
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
    """Mark `output` as being built from `fingerprint`, or see that it already is.

    Only the source's files may be others than before, as when bad ones were mended: the caller then
    finds out which records still hold.

    Args:
        output: Folder of the set.
        there: What lies there, as `storage.list_files` says.
        fingerprint: What is built, of JSON's types.

    Raises:
        ValueError: something else is being built there.
    """
    marker = output / _MARKER
    if _MARKER in there:
        try:
            found = json.loads(storage.read_bytes(marker))
        except ValueError as error:
            raise ValueError(f"{marker} is damaged ({error}): delete {output / FOLDER}") from error
        listing = {name: fingerprint.get(name) for name in _LISTING if name in found}
        refuse_other(f"{output} (unfinished)", {**found, **listing}, fingerprint)
        if found == fingerprint:
            return
    storage.write_bytes(marker, json.dumps(fingerprint).encode())


def is_claimed(there: Mapping[str, int]) -> bool:
    """Whether a build was begun here."""
    return _MARKER in there


def refuse_other(
    output: Location | str, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Raises ValueError, naming the differences, where `output` was made from something else."""
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
    """Note that the shard `name` is finished; `record` is an index of it alone."""
    storage.write_bytes(output / _record(name), dump_index(record))


def read_records(
    output: Location, names: Iterable[str], there: Mapping[str, int]
) -> dict[str, ShardIndex]:
    """{shard: its record} of those `names` that an earlier run finished."""

    def read(name: str) -> ShardIndex:
        location = output / _record(name)
        return parse_index(storage.read_bytes(location), location)

    noted = [name for name in names if _record(name) in there]
    with ThreadPoolExecutor(_READING_THREADS) as threads:
        return dict(zip(noted, threads.map(read, noted), strict=True))


def clear(output: Location) -> None:
    """Forget the notes: the set is whole."""
    storage.delete(output / FOLDER)


def _record(name: str) -> str:
    return f"{FOLDER}/{name}.json"
