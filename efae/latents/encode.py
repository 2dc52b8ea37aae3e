"""Encoding of a shard set into a latent set, by a pool of actors on a Ray cluster.

Ray Data distributes shards to actors that hold the model, and restarts lost actors. Every finished
shard leaves a record in storage, and the index is written last: the same command resumes where it
stopped, and a set without an index is incomplete.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import ray
import ray.data
from ray.exceptions import RayError

from data_pipelines import ShardDataset, storage
from data_pipelines.building import unfinished
from data_pipelines.building.fingerprint import make_absolute
from data_pipelines.images.logs import ignore_metadata
from data_pipelines.loading.buckets import Size, explain_missing_sizes, split_by_bucket
from data_pipelines.loading.dataset import ImageSet, LatentSet
from data_pipelines.loading.shard_cache import ShardError
from data_pipelines.shards.index import (
    CLASSES,
    INDEX_NAME,
    Shard,
    ShardIndex,
    load_index,
    write_index,
)
from data_pipelines.shards.latent_format import EXTENSION, FORMAT, LatentFormat
from data_pipelines.storage import Location
from efae.latents.request import Request
from efae.latents.shard_encoder import ShardEncoder, Source
from efae.model.autoencoder import Autoencoder
from efae.model.execution.tiling import plan_windows
from efae.model.representation import check_model
from efae.model.stored_files import CONFIG, OWN_CONFIG, sha256
from efae.preflight.cluster_checks import reach_cluster
from efae.preflight.driver_checks import SetFacts, list_facts
from efae.registry import pull
from efae.tracking.redaction import first_cause, redact

_PATIENCE_SECONDS = 20
_CLEAR = (ValueError, OSError, ShardError)
"""Exceptions whose messages are clear to the user."""


class EncodingFailed(RuntimeError):
    """A shard cannot be encoded, or Ray gave up on it; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """Result of an encoding.

    Attributes:
        latents: Latent set.
        images: Index of the image set that it was made from.
        encoded: Number of samples that this run encoded; the others were there before.
        largest_difference: Largest difference between stored and fresh latents; None if the set
            was complete already.
    """

    latents: LatentSet
    images: ShardIndex
    encoded: int
    largest_difference: float | None


@dataclass(frozen=True)
class _Planned:
    """A latent set to write.

    Attributes:
        output: Its folder.
        source: Input of the actors.
        facts: What the set records about itself.
    """

    output: Location
    source: Source
    facts: dict[str, Any]


def encode_sets(request: Request, say: Callable[[str], None]) -> Iterator[Encoded]:
    """Encode a shard set into a latent set, or into one for each bucket that has images.

    The missing shards are encoded, and each set is certified and verified before its index is
    written. All sizes are checked before the first set is encoded.

    Raises:
        ValueError: The user's input cannot work, or the output holds something else.
        CheckpointError: The model is damaged.
        ShardError: Images of the certificate cannot be read.
        StorageError: The storage refuses or does not answer.
        EncodingFailed: A shard cannot be encoded, or Ray gave up on it.
    """
    data = make_absolute(request.data)
    certificate_data = make_absolute(request.certificate_data or _find_held_out(data))
    for planned in _plan_sets(request, data, certificate_data, say):
        yield _encode_set(planned, certificate_data, request, say)


def _encode_set(
    planned: _Planned, certificate_data: Location, request: Request, say: Callable[[str], None]
) -> Encoded:
    output, source, facts = planned.output, planned.source, planned.facts
    fingerprint = {
        "data": source.index.id,
        "certificate_data": facts["certificate_data"],
        "certificate_images": request.certificate_images,
        "members": list(source.members),
        **{name: facts[name] for name in ("model_digest", "config_digest", "shape", "dtype")},
        # Absent from sets of earlier releases, which are all fp32 and of whole images.
        **({} if request.precision == "fp32" else {"precision": request.precision}),
        **({} if request.tile is None else {"tile": request.tile}),
        **({"symmetrize": True} if request.symmetrize else {}),
    }
    there = storage.list_files(output)
    if INDEX_NAME in there:
        found = load_index(output)
        unfinished.refuse_other(output, found.provenance.get("fingerprint", {}), fingerprint)
        unfinished.clear(output)  # an earlier run may have been interrupted there
        return Encoded(LatentSet(output, found), source.index, 0, None)
    if any(name.endswith(".tar") for name in there) and not unfinished.is_claimed(there):
        raise ValueError(
            f"{output} holds tars but no {INDEX_NAME}: not written by this command; choose another"
            " --output"
        )
    reach_cluster(_connect)
    unfinished.claim(output, there, fingerprint)
    shared = ray.put(source)
    certificate = _run(
        _measure, shared, certificate_data, request.certificate_images, request=request, say=say
    )
    certificate["data"] = certificate_data.display
    say(f"certificate: largest difference {certificate['max_abs_difference']:.1e}")
    form = LatentFormat(
        certificate=certificate,
        **{name: facts[name] for name in LatentFormat.model_fields if name != "certificate"},
    )
    missing = _find_missing(source.index, output, there)
    _encode_shards(shared, source.index, missing, output, form, request)
    latents = _assemble(source.index, output, form, fingerprint)
    difference = _run(_compare, shared, latents, request.compared, request=request, say=say)
    write_index(output, latents.index)
    unfinished.clear(output)
    encoded = sum(len(source.index.shards[number].keys) for number in missing)
    return Encoded(latents, source.index, encoded, difference)


def _plan_sets(
    request: Request, data: Location, certificate_data: Location, say: Callable[[str], None]
) -> list[_Planned]:
    """Return the sets to write, after the checks that need no cluster."""
    output = make_absolute(request.output)
    storage.check_writable(output)
    stored = pull.read(request.model)
    config = stored.config
    dataset = _open_images("data", data)
    index = dataset.index
    certified = list_facts(_open_images("certificate-data", certificate_data))
    representation = check_model(config)
    if request.symmetrize and len(representation.group) == 1:
        raise ValueError(
            f"--symmetrize: {request.model} has the trivial group, over which an average changes"
            " nothing; leave it out, or use a model of a larger group (jobs/finetune.py makes one"
            " of an autoencoder of diffusers)"
        )
    f = config.model.downsampling
    sizes = request.buckets or (request.image_size or config.data.image_size,)
    for height, width in sizes:
        if height % f or width % f:
            raise ValueError(
                f"--{'buckets' if request.buckets else 'resolution'} {height} {width}: not"
                f" divisible into latent cells; use multiples of model.downsampling={f}"
            )
        _check_size((height, width), certified)
    if request.tile is not None:
        try:
            plan_windows(request.tile, f, Autoencoder(config).encoder.receptive_radius())
        except ValueError as error:
            raise ValueError(f"--{error}") from error
    if request.buckets:
        parts = _sort_shards(index, data, sizes, say)
    else:
        _check_size(sizes[0], list_facts(dataset))
        if index.has_sizes and (small := _count_smaller(index, sizes[0])):
            say(
                f"{small:,} of {len(dataset):,} images are smaller than {sizes[0][0]} x"
                f" {sizes[0][1]} and will be enlarged"
            )
        parts = [(sizes[0], index)]
    members = _list_common_members(index, str(data), say)
    planned: list[_Planned] = []
    for (height, width), part in parts:
        source = Source(
            str(data),
            part,
            stored.weights,
            config,
            members,
            request.batch_size,
            "cuda" if request.use_gpu else "cpu",
            request.precision,
            request.cache_dir,
            (height, width),
            request.tile,
            request.symmetrize,
            request.compile,
        )
        facts = {
            "shape": [representation.dim, height // f, width // f],
            "dtype": request.dtype,
            "group": representation.group.name,
            "multiplicities": representation.multiplicities,
            "certificate_data": certified.id,
            "model_digest": stored.digest,
            "config_digest": sha256(stored.files.get(OWN_CONFIG, stored.files[CONFIG])),
            "model_uri": redact(request.model),
        }
        folder = output / f"{height}x{width}" if request.buckets else output
        planned.append(_Planned(folder, source, facts))
    return planned


def _open_images(option: str, uri: Location) -> ImageSet:
    storage.check_readable(uri)
    dataset = ShardDataset.open(uri)
    if isinstance(dataset, ImageSet):
        return dataset
    raise ValueError(f"--{option} {uri}: holds latents, not images; give a set of images")


def _sort_shards(
    index: ShardIndex, data: Location, buckets: Sequence[Size], say: Callable[[str], None]
) -> list[tuple[Size, ShardIndex]]:
    """Return each bucket that has images with the index of these, and say how many they are."""
    if not index.has_sizes:
        raise ValueError(f"--{explain_missing_sizes(str(data), buckets)}")
    parts: list[tuple[Size, ShardIndex]] = []
    for size, part in zip(buckets, split_by_bucket(index, buckets), strict=True):
        small = _count_smaller(part, size)
        say(
            f"bucket {size[0]} x {size[1]}: {len(part.image_sizes())} of"
            f" {len(index.image_sizes())} images{f', {small} of them enlarged' if small else ''}"
        )
        if part.shards:
            parts.append((size, part))
    return parts


def _count_smaller(index: ShardIndex, size: Size) -> int:
    """Return the number of images that have to be enlarged to `size`."""
    return int((index.image_sizes() < size).any(1).sum())


def _check_size(size: Size, images: SetFacts) -> None:
    """Raise a ValueError if images of one size would have to be enlarged to `size`."""
    found = images.shape and images.shape[1:]
    if found and (found[0] < size[0] or found[1] < size[1]):
        raise ValueError(
            f"{images.uri}: its images are {found[0]} x {found[1]}, less than the {size[0]} x"
            f" {size[1]} to encode at (by default the model's data.resolution): set --resolution to"
            " theirs, or smaller --buckets"
        )


def _find_held_out(data: Location) -> Location:
    """Return the held-out set that build_shards wrote beside this one, or this one if none."""
    folder, _, name = data.uri.rpartition("/")
    if name != "train":
        return data
    held_out = Location.parse(folder) / "held_out"
    return held_out if storage.exists(held_out / INDEX_NAME) else data


def _list_common_members(
    index: ShardIndex, uri: str, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Return the members that every sample has beside its image: labels, captions.

    Says which ones are left out because some samples have none.

    Raises:
        ValueError: A shard of latents cannot hold one of them; `uri` names the set.
    """
    shards = [shard for shard in index.shards if shard.keys]
    images = {
        name
        for shard in shards
        for name, members in shard.members.items()
        if bool((members.offset == shard.images().offset).any())
    }
    common: list[str] = []
    for name in sorted({name for shard in shards for name in shard.members} - images):
        without = [key for shard in shards for key in _list_keys_without(shard, name)]
        if without:
            say(
                f"members .{name} are left out: {len(without):,} of"
                f" {sum(len(shard.keys) for shard in shards):,} samples, such as {without[0]!r},"
                " have none"
            )
            continue
        if name == EXTENSION or name.startswith("_"):  # TarWriter would drop _
            why = "the latents get its name" if name == EXTENSION else "its name begins with _"
            raise ValueError(
                f"{uri}: the member .{name} of its samples cannot be kept, since {why}: rename it"
                " in the tars"
            )
        common.append(name)
    return tuple(common)


def _list_keys_without(shard: Shard, name: str) -> list[str]:
    if name not in shard.members:
        return shard.keys
    rows = (shard.members[name].offset < 0).nonzero()[0].tolist()
    return [shard.keys[row] for row in rows]


def _find_missing(index: ShardIndex, output: Location, there: dict[str, int]) -> list[int]:
    """Return the positions of the shards that are not encoded yet."""
    records = unfinished.read_records(output, [shard.name for shard in index.shards], there)
    return [
        number
        for number, shard in enumerate(index.shards)
        if shard.name not in records or there.get(shard.name) != records[shard.name].shards[0].bytes
    ]


def _assemble(
    images: ShardIndex, output: Location, form: LatentFormat, fingerprint: dict[str, Any]
) -> LatentSet:
    """Return the set of all encoded shards, without writing its index."""
    names = [shard.name for shard in images.shards]
    records = unfinished.read_records(output, names, storage.list_files(output))
    if unseen := [name for name in names if name not in records]:
        raise ValueError(
            f"{output.uri_of(unseen[0])} was written by another node and is not visible here: use"
            " an --output on object storage or on a shared disk"
        )
    kept = [n for n in ("licence", "credit", CLASSES) if n in images.provenance]
    origin = {name: images.provenance[name] for name in kept}
    provenance = {"fingerprint": fingerprint, FORMAT: form.model_dump(), **origin}
    shards = tuple(records[name].shards[0] for name in names)
    return LatentSet(output, ShardIndex(shards, None, provenance))


class _Encoder:
    """Actor in Ray Data's pool, called by two threads: one encodes while the other uploads.

    The model arrives with the first shard, because Ray may evict a large constructor argument
    before it restarts an actor. Errors return as strings, because Ray Data keeps only the traceback
    of an exception.
    """

    def __init__(self, output: Location, form: LatentFormat):
        self.encoder: ShardEncoder | None = None
        self.output, self.form = output, form
        self.loading = threading.Lock()

    def __call__(self, row: dict[str, Any], shared: list[Any]) -> dict[str, Any]:
        with self.loading:
            if self.encoder is None:
                self.encoder = _make_encoder(cast(Source, ray.get(shared[0])))
        try:
            record = self.encoder.write_shard(int(row["shard"]), self.output, self.form)
        except _CLEAR as error:
            return {"samples": 0, "fault": str(error)}
        return {"samples": len(record.shards[0].keys), "fault": ""}


def _encode_shards(
    shared: Any,
    index: ShardIndex,
    missing: list[int],
    output: Location,
    form: LatentFormat,
    request: Request,
) -> None:
    from tqdm import tqdm

    if not missing:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False  # they count blocks, not images
    actors = min(request.actors or _count_actors(request), len(missing))
    rows = ray.data.from_items(
        [{"shard": number} for number in missing], override_num_blocks=len(missing)
    ).map(
        cast(Any, _Encoder),
        fn_constructor_args=(output, form),
        fn_args=([shared],),  # in a list, so that Ray does not resolve the reference
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        **_list_resources(request),
    )
    total = sum(len(shard.keys) for shard in index.shards)
    done = total - sum(len(index.shards[number].keys) for number in missing)
    # In the log of a Ray job, fewer lines.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with (
        tqdm(
            total=total, initial=done, unit="image", desc=str(output), mininterval=interval
        ) as progress,
        _unwrapped_errors(),
    ):
        for row in rows.iter_rows():
            if row["fault"]:
                raise EncodingFailed(row["fault"])
            progress.update(int(row["samples"]))


def _count_actors(request: Request) -> int:
    have = cast(dict[str, float], ray.cluster_resources())  # Ray says dict[?, int]
    room = int(have.get("CPU", 0) // request.cpus_per_actor)
    if request.use_gpu:
        room = min(room, int(have.get("GPU", 0)))
    return max(1, room)


def _measure(shared: Source, data: Location, count: int) -> dict[str, Any]:
    return _make_encoder(shared).measure(data, count)


def _compare(shared: Source, latents: LatentSet, count: int) -> float:
    return _make_encoder(shared).compare(latents, count)


def _make_encoder(source: Source) -> ShardEncoder:
    """Load the model in a Ray worker process, without the warnings about image metadata."""
    ignore_metadata()
    return ShardEncoder(source)


def _run(
    function: Callable[..., Any], *arguments: Any, request: Request, say: Callable[[str], None]
) -> Any:
    """Call a function in a Ray task with the resources of an actor."""
    reference = ray.remote(max_retries=3, **_list_resources(request))(function).remote(*arguments)
    if not cast(list[Any], ray.wait([reference], timeout=_PATIENCE_SECONDS)[0]):
        say(
            f"waiting for a node with {_list_resources(request)} free: the cluster is busy or"
            " scaling up"
        )
    with _unwrapped_errors():
        return ray.get(reference)


def _list_resources(request: Request) -> dict[str, Any]:
    return {"num_cpus": request.cpus_per_actor, "num_gpus": 1 if request.use_gpu else 0}


@contextmanager
def _unwrapped_errors() -> Generator[None]:
    """Raise the exception that was raised on the node, without Ray's wrapping."""
    try:
        yield
    except RayError as error:
        cause: BaseException = error  # Ray's error is also an instance of its cause's class
        while isinstance(cause, RayError) or not isinstance(cause, _CLEAR):
            inner = getattr(cause, "cause", None) or cause.__cause__
            if inner is None:
                raise EncodingFailed(first_cause(error)) from error
            cause = inner
        raise cause from None


def _connect() -> None:
    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS") or "local",
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
