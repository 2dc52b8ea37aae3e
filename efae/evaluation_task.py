"""Evaluation of a checkpoint in a Ray task, beside other work of the driver.

The process of the task imports this module, and therefore neither Ray Train nor MLflow.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
import torch

from data_pipelines.images.logs import ignore_metadata
from efae import config_forms as configuration
from efae.checkpoints.checkpoint import read_model
from efae.config import Config
from efae.evaluation.evaluate import Evaluation, evaluate
from efae.evaluation.held_out import read_held_out
from efae.model.autoencoder import Autoencoder


def start_evaluation(model_uri: str, config: Config) -> Callable[[], Evaluation]:
    """Start to measure a model on the run's held-out images, in a Ray task.

    Args:
        model_uri: URI of a checkpoint or model folder, reachable from the cluster's nodes.
        config: Configuration of the images and of the resources; the model brings its own for the
            rest.

    Returns:
        Function that waits for the result. It raises ray.exceptions.RayTaskError if the task
        failed; also an instance of its cause's class.
    """
    from efae.worker_groups import free_orphans  # Ray Train

    free_orphans()
    task = ray.remote(_evaluate).options(
        num_cpus=config.ray.cpus_per_worker, num_gpus=1 if config.ray.use_gpu else 0
    )
    pending = task.remote(model_uri, configuration.to_json(config))
    return lambda: ray.get(pending)


def _evaluate(model_uri: str, text: str) -> Evaluation:
    ignore_metadata()
    config = configuration.from_json(text)
    torch.set_num_threads(config.ray.cpus_per_worker)
    model = Autoencoder.restore(read_model(model_uri), "cuda" if config.ray.use_gpu else "cpu")
    model.precision = config.training.evaluation_precision
    images = read_held_out(config.data, config.training.held_out_images)
    return evaluate(model, images, progress=_say_progress)


def _say_progress(items: Iterable[Any], what: str) -> Iterator[Any]:
    items = list(items)
    for done, item in enumerate(items, start=1):
        yield item
        print(f"evaluating: {what} {done}/{len(items)}", flush=True)
