"""One process of a run: from the run's newest checkpoint to its last, wherever it runs."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from data_pipelines import ShardDataset
from efae.checkpoints.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from efae.checkpoints.events import read_events, record_event
from efae.checkpoints.run_folder import (
    find_newest_checkpoint,
    locate_run,
    read_newest_checkpoint,
    warn_of_damage,
)
from efae.config import Config
from efae.evaluation.held_out import read_held_out
from efae.training.checkpoint_writer import CheckpointWriter
from efae.training.divergence import TrainingDiverged
from efae.training.loop import train


def print_line(line: str) -> None:
    """Print a line of progress, at once."""
    print(line, flush=True)


def continue_run(
    config: Config,
    run_id: str,
    tracking_uri: str,
    *,
    device: torch.device,
    rank: int = 0,
    hosts: Sequence[str] = ("localhost",),
    agree: Callable[[Any], Any] = lambda value: value,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ends_soon: Callable[[], bool] = lambda: False,
    report: Callable[[dict[str, float]], None] = lambda look: None,
    say: Callable[[str], None] = print_line,
) -> None:
    """Train from the newest undamaged checkpoint in storage to the last step.

    Args:
        config: the experiment.
        run_id: the MLflow run that rank 0 logs to.
        tracking_uri: of the MLflow server.
        device: of this process.
        rank: of this process.
        hosts: addresses of the machines of all processes, by rank.
        agree: rank 0's value on every rank; all call it once.
        wrap: makes the model data parallel.
        ends_soon: see `train`, as the next.
        report: gets every look.
        say: prints progress.

    Raises:
        TrainingDiverged: loss or gradient is not finite; it says whether to call this again.
        CheckpointError: all checkpoints of the run are damaged.
        ShardError: a shard or an image in it cannot be read.
        StorageError: the storage refuses or does not answer.
    """
    world_size = len(hosts)
    if device.type == "cpu":
        torch.set_num_threads(config.ray.cpus_per_worker)
    for name in ("", "mlflow"):  # Ray, botocore and MLflow chat at INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = locate_run(config)
    newest, tracker, writer, preview, rollbacks = None, None, None, None, 0
    if rank == 0:
        # Here, since MLflow takes two seconds to import, which no other rank has to wait for.
        from efae.tracking.sender import Tracker, default_spill_folder

        newest = _find_start(config)
        rollbacks = sum(event.kind == "rollback" for event in read_events(uri))
        step = newest[1].metadata["step"] if newest else 0
        workers, s = (f"{world_size} workers", "") if world_size > 1 else ("1 worker", "s")
        what = f"{workers} begin{s}"
        if newest:
            what = f"{workers} continue{s} from step {step}, {newest[0]}"
        record_event(uri, "start", what, step=step, world_size=world_size, hosts=list(hosts))
        say(what)
        writer = CheckpointWriter(uri, config)
        tracker = Tracker(
            tracking_uri, run_id, default_spill_folder(), system_metrics_interval_seconds=10
        )
        preview = read_held_out(config.data, config.training.look_images)
    start, rollbacks = agree((newest[0] if newest else None, rollbacks))
    try:
        train(
            config,
            ShardDataset.open(config.data.uri),
            device=device,
            rank=rank,
            world_size=world_size,
            checkpoint=newest[1] if newest else (read_checkpoint(start) if start else None),
            rate_factor=0.5**rollbacks,
            wrap=wrap,
            ends_soon=ends_soon,
            writer=writer,
            tracker=tracker,
            preview=preview,
            report=report,
            say=say if rank == 0 else lambda line: None,
        )
    except TrainingDiverged as error:
        if writer:
            writer.wait()
        error = TrainingDiverged(
            error.step, error.samples, find_newest_checkpoint(uri), rollbacks < config.ray.rollbacks
        )
        if rank == 0 and error.goes_back:
            record_event(uri, "rollback", str(error), step=error.step)
        raise error from None
    finally:
        if tracker:
            tracker.close()
            if tracker.spilled:
                what = f"MLflow was away: {tracker.spilled} points of the curves had to wait"
                record_event(uri, "outage", what)


def _find_start(config: Config) -> tuple[str, Checkpoint] | None:
    """The run's newest checkpoint, or the one that it was told to begin with."""

    def tell(fault: CheckpointError) -> None:
        warn_of_damage(fault)
        record_event(locate_run(config), "damage", f"checkpoint not used, {fault}")

    newest = read_newest_checkpoint(locate_run(config), tell)
    if newest is None and config.resume not in ("auto", "never"):
        start = read_checkpoint(config.resume)
        start.metadata["unsent_metrics"] = []  # they are of another run
        start.metadata["looks"] = []
        return config.resume, start
    return newest
