"""What is wrong with a tar that others wrote, beyond what keeps it from being read at all."""

import dataclasses
import mmap
import tarfile
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines import storage, unfinished, uris
from data_pipelines.image_codec import image_extensions, read_shape
from data_pipelines.latent_format import EXTENSION
from data_pipelines.shard_index import Shape, Shard, ShardIndex, common_shape, index_tar
from data_pipelines.tar_members import Header, list_members

LARGEST_MEMBER_BYTES = 2**30


def check_tar(place: tuple[str, str | None], name: str) -> tuple[ShardIndex | None, list[str]]:
    """Index one tar that others wrote, and leave its record; a Ray task or a call here.

    Args:
        place: (URI that `name` is relative to, output that gets the record if there is one).
        name: of the tar.

    Returns:
        An index of this tar alone and no faults, or None and one sentence for each fault.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    base, output = place
    uri = uris.join(base, name)
    try:
        with open_copy(uri) as path:
            record, faults = _read_tar(path, uri, name)
    except FileNotFoundError as error:
        if uris.local_path(uri) is not None:
            raise  # it was listed: this is another machine
        return None, [str(error)]
    if record is not None and output is not None:
        unfinished.keep_record(output, name, record)
    return record, faults


def _read_tar(path: Path, uri: str, name: str) -> tuple[ShardIndex | None, list[str]]:
    try:
        faults = list(find_large_members(path, uri))
        if faults:
            return None, faults
        shard = dataclasses.replace(index_tar(path, uri), name=name)
    except ValueError as error:
        return None, [str(error)]
    shapes: set[Shape] = set()
    faults = list(find_bad_samples(uri, shard)) or list(_read_shapes(path, uri, shard, shapes))
    return (None, faults) if faults else (ShardIndex((shard,), common_shape(shapes)), [])


@contextmanager
def open_copy(uri: str) -> Generator[Path]:
    """The file itself where it is local, or else a copy that is gone after the block."""
    path = uris.local_path(uri)
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy.tar"
        storage.download(uri, path)
        yield path


@contextmanager
def map_file(path: Path) -> Generator[mmap.mmap]:
    """The content of a file that is not empty, without reading it whole."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def find_large_members(path: Path, uri: str) -> Iterator[str]:
    """Members over `LARGEST_MEMBER_BYTES`, by their headers: a tar may claim anything."""
    if path.stat().st_size <= LARGEST_MEMBER_BYTES:
        return
    try:
        with tarfile.open(path, "r:", tarinfo=Header) as tar:
            for member in list_members(tar):
                if member.size > LARGEST_MEMBER_BYTES:
                    gibibytes = member.size / 2**30
                    yield (
                        f"{uri}: member {member.name!r} has {gibibytes:.1f} GiB, more than"
                        f" {LARGEST_MEMBER_BYTES / 2**30:.0f} GiB: no sample of images"
                    )
    except tarfile.TarError as error:
        raise ValueError(f"{uri} is not a plain, whole tar ({error})") from error


def find_bad_samples(uri: str, shard: Shard, latents: bool = False) -> Iterator[str]:
    """Keys that leave the folder where a reader would extract them; samples without image, or
    without latent.
    """
    whole: set[int] = set()
    for extension in [EXTENSION] if latents else image_extensions(shard.members):
        if extension in shard.members:
            whole.update((shard.members[extension].offset >= 0).nonzero()[0].tolist())
    for row, key in enumerate(shard.keys):
        if key.startswith(("/", "\\")) or ".." in key.replace("\\", "/").split("/"):
            yield f"{uri}: sample {key!r} leaves the folder: rename its members"
        if row not in whole:
            yield f"{uri}: sample {key!r} has no {'latent' if latents else 'image'} member"


def find_repeated_keys(shards: Iterable[Shard]) -> Iterator[str]:
    """Keys of two samples; one sentence each, with both shards."""
    first: dict[str, str] = {}
    for shard in shards:
        for key, count in Counter(shard.keys).items():
            where = first.setdefault(key, shard.name)
            if where != shard.name or count > 1:
                yield f"key {key!r} is in {where} and in {shard.name}"


def _read_shapes(path: Path, uri: str, shard: Shard, shapes: set[Shape]) -> Iterator[str]:
    """Adds each image's shape to `shapes`; yields the images whose header is damaged."""
    if not shard.keys:
        return
    with map_file(path) as content:
        for key, offset, size in zip(shard.keys, *shard.image_place(), strict=True):
            try:
                shapes.add(read_shape(content[offset : offset + size]))
            except ValueError as error:
                yield f"{uri}: sample {key!r}: {error}"
