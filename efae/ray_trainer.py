"""A run on a Ray cluster: the only file of the library that imports ray.

`run_training` puts the training loop into a Ray Train `TorchTrainer`. The newest complete
checkpoint in storage wins, whatever Ray remembers, so a run of the same name goes on after the
loss of a worker, of the driver or of the whole cluster.
"""

import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import torch
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device, prepare_model

from data_pipelines import ShardDataset, storage, uris
from efae import config as configuration
from efae.artifacts.checkpoint import checkpoint_name, read_checkpoint, read_newest_checkpoint
from efae.artifacts.registry import load
from efae.artifacts.tracker import Tracker
from efae.config import Config
from efae.training.evaluation import Evaluation, evaluate
from efae.training.held_out import read_held_out
from efae.training.loop import train

PREVIEW_IMAGES = 16
_RAY_ENVIRONMENT = {
    # A report costs one poll; Ray's own interval, 2 s, suits hours-long runs.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Ray would print every line of a worker twice, and in colour also where nobody sees it.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_COLOR_PREFIX": "0",
    # Nothing here acts on preemption notices; the watcher costs a process and logs an error.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class TrainingFailed(RuntimeError):
    """The workers failed more often than ray.max_failures; says the first cause and its rank."""


def connect(config: Config) -> None:
    """Join the cluster that RAY_ADDRESS names (or start one here) and see that the run fits.

    Raises:
        ValueError: the cluster has fewer CPUs or GPUs than the workers ask for.
    """
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS") or "local", log_to_driver=True)
    have = cast(dict[str, float], ray.cluster_resources())  # Ray says dict[?, int]
    want = {"CPU": config.ray.cpus_per_worker, "GPU": 1 if config.ray.use_gpu else 0}
    for resource, each in want.items():
        total = each * config.ray.num_workers
        if total > have.get(resource, 0):
            raise ValueError(
                f"ray.num_workers={config.ray.num_workers}: the workers ask for {total}"
                f" {resource}s, but the cluster has {have.get(resource, 0):.0f}; lower"
                " ray.num_workers or ray.cpus_per_worker, or add nodes"
            )


def run_uri(config: Config) -> str:
    """Where the checkpoints of the run are: a folder named after it in ray.storage_uri."""
    return uris.join(config.ray.storage_uri, config.tracking.run_name)


def run_training(config: Config, run_id: str, tracking_uri: str) -> dict[str, Any]:
    """Train on the connected cluster, from the newest checkpoint of the run if there is one.

    Args:
        config: the experiment.
        run_id: the MLflow run that rank 0 logs to.
        tracking_uri: of the MLflow server, as the workers reach it.

    Returns:
        The last metrics that rank 0 reported, see `efae.training.loop`.

    Raises:
        TrainingFailed: the workers failed more often than ray.max_failures.
    """
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={
            "config": configuration.to_json(config),
            "run_id": run_id,
            "tracking_uri": tracking_uri,
        },
        scaling_config=ScalingConfig(
            num_workers=config.ray.num_workers,
            use_gpu=config.ray.use_gpu,
            resources_per_worker={
                "CPU": config.ray.cpus_per_worker,
                **({"GPU": 1} if config.ray.use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=config.tracking.run_name,
            storage_path=config.ray.storage_uri,
            failure_config=FailureConfig(max_failures=config.ray.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.ray.checkpoints_to_keep),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", {}) or {0: error}
        rank, cause = next(iter(causes.items()))
        raise TrainingFailed(f"training failed, first on rank {rank}: {cause}") from error
    assert result.metrics is not None
    return result.metrics


def _train_on_worker(settings: dict[str, str]) -> None:
    config = configuration.from_json(settings["config"])
    context = ray.train.get_context()
    rank, device = context.get_world_rank(), get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.ray.cpus_per_worker)
    for name in ("", "mlflow"):  # Ray, botocore and MLflow chat at INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    newest, tracker, preview = None, None, None
    if rank == 0:
        record_attempt(run_uri(config))
        newest = read_newest_checkpoint(run_uri(config))
        tracker = Tracker(
            settings["tracking_uri"],
            settings["run_id"],
            Path(tempfile.gettempdir()) / "efae-spill",
            system_metrics_interval_seconds=10,
        )
        preview = read_held_out(config.data, PREVIEW_IMAGES)
    uri = broadcast_from_rank_zero(newest[0] if newest else None)
    checkpoint = newest[1] if newest else (read_checkpoint(uri) if uri else None)
    if rank == 0 and checkpoint:
        _say(f"going on from step {checkpoint.metadata['step']}, {uri}")
    try:
        train(
            config,
            ShardDataset.open(config.data.uri),
            device=device,
            rank=rank,
            world_size=context.get_world_size(),
            checkpoint=checkpoint,
            report=_report,
            wrap=_make_parallel,
            tracker=tracker,
            preview=preview,
            say=_say if rank == 0 else lambda line: None,
        )
    finally:
        if tracker:
            tracker.close()


def _say(line: str) -> None:
    print(line, flush=True)


def _make_parallel(model: torch.nn.Module) -> torch.nn.Module:
    # The model's buffers are constants: nothing to broadcast.
    return prepare_model(
        model,
        parallel_strategy_kwargs={"forward_sync_buffers": False, "gradient_as_bucket_view": True},
    )


def _report(metrics: dict[str, Any], folder: Path | None) -> None:
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(folder) if folder else None,
        checkpoint_dir_name=checkpoint_name(metrics["step"]),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def record_attempt(uri: str) -> None:
    """Leave a mark that a group of workers started on this run; inside a worker only.

    Args:
        uri: the run's, see `run_uri`.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    mark = {"started": time.time(), "world_size": ray.train.get_context().get_world_size()}
    name = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
    storage.write_bytes(uris.join(uri, "attempts", name), json.dumps(mark).encode())


def count_recoveries(config: Config) -> int:
    """How often workers started again on this run: 0 when nothing failed.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    marks = storage.list_files(uris.join(run_uri(config), "attempts"))
    return max(0, len(marks) - 1)


def evaluate_on_cluster(model_uri: str, config: Config) -> Evaluation:
    """Measure a model on the run's held-out images, in a Ray task.

    Args:
        model_uri: as `registry.load` takes it, reachable from the cluster's nodes.
        config: which images, and the CPUs and GPU to use; the model brings its own.

    Raises:
        ray.exceptions.RayTaskError: the task failed; it is also an instance of its cause's class.
    """
    task = ray.remote(_evaluate).options(
        num_cpus=config.ray.cpus_per_worker, num_gpus=1 if config.ray.use_gpu else 0
    )
    return ray.get(task.remote(model_uri, configuration.to_json(config)))


def _evaluate(model_uri: str, text: str) -> Evaluation:
    config = configuration.from_json(text)
    torch.set_num_threads(config.ray.cpus_per_worker)
    model = load(model_uri, device="cuda" if config.ray.use_gpu else "cpu")
    images = read_held_out(config.data, config.training.held_out_images)
    return evaluate(model, images, progress=_say_progress)


def _say_progress(items: Iterable[Any], what: str) -> Iterator[Any]:
    items = list(items)
    for done, item in enumerate(items, start=1):
        yield item
        _say(f"evaluating: {what} {done}/{len(items)}")
