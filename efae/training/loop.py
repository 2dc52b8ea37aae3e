"""The training loop: read this file first.

A batch goes to the device; t, noise and group element are drawn per example; the objective returns
the flow loss; the optimizer steps, then the moving average of the weights. At intervals the loop
logs metrics, validates on held-out images and writes a checkpoint. Everything random is a function
of (seed, step, rank), so that a resumed run equals an uninterrupted one, bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from data_pipelines import ShardDataset
from efae.checkpoints.checkpoint import Checkpoint
from efae.config import AnyConfig
from efae.model.autoencoder import Autoencoder
from efae.model.precision import float32_arithmetic
from efae.training.compilation import compiler_options, prepare
from efae.training.divergence import DivergenceGuard
from efae.training.micro_batches import Accumulation
from efae.training.monitoring.meter import Meter
from efae.training.monitoring.sample_log import SampleLog
from efae.training.observer import Observer
from efae.training.optimizer import learning_rate_at, set_learning_rate
from efae.training.process import Process
from efae.training.state import TrainState
from efae.training.tasks import choose_task


@dataclass(frozen=True)
class Start:
    """The start of training.

    Attributes:
        checkpoint: Checkpoint to resume from; None begins at step 0.
        rate_factor: Factor on every learning rate; below 1 after training has diverged.
        micro_batch_size: Maximum number of images per forward pass; 0 leaves it to the
            configuration.
        source: Model that flow.distill_from or start.model names, frozen; on the device, as far as
            steps need it. None if they name none, or if the run resumes and no step needs it.
    """

    checkpoint: Checkpoint | None = None
    rate_factor: float = 1.0
    micro_batch_size: int = 0
    source: Autoencoder | None = None


def train(
    config: AnyConfig,
    dataset: ShardDataset,
    process: Process,
    start: Start | None = None,
    observer: Observer | None = None,
) -> TrainState:
    """Train up to step `training.steps` and return the final state.

    Args:
        config: Configuration of the run, which says what is trained.
        dataset: Images to train on, or latents; streamed endlessly, epoch after epoch.
        process: This process; the global batch is split over all of them.
        start: Where to begin; None is step 0.
        observer: Receiver of curves, validation and checkpoints; None on ranks above 0.

    Raises:
        ValueError: The configuration names a model to start from, but `start` has none.
        TrainingDiverged: Loss or gradient is not finite; the weights are those before the step.
        OutOfMemory: A forward or backward pass does not fit into memory.
        StorageError: Shards cannot be read, or checkpoints written, within the deadline.
    """
    training, optimization = config.training, config.optimizer
    task = choose_task(config)
    start, observer = start or Start(), observer or Observer()
    device, world_size = process.device, process.world_size
    task.check_source(start.source, begins=start.checkpoint is None)
    state = TrainState.create(config, device)
    state.model.train()
    loader = dataset.loader(
        global_batch_size=training.global_batch_size,
        rank=process.rank,
        world_size=world_size,
        seed=training.seed,
        options=config.data,
        members=task.members,
        tail="carry",
        pin_memory=device.type == "cuda",
    )
    scores: dict[str, float] = {}
    validations: list[dict[str, float]] = []
    if (checkpoint := start.checkpoint) is not None:
        state.restore(checkpoint)
        loader.load_state_dict(checkpoint.metadata["position"])
        scores = dict(checkpoint.metadata["scores"])
        validations = list(checkpoint.metadata.get("validations", []))
        observer.resume(checkpoint.metadata)
    else:
        task.begin(state, dataset, process, start.source)
    objective = task.build_objective(state.model, process, start.source)
    size = start.micro_batch_size or training.micro_batch_size
    prepare(objective, config, device, one_pass=world_size == 1 and size == 0)
    accumulate = Accumulation(process.wrap(objective), state, config, size)
    generator = torch.Generator(device)
    meter = Meter(device)
    guard = DivergenceGuard(state.optimizer, state.scaler)
    sample_log = SampleLog(config.tracking.sample_log, process.rank, world_size)
    first = state.step
    batches: Iterator[Any] = iter(loader)
    for earlier in validations:  # Tune may have missed the last ones when its trial stopped
        process.report(earlier)

    while state.step < training.steps:
        # Data: this rank's part of the global batch.
        waited = loader.wait_seconds
        batch = next(batches)
        meter.wait_seconds += loader.wait_seconds - waited
        sample_log.write(state.step, batch.key)

        # Draws: one seed per (seed, step, rank), so that no generator state needs saving.
        generator.manual_seed(seed_of(training.seed, state.step, process.rank))
        values, draws = task.draw(batch, generator)

        # Forward and backward, in parts if the batch does not fit into memory.
        with float32_arithmetic(training.precision), compiler_options(config):
            loss, t = accumulate(values, draws)

        # Update; on a gradient that is not finite the guard freezes the weights on the device.
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), optimization.max_grad_norm)
        guard.watch(state.step, batch.key, loss, norm)
        rate = start.rate_factor * learning_rate_at(state.step, training.steps, optimization)
        set_learning_rate(state.optimizer, rate)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.average.update(state.model, state.step)
        meter.add(loss, t)
        observer.end_step()
        state.step += 1

        last = state.step == training.steps
        save = state.step % training.checkpoint_interval == 0 or last
        validate = state.step % training.evaluation_interval == 0 or last
        if not (state.step % training.log_interval == 0 or save or validate):
            continue

        # Curves: the host waits for the device here, and nowhere else in the loop.
        meter.bad_samples = len(loader.bad_samples)
        metrics = meter.read() | {"learning_rate": rate, "gradient_norm": float(norm)}
        guard.check(metrics["loss"])  # before a diverged step is logged or saved
        metrics["images_seen"] = state.step * training.global_batch_size
        if device.type == "cuda":
            metrics["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        observer.log(state.step, metrics)
        scores["loss"] = metrics["loss"]
        if validate:
            validations.append({"step": state.step} | observer.validate(state))
            scores |= {name: validations[-1][name] for name in ("psnr",) if name in validations[-1]}

        # Checkpoint: before the report, which may end this process (Tune stops a trial there).
        save = process.ends_soon() or save
        if save:
            images = (state.step - first) * training.global_batch_size
            metadata = {
                "position": loader.state_dict(),
                "totals": {
                    "images_per_second": images / meter.seconds,
                    "data_wait_fraction": loader.wait_seconds / meter.seconds,
                    "device": describe_device(device),
                    "world_size": world_size,
                    "bad_samples": meter.bad_samples_of_all,
                },
                "scores": dict(scores),
                "validations": list(validations),
            }
            observer.save(state, metadata)
        if validate:
            process.report(validations[-1])
        meter.reset()
    observer.wait()
    return state


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seed_of(*numbers: int) -> int:
    """Mix (seed, step, rank) into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
