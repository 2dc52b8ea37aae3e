"""Training on a Ray cluster.

`run_training` runs the training loop in a Ray Train `TorchTrainer`. Ray starts the workers,
restarts them after failures, and changes their number as nodes leave and join. Ray does not decide
where they resume: the newest undamaged checkpoint in storage does, so a run of the same name
survives the loss of a worker, of the driver or of the whole cluster. Checkpoints do not pass
through `ray.train.report`, because its controller ends the run when it cannot write to storage.
"""

import contextlib
import hashlib
import inspect
import itertools
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.util import get_node_ip_address  # pyright: ignore[reportUnknownVariableType]
from torch.nn.parallel import DistributedDataParallel

from data_pipelines.images.logs import ignore_metadata
from data_pipelines.loading.shard_cache import ShardError
from data_pipelines.storage import Location, LocationLike
from data_pipelines.storage.retries import StorageError
from efae.checkpoints.checkpoint import CheckpointError
from efae.checkpoints.events import read_events, record_event
from efae.checkpoints.run_folder import locate_run
from efae.config import AnyConfig
from efae.config import forms as configuration
from efae.names import make_ascii
from efae.tracking.redaction import first_cause
from efae.tracking.runs import Run
from efae.tracking.timeouts import notice_outages_soon
from efae.training.divergence import TrainingDiverged
from efae.training.micro_batches import OutOfMemory
from efae.training.process import Process
from efae.training.resume import continue_run
from efae.training.tasks import choose_task
from efae.worker_groups import GroupStarts, TrainingFailed

_RAY_ENVIRONMENT = {
    # Notices a lost worker sooner than Ray's default of 2 s, which suits hours-long runs.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Otherwise Ray prints every line of a worker twice, and colours it outside terminals too.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_COLOR_PREFIX": "0",
}
# A restart would fail in the same way: the fault is in the input.
_FINAL = (
    *(CheckpointError, ValueError, TypeError, KeyError, AttributeError, ImportError),
    *(torch.OutOfMemoryError, MemoryError),
)
_NO_HOST_MEMORY = "can't allocate memory"  # torch has no exception class for it


def connect(config: AnyConfig) -> None:
    """Join the cluster that RAY_ADDRESS names (or start one here) and check that the run fits.

    Raises:
        ValueError: The cluster has fewer CPUs or GPUs than the workers need; with ray.autoscaling,
            still too few after placement_timeout_seconds.
    """
    _set_environment()
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS") or "local", log_to_driver=True)
    want = {"CPU": config.ray.cpus_per_worker}
    if config.ray.use_gpu:
        want["GPU"] = 1
    workers = config.ray.fewest_workers
    remedy = "add nodes, or set --ray.autoscaling if the cluster has an autoscaler"
    if config.ray.autoscaling:
        _wait_for_nodes(want, workers, config.ray.placement_timeout_seconds)
        remedy = (
            "check why the autoscaler starts no more (`ray status`), or raise"
            f" ray.placement_timeout_seconds={config.ray.placement_timeout_seconds}"
        )
    have = _list_resources()
    for resource, each in want.items():
        if each * workers > have.get(resource, 0):
            raise ValueError(
                f"ray.num_workers={config.ray.num_workers}: the workers ask for {each * workers}"
                f" {resource}s, but the cluster has {have.get(resource, 0):.0f}; lower"
                f" ray.num_workers or ray.cpus_per_worker, {remedy}"
            )


def _wait_for_nodes(want: dict[str, int], workers: int, seconds: float) -> None:
    """Request nodes for all workers from the autoscaler, and wait for them or for the timeout."""
    # Imported here, because no worker needs it.
    from ray.autoscaler.sdk import request_resources  # pyright: ignore[reportUnknownVariableType]

    deadline = time.monotonic() + seconds
    request_resources(bundles=[want] * workers)
    try:
        while time.monotonic() < deadline:
            have = _list_resources()
            if all(have.get(name, 0) >= each * workers for name, each in want.items()):
                return
            time.sleep(0.5)
    finally:  # otherwise the nodes stay forever; from here on, the workers keep them
        request_resources(bundles=[])


def _list_resources() -> dict[str, float]:
    return cast(dict[str, float], ray.cluster_resources())  # Ray says dict[?, int]


def _set_environment() -> None:
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def run_training(config: AnyConfig, run: Run, on_validation: UserCallback | None = None) -> None:
    """Train on the connected cluster until the last checkpoint is in storage.

    Args:
        config: Configuration of the experiment.
        run: MLflow run that rank 0 logs to.
        on_validation: Callback in Ray's controller; `after_report` gets every validation.

    Raises:
        TrainingFailed: The workers, or Ray's controller, were lost more often than
            ray.max_failures, found no free resources that often in a row, or failed in a way that
            a restart would repeat.
        ValueError, CheckpointError, ConnectionError, StorageError: The model that the run starts
            from cannot be read.
    """
    _set_environment()
    if source := choose_task(config).copy_source(run.server):
        run.log_params(source)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.ray.placement_timeout_seconds)
    for losses in itertools.count():
        try:
            return _fit(config, run, on_validation)
        except (RayActorError, ray.train.ControllerError) as error:
            # The workers died with it; their checkpoints remain.
            cause = first_cause(getattr(error, "controller_failure", error))
            what = f"Ray's controller was lost: {cause}"
            record_event(locate_run(config), "failure", what)
            if losses == config.ray.max_failures:
                raise TrainingFailed(f"{what}; ray.max_failures={losses} times before") from error


def _fit(config: AnyConfig, run: Run, on_validation: UserCallback | None) -> None:
    fewest, most = config.ray.fewest_workers, config.ray.most_workers
    settings = {
        "config": configuration.to_json(config),
        "run": run,
        "reports": on_validation is not None,
    }

    # A closure, because Ray shows train_loop_config to all users of its dashboard.
    def train() -> None:
        _train_on_worker(settings)

    with tempfile.TemporaryDirectory(prefix="efae-ray-", ignore_cleanup_errors=True) as folder:
        trainer = TorchTrainer(
            train,
            torch_config=TorchConfig(timeout_s=config.ray.collective_timeout_seconds),
            scaling_config=ScalingConfig(
                num_workers=most if fewest == most else (fewest, most),
                use_gpu=config.ray.use_gpu,
                resources_per_worker={
                    "CPU": config.ray.cpus_per_worker,
                    **({"GPU": 1} if config.ray.use_gpu else {}),
                },
                elastic_resize_monitor_interval_s=config.ray.resize_interval_seconds,
            ),
            run_config=RunConfig(
                name=make_ascii(config.tracking.run_name),
                storage_path=folder,  # for Ray's own state
                failure_config=FailureConfig(
                    max_failures=config.ray.max_failures + config.ray.rollbacks
                ),
                logging_config=LoggingConfig(log_level="WARNING"),
                callbacks=cast(
                    list[UserCallback],  # Ray accepts other callbacks as well
                    [
                        WorkerFailures(locate_run(config)),
                        GroupStarts(
                            locate_run(config), config.ray, in_sweep=on_validation is not None
                        ),
                        *([on_validation] if on_validation else []),
                    ],
                ),
            ),
        )
        # The controller of an elastic run reserves nodes under this id. A lost controller's
        # reservation lasts three minutes; only a successor with the same id can use it.
        same_id = hashlib.sha256(str(locate_run(config)).encode()).hexdigest()[:32]
        object.__setattr__(trainer.train_run_context, "run_id", same_id)
        try:
            with _interruptible():
                trainer.fit()
        except ray.train.ControllerError as error:
            if isinstance(error.controller_failure, TrainingFailed):
                raise error.controller_failure from error
            raise
        except ray.train.TrainingFailedError as error:
            causes = getattr(error, "worker_failures", {}) or {0: error}
            rank, cause = next(iter(causes.items()))
            raise TrainingFailed(
                f"training failed after ray.max_failures={config.ray.max_failures} losses of"
                f" workers, this time on rank {rank}: {cause}"
            ) from error


@contextmanager
def _interruptible() -> Generator[None]:
    """Have Ctrl-C raise KeyboardInterrupt, as before.

    Ray's handler exits with status 0, and would outlive `fit`, to ignore Ctrl-C from then on.
    """
    if threading.current_thread() is not threading.main_thread():  # Ray installs none here
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if error.code:  # a signal that ends the job
            raise
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, handler)


class WorkerFailures(UserCallback):
    """Callback in Ray's controller: records failures of workers, ends the run if one is final."""

    def __init__(self, run: LocationLike):
        self._run, self._last_shard_error = run, ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record the failure of workers, before Ray decides what to do.

        Raises:
            TrainingFailed: A restart would fail in the same way.
        """
        rank, error = find_root_cause(worker_exceptions)
        # Storage may be the cause: the controller must not wait for it.
        record = threading.Thread(target=self._record, args=(rank, first_cause(error)), daemon=True)
        record.start()
        again = isinstance(error, ShardError) and str(error) == self._last_shard_error
        self._last_shard_error = str(error) if isinstance(error, ShardError) else ""
        if is_final(error) or again:
            record.join(5)
            raise TrainingFailed(f"training failed on rank {rank}: {error}")

    def _record(self, rank: int, cause: str) -> None:
        host = ""
        with contextlib.suppress(StorageError, LookupError):
            starts = [event for event in read_events(self._run) if event.kind == "start"]
            host = f" on {starts[-1].facts['hosts'][rank]}"
        record_event(self._run, "failure", f"rank {rank}{host} was lost: {cause}")


def find_root_cause(errors: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Return the root-cause error of all ranks' errors, and its rank.

    It is an error that a restart would repeat, if any; else that of a process that died: the other
    ranks only waited for it.
    """

    def order(rank: int) -> tuple[bool, bool, int]:
        error = errors[rank]
        return not is_final(error), not isinstance(error, WorkerHealthCheckFailedError), rank

    rank = min(errors, key=order)
    return rank, errors[rank]


def is_final(error: Exception) -> bool:
    """Return whether a restart would fail in the same way."""
    if isinstance(error, TrainingDiverged):
        return not error.rolls_back
    if isinstance(error, OutOfMemory):
        return error.is_final
    return isinstance(error, _FINAL) or _NO_HOST_MEMORY in str(error)


def _train_on_worker(settings: dict[str, Any]) -> None:
    set_up_worker()
    config = configuration.parse_run(json.loads(settings["config"]))
    context = ray.train.get_context()
    rank = context.get_world_rank()
    hosts = [""] * context.get_world_size()
    dist.all_gather_object(hosts, cast(str, get_node_ip_address()))
    process = Process(
        device=get_device(),
        rank=rank,
        hosts=hosts,
        wrap=_make_parallel,
        agree=broadcast_from_rank_zero,
        ends_soon=_PreemptionNotice(locate_run(config) if rank == 0 else None),
        **({"report": ray.train.report} if settings["reports"] else {}),
    )
    continue_run(config, settings["run"], process)


def set_up_worker() -> None:
    """Set process-wide options of a training process that Ray started."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray, botocore and MLflow are verbose at INFO
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # MLflow sets its own when imported
    ignore_metadata()
    notice_outages_soon()


class _PreemptionNotice:
    """Whether the cluster announced the preemption of a node of the run; all ranks ask."""

    def __init__(self, recorded_in: Location | None):
        self._recorded_in = recorded_in

    def __call__(self) -> bool:
        notice = ray.train.get_preemption_info()
        if notice is not None and self._recorded_in:
            ranks = ", ".join(map(str, notice.preempted_ranks))
            what = f"a node will be preempted (ranks {ranks}): a checkpoint at every log interval"
            record_event(self._recorded_in, "notice", what)
            self._recorded_in = None
        return notice is not None


def _make_parallel(model: torch.nn.Module) -> torch.nn.Module:
    # The model's buffers are constants: nothing to broadcast. torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options = {broadcast: False, "gradient_as_bucket_view": True}
    return prepare_model(model, parallel_strategy_kwargs=options)
