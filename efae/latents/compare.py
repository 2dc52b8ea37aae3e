"""Quality of sampled images: two shard sets, or a set and stored moments, compared by features."""

import hashlib
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines import ShardDataset, storage
from data_pipelines.loading.dataset import ImageSet
from efae.evaluation.lpips_fid import Inception, load_inception
from efae.evaluation.set_distances import (
    NEIGHBOURS,
    Features,
    Moments,
    frechet,
    measure_precision_recall,
    score_inception,
)
from efae.latents.sample_request import CompareRequest
from efae.latents.set_features import SmallNetwork, build_network
from efae.report.html import write_json

FILE = "sample_quality.json"
_NAMES = ("mu", "sigma", "mu_s", "sigma_s")
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class _Reference:
    """What samples are compared with; `features` is None for stored moments."""

    facts: dict[str, Any]
    pooled: Moments
    spatial: Moments
    features: Features | None


def compare_sets(
    request: CompareRequest, say: Callable[[str], None], progress: Progress
) -> dict[str, Any]:
    """Measure a set of samples and write sample_quality.json; returns its content.

    Args:
        request: The two sets, the weights and the output.
        say: Function that prints a line.
        progress: Function that shows the progress of an iterable with this name.

    Raises:
        ValueError: The user's input cannot work.
        ShardError: A shard or an image in it cannot be read.
        StorageError: The storage refuses or does not answer.
    """
    stored = request.reference.endswith(".npz")
    samples = _open(request.samples)
    images = None if stored else _open(request.reference)
    if images is not None and images.image_shape != samples.image_shape:
        raise ValueError(
            f"{samples.uri} holds images of {_name_shape(samples)}, {images.uri} of"
            f" {_name_shape(images)} (colours x height x width): compare sets of one shape"
        )
    if images is None and request.fid_weights is None:
        raise ValueError(
            f"--reference {request.reference} holds moments of Inception's features: give"
            " --fid-weights, too, or a shard set of real images"
        )
    moments = _read_moments(Path(request.reference), request.device) if images is None else None
    request.output.mkdir(parents=True, exist_ok=True)
    network = _choose_network(request, images, say)

    def read(dataset: ImageSet, name: str) -> Features:
        loader = dataset.loader(min(request.batch_size, len(dataset)), shuffle=False)
        return _join([network(b.image.to(request.device)) for b in progress(loader, name)])

    reference = moments
    if images is not None:
        found = read(images, "reference")
        pooled, spatial = Moments.of(found.pooled), Moments.of(found.spatial)
        reference = _Reference(_list_facts(images), pooled, spatial, found)
    assert reference is not None
    measured = read(samples, "samples")
    report = {
        "samples": _list_facts(samples),
        "reference": reference.facts,
        "network": network.title,
        "features": network.description,
        **_measure(measured, reference),
        "warnings": _list_warnings(measured, reference),
        "protocol": {**network.protocol, "neighbours": NEIGHBOURS, "device": request.device},
    }
    write_json(request.output / FILE, report)
    return report


def _open(uri: str) -> ImageSet:
    storage.check_readable(uri)
    found = ShardDataset.open(uri)
    if not isinstance(found, ImageSet):
        fault = f"{uri} holds latents: name a set of images"
        raise ValueError(fault)  # noqa: TRY004
    if found.image_shape is None:
        raise ValueError(f"{uri}: its images differ in size; build the shards with --resolution N")
    if len(found) <= NEIGHBOURS:
        raise ValueError(
            f"{uri} holds {len(found)} images: precision and recall take {NEIGHBOURS + 1} at least"
        )
    return found


def _name_shape(images: ImageSet) -> str:
    return " x ".join(map(str, images.image_shape or ()))


def _choose_network(
    request: CompareRequest, images: ImageSet | None, say: Callable[[str], None]
) -> Inception | SmallNetwork:
    if request.fid_weights is not None:
        return load_inception(request.fid_weights, request.device)
    assert images is not None
    return build_network(images, say).to(request.device)


def _read_moments(path: Path, device: str) -> _Reference:
    """Read a reference of guided-diffusion; nothing in it is unpickled.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    wanted = (
        f"{path}: not a reference of guided-diffusion, which has the arrays {', '.join(_NAMES)} of"
        " 2048 pooled and 2023 spatial features"
    )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: torch.tensor(found[name], dtype=torch.float64) for name in _NAMES}
    except (ValueError, TypeError, KeyError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(wanted) from error
    pooled, spatial = (
        Moments(arrays[mean].to(device), arrays[covariance].to(device))
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
    )
    for moments, d in ((pooled, 2048), (spatial, 2023)):
        if moments.mean.shape != (d,) or moments.covariance.shape != (d, d):
            raise ValueError(wanted)
    if not all(bool(array.isfinite().all()) for array in arrays.values()):
        raise ValueError(f"{path}: holds numbers that are not finite")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _Reference({"uri": str(path), "sha256": digest}, pooled, spatial, None)


def _join(parts: list[Features]) -> Features:
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(
        torch.cat([part.pooled for part in parts]),
        torch.cat([part.spatial for part in parts]),
        torch.cat(logits) if logits else None,
    )


def _list_facts(images: ImageSet) -> dict[str, Any]:
    return {
        "uri": images.uri,
        "id": images.id,
        "images": len(images),
        "shape": list(images.image_shape or ()),
    }


def _measure(measured: Features, reference: _Reference) -> dict[str, float | None]:
    precision = recall = None
    if reference.features is not None:
        theirs = reference.features.pooled
        precision, recall = measure_precision_recall(measured.pooled, theirs)
    return {
        "fid": frechet(Moments.of(measured.pooled), reference.pooled),
        "sfid": frechet(Moments.of(measured.spatial), reference.spatial),
        "inception_score": None if measured.logits is None else score_inception(measured.logits),
        "precision": precision,
        "recall": recall,
    }


def _list_warnings(measured: Features, reference: _Reference) -> list[str]:
    """Name the sets that are too small for a covariance of full rank."""
    d = max(measured.pooled.shape[1], measured.spatial.shape[1])
    sets = {"samples": measured, "reference": reference.features}
    return [
        f"{name}: {n} images for {d} features: a covariance of so few is singular, and FID and sFID"
        f" are too large; take more than {d}, and compare at equal numbers only"
        for name, features in sets.items()
        if features is not None and (n := len(features.pooled)) <= d
    ]
