"""Quality of sampled images: two shard sets, or a set and a stored reference, by features."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from data_pipelines import ShardDataset, storage
from data_pipelines.building.fingerprint import make_absolute
from data_pipelines.loading.dataset import ImageSet
from data_pipelines.storage import Location
from efae.evaluation.lpips_fid import Inception, load_inception
from efae.evaluation.set_distances import (
    NEIGHBOURS,
    Moments,
    Progress,
    SetFeatures,
    draw_positions,
    frechet,
    measure_precision_recall,
)
from efae.latents.sample_request import CompareRequest
from efae.latents.set_features import SmallNetwork, build_network
from efae.latents.stored_reference import read_stored
from efae.model.precision import check_device
from efae.registry import promotion
from efae.report.html import write_json
from efae.tracking.server import Server

if TYPE_CHECKING:
    from efae.registry.versions import RegisteredVersion

FILE = "sample_quality.json"
_OF_RAY_JOB = "working_dir_files"
"""Folder of Ray that holds the working folders of jobs; Ray deletes them afterwards."""


@dataclass(frozen=True)
class _Set:
    """Samples, or what they are compared with.

    Attributes:
        facts: Facts for the report.
        shape: Shape of the images; None for moments alone.
        count: Number of images.
        read: Function that yields the images in batches of a size.
        dataset: Shard set; None for a stored reference.
        moments: Stored moments of pooled and of spatial features, if any.
    """

    facts: dict[str, Any]
    shape: tuple[int, ...] | None
    count: int
    read: Callable[[int], Iterator[Tensor]]
    dataset: ImageSet | None = None
    moments: tuple[Moments, Moments] | None = None


def compare_sets(
    request: CompareRequest, say: Callable[[str], None], progress: Progress
) -> dict[str, Any]:
    """Measure a set of samples and write sample_quality.json; returns its content.

    Memory does not grow with the sets, but with the images compared for precision and recall.

    Args:
        request: The two sets, the weights and the output.
        say: Function that prints a line.
        progress: Function that shows the progress of an iterable with this name.

    Raises:
        ValueError: The user's input cannot work.
        ShardError: A shard or an image in it cannot be read.
        StorageError: The storage refuses or does not answer.
    """
    check_device(request.device, f"--device {request.device}")
    output, stored = _check_output(request.output), request.reference.endswith(".npz")
    samples = _open(request.samples)
    if stored and request.fid_weights is None:
        raise ValueError(
            f"--reference {request.reference}: samples are compared with it in Inception's"
            " features: give --fid-weights, too, or a shard set of real images"
        )
    reference = _open_stored(Path(request.reference)) if stored else _open(request.reference)
    if reference.shape is not None and reference.shape != samples.shape:
        raise ValueError(
            f"{samples.facts['uri']} holds images of {_name_shape(samples)},"
            f" {reference.facts['uri']} of {_name_shape(reference)} (colours x height x width):"
            " compare sets of one shape"
        )
    network = _choose_network(request, reference, say)
    near = min(request.precision_recall_images, samples.count, reference.count)

    def measure(images: _Set, name: str) -> SetFeatures:
        kept = draw_positions(images.count, near)
        batches = progress(range(0, images.count, request.batch_size), name)
        found = SetFeatures(kept if images.moments is None else range(near))
        for start, batch in zip(batches, images.read(request.batch_size), strict=True):
            if images.moments is not None:  # only images to keep are needed
                batch = batch[_find_within(kept, start, len(batch))]
            if len(batch):
                found.add(network(batch.to(request.device)))
        return found

    real = measure(reference, "reference") if reference.count else None
    measured = measure(samples, "samples")
    report = {
        "samples": samples.facts,
        "generator": _describe_generator(samples),
        "reference": reference.facts,
        "network": network.title,
        "features": network.description,
        **_compare(measured, real, reference.moments, progress),
        "precision_recall_images": near,
        "warnings": _list_warnings(measured, None if reference.moments else real),
        "protocol": {**network.protocol, "neighbours": NEIGHBOURS, "device": request.device},
    }
    write_json(output / FILE, report)
    return report


def record_fid(report: Mapping[str, Any], server: Server) -> "RegisteredVersion | None":
    """Record FID on the registered version that drew the samples; None if no such one did.

    Args:
        report: Report of `compare_sets`.
        server: MLflow server of the registry.

    Raises:
        ValueError: There is no such version any more, or MLflow does not answer.
        ConnectionError: MLflow fails.
    """
    generator, reference = report["generator"], report["reference"]
    if generator is None or not generator["model"].startswith("models:"):
        return None
    network = f"{report['network']} {report['protocol']['weights_sha256'][:12]}"
    terms = reference.get("id", reference.get("sha256", ""))[:16], network, generator["samples"]
    model, digest = generator["model"], generator["digest"]
    return promotion.record_fid(model, digest, report["fid"], terms, server)


def _describe_generator(samples: _Set) -> dict[str, str] | None:
    """Return what drew the samples, and how; None if that was not `jobs/generate.py sample`."""
    assert samples.dataset is not None
    origin = samples.dataset.index.provenance
    how = origin.get("fingerprint", {})
    if not {"generator", "guidance_interval"} <= how.keys():
        return None
    labels, (low, high) = how["labels"], how["guidance_interval"]
    classes = f"0-{len(labels) - 1}" if labels == list(range(len(labels))) else str(labels)
    parts = [
        f"{how['count']} of {_name_shape(samples)}",
        f"{how['steps']} steps",
        f"guidance {how['guidance']:g} in {low:g}-{high:g}",
        f"classes {classes if labels else 'none'}",
    ]
    return {
        "model": origin.get("model", ""),
        "digest": how["generator"],
        "samples": ", ".join(parts),
    }


def _check_output(uri: str) -> Location:
    output = make_absolute(uri)
    if output.path is not None and _OF_RAY_JOB in output.path.parts:
        raise ValueError(
            f"--output {uri}: this folder is deleted with the Ray job: name one in object storage"
            " (s3://...), or an absolute path on a shared disk"
        )
    storage.check_writable(output)
    return output


def _open(uri: str) -> _Set:
    storage.check_readable(uri)
    found = ShardDataset.open(uri)
    if not isinstance(found, ImageSet):
        fault = f"{uri} holds latents: name a set of images"
        raise ValueError(fault)  # noqa: TRY004
    if found.image_shape is None:
        raise ValueError(f"{uri}: its images differ in size; build the shards with --resolution N")
    _check_count(uri, len(found))
    facts = {
        "uri": found.uri,
        "id": found.id,
        "images": len(found),
        "shape": list(found.image_shape),
    }

    def read(batch_size: int) -> Iterator[Tensor]:
        for batch in found.loader(min(batch_size, len(found)), shuffle=False):
            yield batch.image

    return _Set(facts, found.image_shape, len(found), read, dataset=found)


def _open_stored(path: Path) -> _Set:
    found = read_stored(path)
    facts: dict[str, Any] = {"uri": str(path), "sha256": found.sha256}
    if found.shape is not None:
        _check_count(str(path), found.count)
        facts |= {"images": found.count, "shape": list(found.shape)}
    facts["stored_moments"] = found.moments is not None
    return _Set(facts, found.shape, found.count, found.read, moments=found.moments)


def _check_count(uri: str, count: int) -> None:
    if count <= NEIGHBOURS:
        raise ValueError(
            f"{uri} holds {count} images: precision and recall take {NEIGHBOURS + 1} at least"
        )


def _name_shape(images: _Set) -> str:
    return " x ".join(map(str, images.shape or ()))


def _choose_network(
    request: CompareRequest, reference: _Set, say: Callable[[str], None]
) -> Inception | SmallNetwork:
    if request.fid_weights is not None:
        return load_inception(request.fid_weights, request.device)
    assert reference.dataset is not None
    return build_network(reference.dataset, say).to(request.device)


def _find_within(positions: Sequence[int], start: int, count: int) -> list[int]:
    return [position - start for position in positions if start <= position < start + count]


def _compare(
    samples: SetFeatures,
    real: SetFeatures | None,
    moments: tuple[Moments, Moments] | None,
    progress: Progress,
) -> dict[str, float | None]:
    precision = recall = None
    if real is not None:
        precision, recall = measure_precision_recall(samples.kept, real.kept, progress)
    if moments is None:
        assert real is not None
        moments = real.pooled.compute(), real.spatial.compute()
    fid, sfid = (
        frechet(sums.compute(), theirs)
        for sums, theirs in zip((samples.pooled, samples.spatial), moments, strict=True)
    )
    return {
        "fid": fid,
        "sfid": sfid,
        "inception_score": samples.inception_score,
        "precision": precision,
        "recall": recall,
    }


def _list_warnings(samples: SetFeatures, reference: SetFeatures | None) -> list[str]:
    """Name the sets that are too small for a covariance of full rank."""
    d = max(samples.pooled.width, samples.spatial.width)
    sets = {"samples": samples, "reference": reference}
    return [
        f"{name}: {n} images for {d} features: a covariance of so few is singular, and FID and sFID"
        f" are too large; take more than {d}, and compare at equal numbers only"
        for name, features in sets.items()
        if features is not None and (n := features.count) <= d
    ]
