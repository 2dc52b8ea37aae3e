"""Evaluation of models in Ray tasks, beside other work of the driver.

The process of a task imports this module, and therefore neither Ray Train nor MLflow.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import ray
import torch

from data_pipelines.images.logs import ignore_metadata
from efae.checkpoints.checkpoint import read_model
from efae.config import Config
from efae.config import forms as configuration
from efae.evaluation.any_angle import choose_angles
from efae.evaluation.evaluate import Measurement
from efae.evaluation.fitted_action import FittedAction, fit_action
from efae.evaluation.held_out import read_held_out, read_images
from efae.evaluation.linear_reference import fit_linear_reference
from efae.evaluation.results import Evaluation, Part, join_parts
from efae.model.autoencoder import Autoencoder
from efae.model.execution.compilation import compile_blocks
from efae.training.micro_batches import fit_batches

_BATCH_SIZE = 64
_FITTED_IMAGES = 256
_RELEASE_SECONDS = 5.0
"""Longest time that Ray takes to free what ended workers held."""


def start_evaluation(model_uri: str, config: Config, workers: int) -> Callable[[], Evaluation]:
    """Start to measure a model on the run's held-out images, in Ray tasks that share the images.

    Args:
        model_uri: URI of a checkpoint or model folder, reachable from the cluster's nodes.
        config: Configuration of the model, the images and the resources.
        workers: Number of workers that the run ended with; as many tasks start, or as many as the
            cluster has free resources for, but not fewer than the least number of workers.

    Returns:
        Function that waits for the result. It raises ray.exceptions.RayTaskError if a task failed;
        also an instance of its cause's class.
    """
    from efae.worker_groups import free_orphans  # Ray Train

    free_orphans()
    measure = ray.remote(_measure).options(
        num_cpus=config.ray.cpus_per_worker, num_gpus=1 if config.ray.use_gpu else 0
    )
    tasks = choose_tasks(config, workers)
    text = configuration.to_json(config)
    parts = [measure.remote(model_uri, text, (i, tasks)) for i in range(tasks)]

    def wait() -> Evaluation:
        return _prepare(Autoencoder(config), config).summarize(join_parts(ray.get(parts)))

    return wait


def choose_tasks(config: Config, workers: int) -> int:
    """Return the number of tasks that share the evaluation of a run; see `start_evaluation`."""
    fewest = min(workers, config.ray.fewest_workers)
    free, deadline = _count_free(config), time.monotonic() + _RELEASE_SECONDS
    while free < workers and workers > fewest and time.monotonic() < deadline:
        time.sleep(0.25)
        free = _count_free(config)
    # Every task loads the model: a batch of images for each pays for it.
    batches = -(-config.training.held_out_images // _BATCH_SIZE)
    return min(batches, workers, max(fewest, free))


def _count_free(config: Config) -> int:
    """Return the number of workers that the free resources of the cluster suffice for."""
    free = cast(dict[str, float], ray.available_resources())
    workers = free.get("CPU", 0) // config.ray.cpus_per_worker
    return int(min(workers, free.get("GPU", 0)) if config.ray.use_gpu else workers)


def fit_on_cluster(config: Config) -> FittedAction:
    """Fit the action of a pretrained autoencoder's latents to training images, in a Ray task.

    Args:
        config: Configuration of a run whose folder has its copy of the autoencoder.

    Raises:
        ray.exceptions.RayTaskError: The fit failed; also an instance of its cause's class.
    """
    fit = ray.remote(_fit).options(
        num_cpus=config.ray.cpus_per_worker, num_gpus=1 if config.ray.use_gpu else 0
    )
    return ray.get(fit.remote(configuration.to_json(config)))


def _fit(text: str) -> FittedAction:
    ignore_metadata()
    from efae.training.starts.source import locate_copy  # seconds, of this task alone

    config = configuration.from_json(text)
    torch.set_num_threads(config.ray.cpus_per_worker)
    device = "cuda" if config.ray.use_gpu else "cpu"
    model = Autoencoder.restore(read_model(locate_copy(config).uri), device)
    images = read_images(config.data, config.data.uri, _FITTED_IMAGES)
    # Fewer than the image has colours are refused: only they carry the colour of a flat patch.
    return fit_action(model, images, 16, device, invariant=config.data.channels)


def _prepare(model: Autoencoder, config: Config) -> Measurement:
    model.precision = config.training.evaluation_precision
    if config.choose_compilation("cuda" if config.ray.use_gpu else "cpu") != "none":
        # Nothing is compiled before the first call: the driver makes none, and needs no compiler.
        model.compiled = compile_blocks(model, fullgraph=False)
    return Measurement(model, angles=choose_angles(model, None, *config.data.image_size))


def _measure(model_uri: str, text: str, share: tuple[int, int]) -> Part:
    """Measure part `share[0]` of `share[1]` parts of the images."""
    ignore_metadata()
    config = configuration.from_json(text)
    torch.set_num_threads(config.ray.cpus_per_worker)
    model = Autoencoder.restore(read_model(model_uri), "cuda" if config.ray.use_gpu else "cpu")
    images = read_held_out(config.data, config.training.held_out_images)
    total = len(images)
    first, end = (total * number // share[1] for number in (share[0], share[0] + 1))
    prepared = _prepare(model, config)
    options = {"progress": _say_progress} if share[0] == 0 else {}

    def measure(batch_size: int) -> Part:
        # Fitted to all images, so that all tasks measure the same map.
        linear = fit_linear_reference(model, images, prepared.device, batch_size)
        measurement = replace(prepared, batch_size=batch_size, linear=linear)
        return measurement.measure(images[first:end], first, total, **options)

    return fit_batches(measure, min(_BATCH_SIZE, total))[0]


def _say_progress(items: Iterable[Any], what: str) -> Iterator[Any]:
    items = list(items)
    for done, item in enumerate(items, start=1):
        yield item
        print(f"evaluating: {what} {done}/{len(items)}", flush=True)
