"""Images -> WebDataset tars and their index, on any storage.

The tars are byte-reproducible, even when Ray tasks on many nodes write them. Every finished shard
leaves a small record in ``.unfinished/``, so an interrupted build resumes; the index is written
last, so a set is complete or absent. A second run over a complete set only compares fingerprints.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines import storage
from data_pipelines.building import ray_tasks, unfinished
from data_pipelines.building.fingerprint import make_absolute
from data_pipelines.building.sample_encoding import ENCODINGS, FOLDERS, LABELS, Encoding, Entry
from data_pipelines.building.shard_writer import ShardJob, write_shard
from data_pipelines.building.sources import (
    SOURCES,
    ImageFolder,
    SampleSource,
    drop_repeated,
    label_by_folder,
    open_source,
)
from data_pipelines.building.tar_source import ForeignTars
from data_pipelines.commands import run_command
from data_pipelines.contact_sheet import describe_set
from data_pipelines.shards.index import (
    CLASSES,
    INDEX_NAME,
    ShardIndex,
    join_indexes,
    load_index,
    write_index,
)
from data_pipelines.shards.intake import (
    FAULTS,
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
from data_pipelines.storage import Location, LocationLike

TRAIN, HELD_OUT = "train", "held_out"
_OUR_SHARD = re.compile(r"shard-\d{6,}\.tar")


def build_shards(
    source: str,
    output: LocationLike,
    resolution: int | None = None,
    samples_per_shard: int = 1000,
    held_out: int = 0,
    encoding: Encoding = Encoding(),  # noqa: B008  # frozen
    tolerance: Tolerance = Tolerance(),  # noqa: B008  # frozen
    on: str = "here",
) -> str:
    """Write the shard set, or its missing shards; the arguments are those of the command.

    Args:
        source: One of `SOURCES`.
        output: Folder of the set.
        resolution: Side of every image in pixels; None keeps sizes.
        samples_per_shard: Largest number of images in a shard.
        held_out: Number of images in ``held_out/``; 0 makes one set.
        encoding: Encoding of images that do not keep their own bytes, and origin of labels.
        tolerance: Number of bad images to leave out; with more, no index is written. All of them
            are listed in ``faults.txt`` of the output.
        on: One of `ray_tasks.PLACES`.

    Returns:
        A summary of the output, and of what was left out.

    Raises:
        ValueError: An argument is invalid, or the output was built from something else.
        SourceFaults: There are too many bad images; lists all of them.
        StorageError: The output cannot be written.
        TaskFailed: Ray could not write a shard.
    """
    for name, value, least in (
        ("resolution", resolution, 1),
        ("samples-per-shard", samples_per_shard, 1),
        ("held-out", held_out, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    folder = make_absolute(output)
    ray_tasks.uses_ray(on)
    try:
        origin = open_source(source, encoding, folder, tolerance.dotted_keys)
        fingerprint = {
            "source": source,
            "resolution": resolution,
            "samples_per_shard": samples_per_shard,
            "held_out": held_out,
            **encoding.describe(),
            **origin.describe(),
        }
        return _build(origin, folder, fingerprint, tolerance.bad_images, on)
    except SourceFaults as error:
        write_faults(folder, error.faults)
        raise


def build_set(
    origin: SampleSource, name: str, output: LocationLike, samples_per_shard: int = 1000
) -> str:
    """Write one shard set of a source that `SOURCES` does not name, on this machine.

    Args:
        origin: Source of images that have their final size.
        name: Name of the source, for the index and the contact sheet.
        output: Folder of the set.
        samples_per_shard: Largest number of images in a shard.

    Returns:
        A summary of the output, and of what was left out.

    Raises:
        ValueError: The output was built from something else.
        SourceFaults: There are bad images; lists all of them.
        StorageError: The output cannot be written.
    """
    fingerprint = {
        "source": name,
        "resolution": None,
        "samples_per_shard": samples_per_shard,
        "held_out": 0,
        **origin.describe(),
    }
    return _build(origin, make_absolute(output), fingerprint, 0, "here")


def _build(
    origin: SampleSource,
    output: Location,
    fingerprint: dict[str, Any],
    most_bad_images: int,
    on: str,
) -> str:
    """Build the sets of an opened source; returns what `build_shards` does."""
    parts = [HELD_OUT, TRAIN] if fingerprint["held_out"] else [""]
    outputs = {part: output / part if part else output for part in parts}
    storage.check_writable(output)
    if _find_finished(output, outputs, fingerprint):
        for folder in outputs.values():  # an earlier run may have been interrupted here
            unfinished.clear(folder)
        sets = [load_index(folder) for folder in outputs.values()]
        return _summarize(sets, outputs, "were complete: nothing to do")
    entries, repeated = drop_repeated(origin.list_entries())
    faults = [*origin.faults, *repeated]
    left_out = LeftOut()
    left_out.merge(origin.left_out)
    left_out.merge(origin.reasons)
    if repeated:
        left_out.add("image of a repeated key", repeated[0], len(repeated))
    provenance = {"fingerprint": fingerprint, **origin.describe()}
    if fingerprint.get("labels") == FOLDERS:
        assert isinstance(origin, ImageFolder | ForeignTars)  # `open_source` refuses others
        entries, provenance[CLASSES], unlabelled = label_by_folder(entries, origin.folders)
        faults += unlabelled
        if unlabelled:
            left_out.add("image in no folder", unlabelled[0], len(unlabelled))
            if not entries:
                raise SourceFaults(fingerprint["source"], faults)
    if faults and most_bad_images == 0:
        print(  # reading the images may take hours
            f"{len(faults)} images cannot be used; reading the others to find all faults:\n"
            f"{shorten(faults)}",
            file=sys.stderr,
            flush=True,
        )
    held_out = fingerprint["held_out"]
    selections = split_entries(entries, held_out) if held_out else {"": entries}
    records = {
        part: _write_shards(
            origin, _shuffle(selections[part]), folder, fingerprint, most_bad_images, on
        )
        for part, folder in outputs.items()
    }
    faults += [
        fault
        for part in parts
        for record in records[part]
        for fault in record.provenance.get(FAULTS, [])
    ]
    if len(faults) > most_bad_images:
        raise SourceFaults(fingerprint["source"], faults)
    report = write_faults(output, faults)
    sets = [
        # Count what the source left out only once, in the last of its sets.
        _finish_set(records[part], folder, provenance, left_out if part == parts[-1] else LeftOut())
        for part, folder in outputs.items()
    ]
    for folder in outputs.values():  # last, because a resumed run needs the faults of all sets
        unfinished.clear(folder)
    skipped = f"; {len(faults)} bad images left out, listed in {report}" if faults else ""
    return _summarize(sets, outputs, f"written{skipped}")


def _find_finished(
    output: Location, outputs: dict[str, Location], fingerprint: dict[str, Any]
) -> bool:
    """Return whether every set is complete; refuse an output that holds another set."""
    finished: set[str] = set()
    for part in ("", HELD_OUT, TRAIN):
        folder = output / part if part else output
        if storage.exists(folder / INDEX_NAME):
            found = load_index(folder).provenance.get("fingerprint", {})
            unfinished.refuse_other(folder, found, fingerprint)
            finished.add(part)
    return finished == set(outputs)


def split_entries(entries: Sequence[Entry], held_out: int) -> dict[str, list[Entry]]:
    """Split off at most `held_out` images by a hash of their family; families stay together."""
    if held_out >= len(entries):
        raise ValueError(f"--held-out {held_out}: the source has only {len(entries)} images")
    families: dict[str, list[Entry]] = {}
    for entry in entries:
        families.setdefault(entry.family, []).append(entry)
    selections: dict[str, list[Entry]] = {HELD_OUT: [], TRAIN: []}
    for family in sorted(families, key=lambda name: _hash(f"split {name}")):
        fits = len(selections[HELD_OUT]) + len(families[family]) <= held_out
        selections[HELD_OUT if fits else TRAIN] += families[family]
    if held_out and not selections[HELD_OUT]:
        family = min(families, key=lambda name: len(families[name]))
        raise ValueError(
            f"--held-out {held_out}: images of one family stay together, and the smallest family,"
            f" {family!r}, has {len(families[family])}; hold out as many or more"
        )
    return selections


def _shuffle(entries: Sequence[Entry]) -> list[Entry]:
    """Order entries by a hash of the key, which mixes shards equally on every machine."""
    return sorted(entries, key=lambda entry: _hash(f"order {entry.key}"))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_shards(
    source: SampleSource,
    entries: list[Entry],
    folder: Location,
    fingerprint: dict[str, Any],
    most_bad_images: int,
    on: str,
) -> list[ShardIndex]:
    """Write the shards of a set that are missing; return a record of every shard, in order."""
    there = storage.list_files(folder)
    if INDEX_NAME in there and not unfinished.is_claimed(there):
        return [load_index(folder)]
    tars = any(name.endswith(".tar") and "/" not in name for name in there)
    if tars and not unfinished.is_claimed(there):
        raise ValueError(
            f"{folder} holds tars but no {INDEX_NAME}: not written by this command; choose another"
            " --output"
        )
    unfinished.claim(folder, there, fingerprint)
    per_shard = fingerprint["samples_per_shard"]
    jobs = [
        ShardJob(
            folder,
            f"shard-{first // per_shard:06d}.tar",
            entries[first : first + per_shard],
            fingerprint["resolution"],
            most_bad_images > 0,
            fingerprint,
        )
        for first in range(0, len(entries), per_shard)
    ]
    for name in {name for name in there if _OUR_SHARD.fullmatch(name)} - {job.name for job in jobs}:
        storage.delete(folder / name)  # from an earlier run, when the source had more images
    return _write_missing(source, folder, jobs, there, on)


def _finish_set(
    records: list[ShardIndex], folder: Location, provenance: Mapping[str, Any], left_out: LeftOut
) -> ShardIndex:
    """Write the set's description and index, unless they exist.

    Args:
        records: Records of the set's shards.
        folder: Folder of the set.
        provenance: Provenance for its index.
        left_out: Files that the source left out, to which those of the shards are added.
    """
    if storage.exists(folder / INDEX_NAME):
        return load_index(folder)
    if not any(shard.keys for record in records for shard in record.shards):
        raise ValueError(f"{folder}: none of the images can be used")
    left_out = LeftOut(dict(left_out.counts), dict(left_out.examples))
    for record in records:
        left_out.merge(LeftOut.from_json(record.provenance[LEFT_OUT]))
    counts = {LEFT_OUT: left_out.to_json()} if left_out.counts else {}
    index = join_indexes(records, {**provenance, **counts})
    describe_set(folder, index)
    write_index(folder, index)
    return index


def _write_missing(
    source: SampleSource, folder: Location, jobs: list[ShardJob], there: Mapping[str, int], on: str
) -> list[ShardIndex]:
    """Write the shards without a valid record; return a record of every shard, in order."""
    from tqdm import tqdm

    found = unfinished.read_records(folder, [job.name for job in jobs], there)
    # What an index describes stays as it is, and so does what an interrupted run made.
    if INDEX_NAME not in there and len(found) == len(jobs):
        # That run was refused for its faults: a file may have been repaired, even at equal size.
        found = {name: kept for name, kept in found.items() if not kept.provenance.get(FAULTS)}
    records = {
        job.name: found[job.name]
        for job in jobs
        if job.name in found
        and there.get(job.name) == found[job.name].shards[0].bytes
        and job.is_done(found[job.name])
    }
    missing = [job for job in jobs if job.name not in records]
    total = sum(len(job.entries) for job in jobs)
    done = total - sum(len(job.entries) for job in missing)
    with tqdm(total=total, initial=done, unit="image", desc=str(folder), disable=None) as progress:
        for number, record in ray_tasks.run_tasks(write_shard, source, missing, on):
            records[missing[number].name] = record
            progress.update(len(missing[number].entries))
    unfinished.require_shards(folder, records)
    return [records[job.name] for job in jobs]


def _summarize(sets: Sequence[ShardIndex], outputs: Mapping[str, Location], outcome: str) -> str:
    texts: list[str] = []
    left_out = LeftOut()
    for index, uri in zip(sets, outputs.values(), strict=True):
        images = sum(len(shard.keys) for shard in index.shards)
        megabytes = sum(shard.bytes for shard in index.shards) / 1e6
        texts.append(f"{images} images in {len(index.shards)} shards ({megabytes:.1f} MB) at {uri}")
        left_out.merge(LeftOut.from_json(index.provenance.get(LEFT_OUT, {})))
    return "\n".join(filter(None, [f"{' and '.join(texts)} {outcome}", str(left_out)]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit with one line that describes an error."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.build_shards",
        description="Pack images into WebDataset shards with an index, and keep labels and other"
        " members of the source. An interrupted build resumes; a complete set is left unchanged.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--source", required=True, help=f"one of {SOURCES}")
    parser.add_argument(
        "--output", required=True, help="folder for the shards: path, s3://bucket/folder or gs://…"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        help="make every image N x N pixels (centre crop and resize; small grey sets are padded);"
        " images keep their size by default",
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=1000, help="largest number of images in a shard"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=0,
        help="N > 0 writes N images to OUTPUT/held_out and the rest to OUTPUT/train; variants of"
        " one drawing stay together",
    )
    parser.add_argument(
        "--encoding",
        default="png",
        choices=ENCODINGS,
        help="encoding of images that do not keep their bytes, such as those that --resolution"
        " makes; a JPEG file that needs no change keeps its bytes",
    )
    parser.add_argument(
        "--labels",
        default=LABELS[0],
        choices=LABELS,
        help="source keeps labels that the source has; folders writes, as .cls of each image, the"
        " rank from 0 of its top-level folder in order of name, and the names as classes into"
        " index.json",
    )
    parser.add_argument(
        "--quality", type=int, default=95, help="quality of --encoding jpeg, 1 to 100"
    )
    add_tolerance(parser)
    parser.add_argument("--on", default="auto", choices=ray_tasks.PLACES, help=ray_tasks.HELP)
    options = vars(parser.parse_args(arguments))
    tolerance = pop_tolerance(options)
    try:
        encoding = Encoding(*map(options.pop, ("encoding", "quality", "labels")))
        summary = build_shards(**options, encoding=encoding, tolerance=tolerance)
    except SourceFaults as error:
        print(shorten(error.faults), flush=True)
        sys.exit(f"build_shards: {describe_faults(error, tolerance, options['output'])}")
    except (ValueError, OSError, ray_tasks.TaskFailed) as error:
        sys.exit(f"build_shards: {error}")
    print(f"{summary}\ncheck: python -m data_pipelines.verify_shards {options['output']}")


if __name__ == "__main__":
    run_command(main)
