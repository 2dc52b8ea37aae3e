"""One process of a run, from the newest checkpoint to the last step, with or without Ray."""

from collections.abc import Callable, Sequence

import torch

from data_pipelines import ShardDataset
from data_pipelines.storage import Location
from efae.checkpoints.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from efae.checkpoints.events import RunEvent, read_events, record_event
from efae.checkpoints.run_folder import (
    find_newest_checkpoint,
    locate_run,
    read_newest_checkpoint,
    warn_of_damage,
)
from efae.config import AnyConfig
from efae.tracking.runs import Run
from efae.tracking.sender import Tracker, default_spill_folder
from efae.training.checkpoint_writer import CheckpointWriter
from efae.training.divergence import TrainingDiverged
from efae.training.loop import Start, train
from efae.training.micro_batches import OutOfMemory
from efae.training.observer import Observer, RunObserver
from efae.training.process import Process
from efae.training.tasks import choose_task


def print_line(line: str) -> None:
    """Print a line of progress and flush it."""
    print(line, flush=True)


def continue_run(
    config: AnyConfig,
    run: Run,
    process: Process,
    say: Callable[[str], None] = print_line,
) -> None:
    """Train from the newest undamaged checkpoint in storage to the last step.

    Args:
        config: Configuration of the experiment.
        run: MLflow run that rank 0 logs to.
        process: This process.
        say: Function that prints one line of progress.

    Raises:
        TrainingDiverged: Loss or gradient is not finite; it says whether to call this again.
        OutOfMemory: A forward or backward pass of this rank does not fit into memory; unless it is
            final, the next call takes half as many images per pass.
        CheckpointError: All checkpoints of the run are damaged.
        ShardError: A shard or an image in it cannot be read.
        StorageError: The storage refuses or does not answer.
    """
    if process.device.type == "cpu":
        torch.set_num_threads(config.ray.cpus_per_worker)
    folder = locate_run(config)
    task = choose_task(config)
    newest, tracker, rollbacks, size = None, None, 0, 0

    if process.rank == 0:
        newest = _find_start(config)
        events = read_events(folder)
        rollbacks = sum(event.kind == "rollback" for event in events)
        size = _choose_micro_batch_size(config, events)
        say(_record_start(folder, newest, process, size))
        tracker = Tracker(run, default_spill_folder(), system_metrics_interval_seconds=10)
        observer = RunObserver(
            config,
            process,
            CheckpointWriter(folder, config),
            tracker,
            task.make_validation(process, tracker.log_figure),
            say,
        )
    else:
        observer = Observer(task.make_validation(process, None))
    found, rollbacks, size = process.agree((newest[0] if newest else None, rollbacks, size))
    checkpoint = newest[1] if newest else (read_checkpoint(found) if found else None)
    source = task.load_source(process, begins=checkpoint is None)
    try:
        train(
            config,
            ShardDataset.open(config.data.uri),
            process,
            Start(checkpoint, 0.5**rollbacks, size, source),
            observer,
        )
    except OutOfMemory as error:
        # On any rank: the others only wait for this one.
        facts = {"micro_batch_size": error.micro_batch_size}
        record_event(folder, "memory", f"rank {process.rank}: {error}", **facts)
        raise
    except TrainingDiverged as error:
        observer.wait()
        rolls_back = rollbacks < config.ray.rollbacks
        newest_uri = find_newest_checkpoint(folder)
        error = TrainingDiverged(error.step, error.samples, newest_uri, rolls_back)
        if process.rank == 0 and error.rolls_back:
            record_event(folder, "rollback", str(error), step=error.step)
        raise error from None
    finally:
        if tracker:
            tracker.close()
            if tracker.spilled:
                what = (
                    f"MLflow was unreachable: {tracker.spilled} points of the curves were delayed"
                )
                record_event(folder, "outage", what)


def _choose_micro_batch_size(config: AnyConfig, events: Sequence[RunEvent]) -> int:
    """Return half of the smallest size that was too large, or the configuration's; 0 is all."""
    failed = [int(event.facts["micro_batch_size"]) for event in events if event.kind == "memory"]
    sizes = [max(1, size // 2) for size in failed] + [config.training.micro_batch_size]
    return min((size for size in sizes if size), default=0)


def _record_start(
    folder: Location, newest: tuple[str, Checkpoint] | None, process: Process, size: int
) -> str:
    step = newest[1].metadata["step"] if newest else 0
    workers, s = (
        (f"{process.world_size} workers", "") if process.world_size > 1 else ("1 worker", "s")
    )
    what = f"{workers} begin{s}"
    if newest:
        what = f"{workers} continue{s} from step {step}, {newest[0]}"
    if size:
        what += f", with at most {size} images per forward pass"
    record_event(
        folder, "start", what, step=step, world_size=process.world_size, hosts=list(process.hosts)
    )
    return what


def _find_start(config: AnyConfig) -> tuple[str, Checkpoint] | None:
    """Return the run's newest checkpoint, else the one that `config.resume` names."""

    def tell(fault: CheckpointError) -> None:
        warn_of_damage(fault)
        record_event(locate_run(config), "damage", f"checkpoint not used, {fault}")

    newest = read_newest_checkpoint(locate_run(config), tell)
    if newest is None and config.resume not in ("auto", "never"):
        start = read_checkpoint(config.resume)
        start.metadata["unsent_metrics"] = []  # they belong to another run
        start.metadata["validations"] = []
        return config.resume, start
    return newest
