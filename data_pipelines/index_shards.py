"""Make existing WebDataset tars a shard set, where they lie and as they are: write their index.

Each tar is read once. A tar's record is kept until the index is written, so that a run that was cut
off goes on; the index is written only where no tar has a fault.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from data_pipelines import shard_tasks, storage, unfinished, uris
from data_pipelines.contact_sheet import describe_set
from data_pipelines.shard_checks import check_tar, find_repeated_keys
from data_pipelines.shard_index import (
    INDEX_NAME,
    ShardIndex,
    common_shape,
    load_index,
    write_index,
)
from data_pipelines.source_names import digest, make_absolute

_THREADS = 4
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class ShardFaults(ValueError):
    """Tars that cannot be a shard set; `faults` has one sentence for each fault."""

    def __init__(self, uri: str, faults: list[str]):
        super().__init__(f"{len(faults)} faults in {uri}, no index written: {'; '.join(faults)}")
        self.faults = faults


def index_shards(uri: str, output: str | None = None, on: str = "here") -> str:
    """Write the index of the tars at `uri`; the arguments are those of the command.

    Returns:
        One sentence: what is there now.

    Raises:
        ShardFaults: every fault of every tar.
        ValueError: no tar there, or the output holds another set.
        StorageError: the output cannot be written.
        TaskFailed: Ray gave up on a tar.
    """
    shard_tasks.means_ray(on)
    base, sizes = list_tars(uri)
    output = make_absolute(output) if output else base
    _check_places(base, output)
    fingerprint = {"source": f"wds:{uri}", "tars": len(sizes), "files": digest(sizes)}
    storage.check_writable(output)
    if storage.exists(uris.join(output, INDEX_NAME)):
        index = load_index(output)
        unfinished.refuse_other(output, index.provenance.get("fingerprint", {}), fingerprint)
        return f"{_summarize(index, output)} was complete: nothing to do"
    there = storage.list_files(output)
    unfinished.claim(output, there, fingerprint)
    provenance = {"fingerprint": fingerprint, "source": fingerprint["source"]}
    index = _index(base, sizes, output, provenance, there, on)
    describe_set(output, index)
    write_index(output, index)
    unfinished.clear(output)
    return f"{_summarize(index, output)} written"


def make_index(uri: str, provenance: dict[str, Any] | None = None) -> ShardIndex:
    """Index the tars at `uri`, which others wrote, without writing anything.

    Raises:
        ShardFaults: a tar is damaged, holds a sample without an image, or a key occurs twice.
    """
    base, sizes = list_tars(uri)
    return _index(base, sizes, None, provenance or {"source": f"wds:{uri}"}, {}, "here")


def list_tars(uri: str) -> tuple[str, dict[str, int]]:
    """(URI that their names are relative to, {name: bytes}) of the tars that `uri` means.

    Args:
        uri: a folder; or, where nothing can be listed, the tars with braces as in
            https://host/set-{000000..000099}.tar, whose sizes are then 0: not known.

    Raises:
        ValueError: no tar there, or compressed ones, all of them named.
    """
    uri = make_absolute(uri)
    if uris.display(uri) != uri:
        raise ValueError(f"{uris.display(uri)}?…: a query cannot be part of a set's URI")
    if "{" in uri or uri.endswith(".tar"):
        from braceexpand import braceexpand

        folder = uri.split("{", 1)[0].rpartition("/")[0]
        names = [name.removeprefix(f"{folder}/") for name in braceexpand(uri)]
        if uris.split_uri(uri)[0] in ("http", "https"):
            names = [unquote(name) for name in names]  # `uris.join` quotes them
        return folder, dict.fromkeys(names, 0)
    try:
        found = storage.list_files(uri)
    except ValueError as error:
        raise ValueError(
            f"{error}; to index tars there, name them: {uri}/NAME-{{000000..000099}}.tar"
        ) from error
    compressed = [
        f"{uris.join(uri, name)} is compressed: unpack it to a plain tar"
        for name in found
        if name.endswith(_COMPRESSED)
    ]
    if compressed:
        raise ShardFaults(uri, compressed)
    sizes = {name: size for name, size in found.items() if name.endswith(".tar")}
    if not sizes:
        raise ValueError(f"{uri} holds no .tar file")
    return uri, sizes


def _check_places(base: str, output: str) -> None:
    if output == base and uris.split_uri(base)[0] in ("http", "https"):
        raise ValueError(f"{base} cannot be written over http: say where, with --output")
    if uris.local_path(base) is not None and uris.local_path(output) is None:
        raise ValueError(
            f"--output {output}: others could not read the tars, which are on this machine:"
            " use a path, or copy the tars there first"
        )


def _index(
    base: str,
    sizes: Mapping[str, int],
    output: str | None,
    provenance: dict[str, Any],
    there: Mapping[str, int],
    on: str,
) -> ShardIndex:
    """The index of all tars; those with a record in `output` are not read again."""
    from tqdm import tqdm

    records = unfinished.read_records(output, sizes, there) if output else {}
    missing = [name for name in sizes if name not in records]
    faults: dict[str, list[str]] = {}
    done = len(sizes) - len(missing)
    with tqdm(total=len(sizes), initial=done, unit="tar", desc=base, disable=None) as progress:
        for number, (record, found) in shard_tasks.run_tasks(
            check_tar, (base, output), missing, on, _THREADS
        ):
            name = missing[number]
            faults[name] = found
            if record is not None:
                records[name] = record
            progress.update()
    ordered = [records[name] for name in sizes if name in records]
    shards = tuple(shard for record in ordered for shard in record.shards)
    every = [fault for name in sizes for fault in faults.get(name, [])]
    every += [f"{base}: {fault}" for fault in find_repeated_keys(shards)]
    if not every and not any(shard.keys for shard in shards):
        every.append(f"{base}: the tars hold no sample")
    if every:
        raise ShardFaults(base, every)
    shapes = {record.image_shape for record in ordered if record.shards[0].keys}
    known = {shape for shape in shapes if shape is not None}
    return ShardIndex(
        shards,
        common_shape(known) if known == shapes else None,
        provenance,
        base if output not in (None, base) else None,
    )


def _summarize(index: ShardIndex, output: str) -> str:
    images = sum(len(shard.keys) for shard in index.shards)
    megabytes = sum(shard.bytes for shard in index.shards) / 1e6
    where = uris.join(output, INDEX_NAME)
    return f"{where} of {images} images in {len(index.shards)} tars ({megabytes:.1f} MB)"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; prints each fault and exits with one line on what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.index_shards",
        description="Index existing WebDataset tars without rewriting them, so that they can be"
        " trained on; statistics and a contact sheet come with it. Every tar is read once and"
        " checked; every fault is named, and no index is written if there is any. Restartable.",
    )
    parser.add_argument(
        "uri",
        help="folder of the tars: a path, s3://bucket/folder or gs://…; of http(s)://, which"
        " cannot be listed, the tars themselves: 'https://host/set-{000000..000099}.tar'",
    )
    parser.add_argument(
        "--output",
        help="where the index goes when the tars' own folder cannot be written; left out, beside"
        " the tars",
    )
    parser.add_argument("--on", default="auto", choices=shard_tasks.PLACES, help=shard_tasks.HELP)
    options = parser.parse_args(arguments)
    try:
        summary = index_shards(**vars(options))
    except ShardFaults as error:
        print(*error.faults, sep="\n", flush=True)
        sys.exit(f"index_shards: {len(error.faults)} faults in {options.uri}: no index written")
    except (ValueError, OSError, shard_tasks.TaskFailed) as error:
        sys.exit(f"index_shards: {error}")
    print(summary)


if __name__ == "__main__":
    main()
