"""A shard set of images, sampled by a generator and decoded by the tokenizer of its latents.

Every task draws one shard, in fixed batches, so that the images do not depend on the number of
tasks. A finished shard leaves a record in storage and the index is written last: the same command
resumes where it stopped.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines import storage
from data_pipelines.building import unfinished
from data_pipelines.building.fingerprint import make_absolute
from data_pipelines.building.ray_tasks import run_tasks, uses_ray
from data_pipelines.building.sample_encoding import Encoding, Entry
from data_pipelines.building.shard_writer import write_tar
from data_pipelines.contact_sheet import describe_set
from data_pipelines.loading.dataset import ImageSet
from data_pipelines.shards.index import (
    INDEX_NAME,
    LABEL,
    SHEET_NAME,
    ShardIndex,
    index_images,
    join_indexes,
    load_index,
    write_index,
)
from data_pipelines.storage import Location
from efae.config import GeneratorConfig
from efae.config import forms as configuration
from efae.evaluation.measures import to_uint8
from efae.evaluation.samples import ImageSampler
from efae.generation.network import Generator, read_format
from efae.generation.sampling import Guidance, check_guidance
from efae.latents.sample_request import SampleRequest
from efae.model.autoencoder import Autoencoder
from efae.model.precision import check_device
from efae.model.pretrained import StoredModel
from efae.preflight.cluster_checks import reach_cluster
from efae.registry import pull
from efae.tracking.redaction import redact

_SHARDS, _LARGEST_SHARD = 32, 1000
"""Number of shards of a set, unless they would be larger."""


@dataclass(frozen=True)
class _Source:
    """What every task needs."""

    generator: StoredModel
    tokenizer: StoredModel
    request: SampleRequest
    guidance: Guidance
    labels: tuple[int, ...]
    output: Location


def sample_set(request: SampleRequest, say: Callable[[str], None]) -> tuple[ImageSet, int]:
    """Draw the missing shards, and write index, statistics and contact sheet.

    Args:
        request: Generator, number of images and output.
        say: Function that prints one line of progress.

    Returns:
        The set, and the number of images that this call drew.

    Raises:
        ValueError: The user's input cannot work, or the output holds something else.
        CheckpointError: A model is damaged, or of another kind.
        ConnectionError: MLflow fails.
        StorageError: The storage refuses or does not answer.
        TaskFailed: Ray could not run a task.
    """
    output = make_absolute(request.output)
    storage.check_writable(output)
    there = storage.list_files(output)
    found = load_index(output) if INDEX_NAME in there else None
    if found is not None:
        made = found.provenance.get("fingerprint", {})
    else:
        made = unfinished.read_claim(output, there)
    request = _choose_shards(request, made)
    source, fingerprint = _prepare(request, output)
    if found is not None:
        grows = made.get("count", request.count) < request.count
        unfinished.refuse_other(
            output, {**made, "count": request.count} if grows else made, fingerprint
        )
        if not grows:
            unfinished.clear(output)  # an earlier run may have been interrupted there
            return ImageSet(output, found), 0
        there = _reopen(output, found, fingerprint)
    if any(name.endswith(".tar") for name in there) and not unfinished.is_claimed(there):
        raise ValueError(
            f"{output} holds tars but no {INDEX_NAME}: not written by this command; choose another"
            " --output"
        )
    unfinished.claim(output, there, fingerprint)
    names = [f"shard-{n:06d}.tar" for n in range(-(-request.count // request.samples_per_shard))]
    records = unfinished.read_records(output, names, there)
    missing = [
        n
        for n, name in enumerate(names)
        if name not in records
        or there.get(name) != records[name].shards[0].bytes
        or len(records[name].shards[0].keys) < len(_list_positions(request, n))
    ]
    drawn = 0
    for done, (position, record) in enumerate(
        run_tasks(_write_shard, source, missing, request.on, use_gpu=request.use_gpu), start=1
    ):
        records[names[missing[position]]] = record
        drawn += len(record.shards[0].keys)
        say(f"{done} of {len(missing)} shards, {drawn} images")
    unfinished.require_shards(output, records)
    provenance = {"fingerprint": fingerprint, "model": redact(request.model)}
    index = join_indexes([records[name] for name in names], provenance)
    describe_set(output, index)
    write_index(output, index)
    unfinished.clear(output)
    return ImageSet(output, index), drawn


def _choose_shards(request: SampleRequest, made: Mapping[str, Any]) -> SampleRequest:
    """Return the request with a number of samples per shard, which the cluster does not decide.

    Args:
        request: Request of the user.
        made: Fingerprint of the set that the output holds, be it finished or not; empty if none.
    """
    if request.samples_per_shard:
        return request
    whole_batches = -(-request.count // (_SHARDS * request.batch_size)) * request.batch_size
    largest = max(1, _LARGEST_SHARD // request.batch_size) * request.batch_size
    chosen = made.get("samples_per_shard") or min(whole_batches, largest)
    return replace(request, samples_per_shard=chosen)


def _reopen(output: Location, found: ShardIndex, fingerprint: Mapping[str, Any]) -> dict[str, int]:
    """Make a finished set an unfinished one of more images; return its files.

    The index is deleted last, so that the set is complete or can be resumed at any time.
    """
    unfinished.clear(output)
    unfinished.claim(output, {}, fingerprint)
    for shard in found.shards:
        record = ShardIndex((shard,), found.image_shape)
        unfinished.keep_record(output, shard.name, record)
    storage.delete(output / INDEX_NAME)
    return storage.list_files(output)


def _list_positions(request: SampleRequest, number: int) -> range:
    """Return the positions of the images of shard `number`."""
    first = number * request.samples_per_shard
    return range(first, min(first + request.samples_per_shard, request.count))


def _prepare(request: SampleRequest, output: Location) -> tuple[_Source, dict[str, Any]]:
    """Return the tasks' input, and what decides the images."""
    if request.use_gpu and not uses_ray(request.on):
        check_device("cuda", "--use-gpu")
    stored = pull.read(request.model)
    generator, config = Generator.restore(stored), stored.settings
    assert isinstance(config, GeneratorConfig)
    form, classes, flow = read_format(config), config.data.classes, config.flow
    tokenizer = pull.read_tokenizer(form, uri=request.tokenizer)
    guidance = Guidance(
        flow.default_steps if request.steps is None else request.steps,
        flow.guidance_scale if request.guidance is None else request.guidance,
        request.guidance_interval or flow.guidance_interval,
    )
    wrong = [label for label in request.labels if not 0 <= label < classes]
    if wrong:
        what = f"classes 0 to {classes - 1}" if classes else "no classes"
        raise ValueError(f"--labels {wrong[0]}: {redact(request.model)} was trained with {what}")
    labels = request.labels or tuple(range(classes))
    check_guidance(generator, bool(labels), guidance)
    if uses_ray(request.on):
        reach_cluster(lambda: None)
    fingerprint: dict[str, Any] = {
        "generator": stored.digest,
        "generator_settings": configuration.digest(config),
        "tokenizer": tokenizer.digest,
        "tokenizer_settings": configuration.digest(tokenizer.config),
        "tokenizer_steps": tokenizer.config.flow.default_steps,
        "count": request.count,
        "seed": request.seed,
        "labels": list(labels),
        "steps": guidance.steps,
        "guidance": guidance.scale,
        "guidance_interval": list(guidance.interval),
        "samples_per_shard": request.samples_per_shard,
        "batch_size": request.batch_size,
        "precision": request.precision,
    }
    return _Source(stored, tokenizer, request, guidance, labels, output), fingerprint


def _write_shard(source: _Source, number: int) -> ShardIndex:
    """Draw and upload one shard, then write its record; returns an index of this shard alone.

    Raises:
        ValueError: Images are not finite.
        StorageError: The output cannot be written.
    """
    request, labels = source.request, source.labels
    positions = _list_positions(request, number)
    device = "cuda" if request.use_gpu else "cpu"
    sampler = ImageSampler(
        Generator.restore(source.generator, device),
        Autoencoder.restore(source.tokenizer, device),
        request.seed,
        request.precision,
    )
    sampler.tokenizer.precision = request.precision
    for network in (sampler.generator, sampler.tokenizer):
        network.compile_blocks(request.compile)
    samples = list[tuple[Entry, Any]]()
    for start in range(0, len(positions), request.batch_size):
        batch = positions[start : start + request.batch_size]
        classes = [labels[i % len(labels)] for i in batch] if labels else None
        drawn = sampler.draw(batch, classes, source.guidance)
        if not bool(drawn.isfinite().all()):
            raise ValueError(
                f"images {batch[0]} to {batch[-1]}: some numbers are not finite; the generator has"
                f" diverged, or overflows at --precision {request.precision}: try bf16 or fp32"
            )
        images = to_uint8(drawn).cpu().permute(0, 2, 3, 1).numpy()
        for row, i in enumerate(batch):
            pixels = images[row, ..., 0] if images.shape[-1] == 1 else images[row]
            others = {LABEL: str(classes[row]).encode()} if classes else {}
            entry = Entry(key=f"{i:08d}", family="", place=i)
            samples.append((entry, Encoding().encode(pixels, others)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"shard-{number:06d}.tar"
        record = index_images(*write_tar(path, samples), {})
        storage.upload(path, source.output / path.name)
    unfinished.keep_record(source.output, path.name, record)
    return record


def locate_sheet(images: ImageSet) -> str:
    """Return the URI of a set's contact sheet."""
    return str(Location.parse(images.uri) / SHEET_NAME)
