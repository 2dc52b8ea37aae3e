"""One seed on one data set: tokenizers, latents, and a flow for each arm and size, with its record.

Finished parts are kept in the folder and not repeated; an interrupted run restarts.
"""

import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.downstream.arms import ARMS, TokenizerName, select_shards, stream
from benchmarks.downstream.features import (
    Classifier,
    nearest,
    read_features,
    score_classifier,
    share_upright,
    train_classifier,
)
from benchmarks.downstream.images import build_images, read_images, write_images
from benchmarks.downstream.latent_flow import measure_loss, sample_latents, train_flow
from benchmarks.downstream.settings import Pose, Settings
from benchmarks.downstream.tokenizers import decode, encode, encode_images, train_tokenizer
from data_pipelines.loading.dataset import LatentSet
from efae.evaluation.measures import psnr, to_float
from efae.evaluation.set_distances import Moments, frechet
from efae.symmetry import D4
from efae.symmetry.group import act_on_grid

PICTURED = 16
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """All runs of one pose and seed, for one process.

    Attributes:
        settings: Settings of all jobs.
        folder: Folder of all jobs.
        pose: Pose of the images.
        seed: Seed of tokenizers, subset and flows.
        arms: Names of the arms to run.
    """

    settings: Settings
    folder: Path
    pose: Pose
    seed: int
    arms: tuple[str, ...]

    @property
    def place(self) -> Path:
        """Folder of this pose and seed."""
        return self.folder / self.pose / str(self.seed)

    def record_path(self, arm: str, size: int) -> Path:
        """Return the path of a run's record; its picture lies beside it."""
        return self.place / "runs" / f"{arm.replace(', ', '-').replace(' ', '_')}-{size}.json"


def prepare(settings: Settings, folder: Path, poses: tuple[Pose, ...], say: Say) -> dict[str, Any]:
    """Make the images and the classifier of all jobs; return the quality of the features."""
    build_images(settings, folder / "images")
    path = folder / "features.json"
    if not path.exists():
        started = time.process_time()
        images, labels = read_images(folder / "images" / "train", "upright")
        half = len(images) // 2
        model = train_classifier(
            folder / "features.safetensors", images[half:], labels[half:], settings.classifier_steps
        )
        test, test_labels = read_images(folder / "images" / "test", "upright")
        report = score_classifier(model, test, test_labels) | _check_metric(model, test, settings)
        report["cpu_seconds"] = time.process_time() - started
        path.write_text(json.dumps(report, indent=1) + "\n")
        say(f"features: label accuracy {report['label_accuracy']:.3f}")
    for pose in poses:
        images, _ = read_images(folder / "images" / "train", pose)
        write_images(folder / pose / "tokenizer_images", images[len(images) // 2 :], 1000)
    return json.loads(path.read_text())


def _check_metric(model: Classifier, test: Tensor, settings: Settings) -> dict[str, Any]:
    """Return the distances of held-out images with increasing damage; they must increase."""
    queries, reference = test[: settings.samples], test[settings.samples :]
    moments = Moments.of(read_features(model, reference))
    noise = torch.randn(queries.shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, float] = {}
    for sigma in (0, 5, 10, 20, 40, 80):
        damaged = (queries.float() + sigma * noise).round().clamp(0, 255).to(torch.uint8)
        found[f"noise {sigma}/255"] = frechet(Moments.of(read_features(model, damaged)), moments)
    for name in ("flip_h", "rot90"):
        turned = D4[name].act_on_image(queries)
        found[name] = frechet(Moments.of(read_features(model, turned)), moments)
    return {"fid_of_damaged_images": found}


class Evaluator:
    """Comparison of samples with held-out images, for one tokenizer."""

    def __init__(self, data: "JobData", name: TokenizerName):
        self.data, self.name = data, name
        self.model = train_tokenizer(
            name,
            data.job.folder / data.job.pose / "tokenizer_images",
            data.job.place / f"{name}-tokenizer",
            data.settings,
            data.job.seed,
            data.say,
        )
        self.held_out_latents = encode(self.model, data.held_out)
        self.reconstructed = decode(self.model, self.held_out_latents)
        self._bases: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def latents(self) -> LatentSet:
        """Latents of the largest subset."""
        place = self.data.job.place
        views = any(ARMS[arm].copies for arm in self.data.job.arms) and self.name == "plain"
        return encode_images(
            self.model,
            place / f"{self.name}-tokenizer",
            self.data.image_shards,
            self.data.job.folder / "images" / "test",
            place / f"{self.name}-latents{'-views' if views else ''}",
            views,
        )

    def base(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a subset's latents, its reconstructions' features, held-out distances to these.

        Samples can be no nearer to the subset's images than the reconstructions are, so distances
        are between reconstructions. In "any", they include all views.
        """
        if size not in self._bases:
            latents = encode(self.model, self.data.subset[:size])
            images = decode(self.model, latents)
            if self.data.job.pose == "any":
                images = torch.cat([element.act_on_image(images) for element in D4])
            features = read_features(self.data.classifier, images)
            held_out = read_features(self.data.classifier, self.reconstructed)
            self._bases[size] = latents, features, nearest(held_out, features)
        return self._bases[size]

    def measure(self, images: Tensor) -> dict[str, float]:
        """Return the FID and the share of upright images."""
        classifier = self.data.classifier
        moments = Moments.of(read_features(classifier, images))
        return {
            "fid": frechet(moments, self.data.reference),
            "upright_share": share_upright(classifier, images),
        }

    def measure_nearness(self, images: Tensor, size: int) -> dict[str, float]:
        """Compare the samples' distances to the subset with those of held-out images.

        Returns:
            The ratio of the medians, and the share of samples below the 5th percentile of the
            held-out distances: 0.05 without memorization.
        """
        _, features, usual = self.base(size)
        found = nearest(read_features(self.data.classifier, images), features)
        return {
            "nearest_ratio": float(found.median() / usual.median()),
            "very_near_share": float((found < usual.quantile(0.05)).float().mean()),
        }


class JobData:
    """Images, classifier and evaluators that the runs of a job share, in memory."""

    def __init__(self, job: Job, say: Say):
        self.job, self.settings, self.say = job, job.settings, say
        train, _ = read_images(job.folder / "images" / "train", job.pose)
        test, _ = read_images(job.folder / "images" / "test", job.pose)
        most, count = max(self.settings.sizes), self.settings.samples
        self.subset = train[job.seed * most : (job.seed + 1) * most].clone()
        if (job.seed + 1) * most > len(train) // 2:
            raise ValueError(
                f"seed {job.seed} with {most} images: the disjoint subsets of all seeds may hold at"
                f" most {len(train) // 2} images, as the tokenizers train on the others; use fewer"
                " --seeds or smaller --sizes"
            )
        self.held_out, reference = test[:count], test[count:]
        self.classifier = train_classifier(
            job.folder / "features.safetensors", train, torch.empty(0), 0
        )
        self.reference = Moments.of(read_features(self.classifier, reference))
        self.image_shards = job.place / "images"
        write_images(self.image_shards, self.subset, self.settings.samples_per_shard, views=True)
        self._evaluators: dict[TokenizerName, Evaluator] = {}

    def evaluator(self, name: TokenizerName) -> Evaluator:
        """Return the evaluator of a tokenizer; the first call trains the tokenizer."""
        if name not in self._evaluators:
            self._evaluators[name] = Evaluator(self, name)
        return self._evaluators[name]


def say(line: str) -> None:
    """Print a line and flush it; a module-level function, so that spawned processes find it."""
    print(line, flush=True)


def run_job(job: Job, say: Say) -> None:
    """Do every run of the job that has no record yet."""
    torch.set_num_threads(1)
    settings = job.settings
    runs = [(arm, size) for size in settings.sizes for arm in job.arms]
    missing = [(arm, size) for arm, size in runs if not job.record_path(arm, size).exists()]
    if not missing:
        return
    data = JobData(job, say)
    for name in sorted({ARMS[arm].tokenizer for arm, _ in missing}):
        floors = job.place / f"floor-{name}.json"
        if not floors.exists():
            write_json(floors, measure_floors(data.evaluator(name)))
    for arm, size in missing:
        record, images = run(data, arm, size)
        path = job.record_path(arm, size)
        path.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(images[:PICTURED, 0].movedim(0, 1).flatten(1).numpy())
        picture.save(path.with_suffix(".png"))
        write_json(path, record)
        say(
            f"{job.pose}, seed {job.seed}, {arm}, {size}: FID {record['fid']:.2f}, nearest"
            f" {record['nearest_ratio']:.2f}, held-out loss {record['loss_held_out']:.4f},"
            f" {record['cpu_seconds']:.0f} CPU s"
        )


def run(data: JobData, name: str, size: int) -> tuple[dict[str, Any], Tensor]:
    """Train, sample and measure one arm; return its record and its samples."""
    job, settings, arm = data.job, data.settings, ARMS[name]
    evaluator = data.evaluator(arm.tokenizer)
    latents = select_shards(evaluator.latents, size, arm.copies)
    dim, height, width = evaluator.held_out_latents.shape[1:]
    shape = (dim, height, width)
    subset, *_ = evaluator.base(size)
    started = time.process_time()
    with closing(stream(arm, latents, settings.batch_size, job.seed)) as batches:
        conditioned = ((z, view if job.pose == "upright" else 0 * view) for z, view in batches)
        model = train_flow(conditioned, shape, settings, job.seed)
    trained = time.process_time() - started
    sampled = sample_latents(model, shape, settings.samples, settings.sampler_steps, job.seed)
    images = decode(evaluator.model, sampled)
    return {
        "pose": job.pose,
        "seed": job.seed,
        "arm": name,
        "size": size,
        **evaluator.measure(images),
        **evaluator.measure_nearness(images, size),
        "loss_held_out": measure_loss(model, evaluator.held_out_latents),
        "loss_train": measure_loss(model, subset[: settings.samples]),
        "bytes_stored": sum(shard.bytes for shard in latents.index.shards),
        "images_encoded": len(latents),
        "training_cpu_seconds": trained,
        "cpu_seconds": time.process_time() - started,
    }, images


def measure_floors(evaluator: Evaluator) -> dict[str, Any]:
    """Measure the bounds for samples: held-out images, reconstructions and a perfect memory."""
    data = evaluator.data
    count = data.settings.samples
    generator = torch.Generator().manual_seed(0)
    remembered: dict[str, dict[str, float]] = {}
    for size in data.settings.sizes:
        latents, *_ = evaluator.base(size)
        drawn = torch.randint(len(latents), (count,), generator=generator)
        latents = latents[drawn]
        if data.job.pose == "any":
            view = torch.randint(len(D4), (count,), generator=generator)
            latents = encode(evaluator.model, act_on_grid(D4, view, data.subset[drawn]))
        images = decode(evaluator.model, latents)
        remembered[str(size)] = evaluator.measure(images) | evaluator.measure_nearness(images, size)
    return {
        "pose": data.job.pose,
        "seed": data.job.seed,
        "tokenizer": evaluator.name,
        "training_steps": evaluator.model.config.training.steps,
        "parameters": sum(p.numel() for p in evaluator.model.parameters()),
        "psnr": float(psnr(to_float(evaluator.reconstructed), to_float(data.held_out)).mean()),
        "largest_difference": evaluator.latents.certificate["max_abs_difference"],
        "held_out": evaluator.measure(data.held_out),
        "reconstructed": evaluator.measure(evaluator.reconstructed),
        "remembered": remembered,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.rename(path)
