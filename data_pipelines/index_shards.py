"""Index existing WebDataset tars in place, which makes them a shard set.

Each tar is read once. Its record is kept until the index is written, so that an interrupted run
resumes; a tar that has changed since is read again. The index is written only if there is no fault
beyond the tolerated ones. An index that an earlier release wrote, here or in `build_shards`, gets
the images' sizes that it lacks.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import numpy as np

from data_pipelines import storage
from data_pipelines.building import ray_tasks, unfinished
from data_pipelines.building.checks import TarChecks, check_tar, find_repeated_keys, select_tars
from data_pipelines.building.fingerprint import digest, make_absolute
from data_pipelines.building.statistics import map_images
from data_pipelines.commands import run_command
from data_pipelines.contact_sheet import describe_set
from data_pipelines.images.codec import read_shape
from data_pipelines.shards.chunks import LARGEST_BYTES, cut_chunks
from data_pipelines.shards.index import (
    INDEX_NAME,
    Shard,
    ShardIndex,
    join_indexes,
    load_index,
    write_index,
)
from data_pipelines.shards.intake import (
    FAULTS,
    FAULTS_NAME,
    LEFT_OUT,
    LeftOut,
    SourceFaults,
    Tolerance,
    add_tolerance,
    describe_faults,
    pop_tolerance,
    shorten,
    write_faults,
)
from data_pipelines.shards.latent_format import FORMAT
from data_pipelines.storage import Location, LocationLike

_THREADS = 4
_MOST_READ = 2
"""Largest ratio of the bytes that are read for samples to those of compact ones."""


def index_shards(
    uri: str,
    output: LocationLike | None = None,
    on: str = "here",
    tolerance: Tolerance = Tolerance(),  # noqa: B008  # frozen
    verify: bool = False,
) -> str:
    """Write the index of the tars at `uri`; the arguments are those of the command.

    Args:
        uri: Folder of the tars, or the tars themselves: see `list_tars`.
        output: Folder of the index; None is the tars' own folder.
        on: One of `ray_tasks.PLACES`.
        tolerance: Number of bad samples to leave out; with more, no index is written. All of them
            are listed in ``faults.txt`` of the output.
        verify: Whether to decode every image; always done if bad ones may be skipped.

    Returns:
        A summary of the index, and on further lines what was left out.

    Raises:
        SourceFaults: Tars have faults; lists all of them.
        ValueError: There is no tar, or the output holds another set.
        StorageError: The output cannot be written.
        TaskFailed: Ray could not read a tar.
    """
    ray_tasks.uses_ray(on)
    base = _find_base(uri)
    folder = base if output is None else make_absolute(output)
    try:
        if output is None and (index := _find_without_sizes(folder)) is not None:
            storage.check_writable(folder)
            write_index(folder, _add_sizes(folder, index))
            return f"{_summarize(index, folder)}: added the images' sizes{_tell_left_out(index)}"
        _, sizes, left_out = list_tars(uri)
        _check_places(base, folder)
        storage.check_writable(folder)
        fingerprint = {"source": f"wds:{uri}", "tars": len(sizes), "files": digest(sizes)}
        if storage.exists(folder / INDEX_NAME):
            index = load_index(folder)
            unfinished.refuse_other(folder, index.provenance.get("fingerprint", {}), fingerprint)
            unfinished.clear(folder)  # an earlier run may have been interrupted before
            return f"{_summarize(index, folder)} was complete: nothing to do{_tell_left_out(index)}"
        there = storage.list_files(folder)
        unfinished.claim(folder, there, fingerprint)
        skips = tolerance.bad_images > 0
        checks = TarChecks(base, folder, skips, verify or skips, tolerance.dotted_keys)
        records = _read_tars(checks, sizes, there, on)
        provenance = {"fingerprint": fingerprint, "source": fingerprint["source"]}
        index, skipped = _join(checks, records, left_out, provenance, tolerance.bad_images)
        describe_set(folder, index)
    except SourceFaults as error:
        write_faults(folder, error.faults)
        raise
    write_faults(folder, skipped)
    write_index(folder, index)
    unfinished.clear(folder)
    return f"{_summarize(index, folder)} written{_tell_left_out(index)}"


def make_index(uri: str, provenance: dict[str, Any] | None = None) -> ShardIndex:
    """Index the foreign tars at `uri` without writing anything.

    Raises:
        SourceFaults: A tar is damaged, a sample has no image, or a key occurs twice.
    """
    base, sizes, left_out = list_tars(uri)
    checks = TarChecks(base)
    records = _read_tars(checks, sizes, {}, "here")
    return _join(checks, records, left_out, provenance or {"source": f"wds:{uri}"})[0]


def list_tars(uri: str) -> tuple[Location, dict[str, int], LeftOut]:
    """List tars: (folder that their names are relative to, {name: bytes}, other files).

    Args:
        uri: Folder; or, if it cannot be listed, the tars with braces as in
            https://host/set-{000000..000099}.tar, whose sizes are then 0, unknown.

    Raises:
        ValueError: There is no tar, or tars are compressed; lists all of them.
    """
    location, base = make_absolute(uri), _find_base(uri)
    if base != location:
        from braceexpand import braceexpand

        prefix = f"{base}".rstrip("/") + "/"  # of the filesystem's root, too
        names = [name.removeprefix(prefix) for name in braceexpand(location.uri)]
        if base.is_http:
            names = [unquote(name) for name in names]  # `Location` quotes them
        if (folder := base.path) is not None:
            missing = [
                f"{folder / name} does not exist" for name in names if not (folder / name).exists()
            ]
            if missing:
                raise SourceFaults(location.uri, missing)
        return base, dict.fromkeys(names, 0), LeftOut()
    try:
        tree = storage.list_tree(location)
    except ValueError as error:
        raise ValueError(
            f"{error}; to index tars there, name them: {location}/NAME-{{000000..000099}}.tar"
        ) from error
    if not tree.files and not tree.others:
        storage.check_readable(location)
    return base, *select_tars(location, tree)


def _find_base(uri: str) -> Location:
    """Return the folder that `list_tars` lists, or that its names are relative to."""
    location = make_absolute(uri)
    if location.display != location.uri:
        raise ValueError(f"{location.display}?…: a query cannot be part of a set's URI")
    if location.uri.lower().endswith(".tar"):
        return Location.parse(location.uri.split("{", 1)[0].rpartition("/")[0] or "/")
    return location


def _check_places(base: Location, output: Location) -> None:
    if output == base and base.is_http:
        raise ValueError(f"{base} cannot be written over http: choose an --output")
    if base.path is not None and output.path is None:
        raise ValueError(
            f"--output {output}: other machines could not read the tars, which are on this machine:"
            " use a path, or copy the tars there first"
        )


def _read_tars(
    checks: TarChecks, sizes: Mapping[str, int], there: Mapping[str, int], on: str
) -> list[ShardIndex]:
    """Return a record of each tar; unchanged tars with one in the output are not read again.

    Raises:
        SourceFaults: Tars have faults; lists those of all tars.
    """
    from tqdm import tqdm

    kept = unfinished.read_records(checks.output, sizes, there) if checks.output else {}
    kept = {name: record for name, record in kept.items() if checks.accept(record)}
    with ThreadPoolExecutor(_THREADS) as threads:
        current = threads.map(checks.is_of_current_tar, kept.values())
        records = {name: kept[name] for name, valid in zip(kept, current, strict=True) if valid}
    missing = [name for name in sizes if name not in records]
    faults: dict[str, list[str]] = {}
    total, done = len(sizes), len(records)
    with tqdm(
        total=total, initial=done, unit="tar", desc=str(checks.base), disable=None
    ) as progress:
        for number, (record, found) in ray_tasks.run_tasks(
            check_tar, checks, missing, on, _THREADS
        ):
            name = missing[number]
            faults[name] = found
            if record is not None:
                records[name] = record
            progress.update()
    every = [fault for name in sizes for fault in faults.get(name, [])]
    shards = [records[name].shards[0] for name in sizes if name in records]
    every += [f"{checks.base}: {fault}" for fault in find_repeated_keys(shards)]
    if every:
        raise SourceFaults(str(checks.base), every)
    return [records[name] for name in sizes]


def _find_without_sizes(folder: Location) -> ShardIndex | None:
    """Return the index of images in `folder` if it lacks their sizes, as release 0.1 wrote it."""
    if folder.is_http or not storage.exists(folder / INDEX_NAME):
        return None
    index = load_index(folder)
    return None if index.has_sizes or FORMAT in index.provenance else index


def _add_sizes(folder: Location, index: ShardIndex) -> ShardIndex:
    """Return the index with the size of every image, which is read from its header.

    Raises:
        SourceFaults: Images of a shard are damaged; lists all of them.
    """
    shards: list[Shard] = []
    for shard in index.shards:
        places = [(0, row) for row in range(len(shard.keys))]
        shapes = map_images(read_shape, folder, replace(index, shards=(shard,)), places)
        sizes = np.array([shape[1:] for shape in shapes], np.int64).reshape(-1, 2)
        shards.append(replace(shard, sizes=sizes))
    return replace(index, shards=tuple(shards))


def _join(
    checks: TarChecks,
    records: Sequence[ShardIndex],
    left_out: LeftOut,
    provenance: Mapping[str, Any],
    most_bad_images: int = 0,
) -> tuple[ShardIndex, list[str]]:
    """Return the index of all tars, and the faults of the samples that are left out.

    Raises:
        SourceFaults: There are more than `most_bad_images` faults, no sample remains, or tars
            cannot be read in chunks.
    """
    skipped = [fault for record in records for fault in record.provenance.get(FAULTS, [])]
    for record in records:
        left_out.merge(LeftOut.from_json(record.provenance.get(LEFT_OUT, {})))
    if len(skipped) > most_bad_images:
        raise SourceFaults(str(checks.base), skipped)
    if not any(record.shards[0].keys for record in records):
        raise SourceFaults(str(checks.base), [*skipped, f"{checks.base}: the tars hold no sample"])
    counts = {LEFT_OUT: left_out.to_json()} if left_out.counts else {}
    base = str(checks.base) if checks.output not in (None, checks.base) else None
    index = join_indexes(records, {**provenance, **counts}, base)
    if scattered := list(_find_scattered(checks.base, index)):
        raise SourceFaults(str(checks.base), [*skipped, *scattered])
    return index, skipped


def _find_scattered(base: Location, index: ShardIndex) -> Iterator[str]:
    """Yield one sentence for each tar whose chunks overlap or are huge: its samples are apart."""
    chunks = cut_chunks(index)
    for number, shard in enumerate(index.shards):
        if not shard.keys:
            continue
        read = (chunks.end - chunks.start)[chunks.shard == number]
        payload = np.sum([np.maximum(m.size, 0) for m in shard.members.values()], axis=0)
        most_each = _MOST_READ * (LARGEST_BYTES + int(payload.max()))
        if read.sum() > _MOST_READ * shard.bytes or read.max() > most_each:
            yield (
                f"{base.uri_of(shard.name)}: members of a sample are not adjacent, so chunks of up"
                f" to {read.max() / 1e6:.1f} MB, {read.sum() / 1e6:.1f} MB in all, would be read"
                f" from {shard.bytes / 1e6:.1f} MB: pack the tar again, sample by sample, or use"
                f" build_shards --source wds:{base}"
            )


def _summarize(index: ShardIndex, output: Location) -> str:
    images = sum(len(shard.keys) for shard in index.shards)
    megabytes = sum(shard.bytes for shard in index.shards) / 1e6
    where = output / INDEX_NAME
    return f"{where} of {images} images in {len(index.shards)} tars ({megabytes:.1f} MB)"


def _tell_left_out(index: ShardIndex) -> str:
    text = str(LeftOut.from_json(index.provenance.get(LEFT_OUT, {})))
    return f"\n{text}" if text else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; print each fault and exit with one line that describes an error."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.index_shards",
        description="Index existing WebDataset tars for training without rewriting them, and write"
        " statistics and a contact sheet. Every tar is read once and checked; every fault is listed"
        f" in {FAULTS_NAME} beside the index, and no index is written if there is any that is not"
        " skipped. An interrupted run resumes. An index of release 0.1 that is already there gets"
        " the sizes of its images, which data.buckets needs.",
    )
    parser.add_argument(
        "uri",
        help="folder of the tars: a path, s3://bucket/folder or gs://…; for http(s)://, which"
        " cannot be listed, the tars themselves: 'https://host/set-{000000..000099}.tar'",
    )
    parser.add_argument(
        "--output",
        help="folder for the index if the tars' own folder cannot be written; the tars' folder by"
        " default",
    )
    add_tolerance(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="decode every image, as training does and --bad-images skip implies; by default, only"
        " headers are read, and a sample of the images is decoded",
    )
    parser.add_argument("--on", default="auto", choices=ray_tasks.PLACES, help=ray_tasks.HELP)
    options = vars(parser.parse_args(arguments))
    tolerance = pop_tolerance(options)
    try:
        summary = index_shards(**options, tolerance=tolerance)
    except SourceFaults as error:
        print(shorten(error.faults), flush=True)
        output = options["output"] or _find_base(options["uri"])
        sys.exit(f"index_shards: {describe_faults(error, tolerance, output)}")
    except (ValueError, OSError, ray_tasks.TaskFailed) as error:
        sys.exit(f"index_shards: {error}")
    print(summary)


if __name__ == "__main__":
    run_command(main)
