"""The training loop: read this file first.

A batch becomes float images on the device; the autoencoder draws t, noise and group element per
example and returns the flow loss; the optimizer steps; the moving average follows; now and then
the curves get a point and storage a checkpoint. Everything random is a function of (seed, step,
rank), so a resumed run goes on as if nothing had happened.
"""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines import ShardDataset
from efae.checkpoints.checkpoint import Checkpoint
from efae.config import Config
from efae.evaluation.measures import to_float
from efae.model.objective import Objective
from efae.training.checkpoint_writer import CheckpointWriter
from efae.training.divergence import DivergenceGuard
from efae.training.meter import Meter
from efae.training.optimizer import learning_rate_at, set_learning_rate
from efae.training.perceptual import load_perceptual
from efae.training.sample_log import SampleLog
from efae.training.state import TrainState
from efae.training.validation import Preview

if TYPE_CHECKING:  # of rank 0 alone
    from efae.tracking.sender import Tracker

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    config: Config,
    dataset: ShardDataset,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    checkpoint: Checkpoint | None = None,
    rate_factor: float = 1.0,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ends_soon: Callable[[], bool] = lambda: False,
    writer: CheckpointWriter | None = None,
    tracker: "Tracker | None" = None,
    preview: Tensor | None = None,
    report: Callable[[dict[str, float]], None] = lambda look: None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainState:
    """Train up to step `training.steps` and return the final state.

    Args:
        config: the experiment.
        dataset: images to train on; streamed endlessly, epoch after epoch.
        device: of this rank.
        rank: of this process.
        world_size: number of processes; the global batch is split over them.
        checkpoint: where to go on from.
        rate_factor: on every learning rate.
        wrap: makes the model data parallel.
        ends_soon: whether this machine, or another's, is about to be taken away: then every log
            interval writes a checkpoint. All ranks call it at the same steps.
        writer: takes the checkpoints; rank 0 only.
        tracker: receives the curves; rank 0 only.
        preview: held-out uint8 images (n, c, h, w) to look at during training; rank 0 only.
        report: gets every look, {"step": ...} and on rank 0 what `Preview.measure` says; those
            before the checkpoint too. All ranks call it at the same steps.
        say: prints progress; rank 0 only.

    Raises:
        TrainingDiverged: loss or gradient is not finite; the weights are as before the step.
        StorageError: shards cannot be read, or checkpoints written, within the deadline.
    """
    training, optimization = config.training, config.optimizer
    state = TrainState.create(config, device)
    state.model.train()
    loader = dataset.loader(
        global_batch_size=training.global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=training.seed,
        tail="carry",
        channels=config.data.channels,
        resolution=config.data.image_size,
        crop=config.data.crop,
        bad_samples=config.data.bad_samples,
        most_bad_samples=config.data.most_bad_samples,
        decode_threads=config.data.decode_threads,
        cache_bytes=config.data.cache_bytes,
        cache_dir=config.data.cache_dir,
        pixel_cache_bytes=config.data.pixel_cache_bytes,
        pin_memory=device.type == "cuda",
    )
    scores: dict[str, float] = {}
    looks: list[dict[str, float]] = []
    if checkpoint is not None:
        state.restore(checkpoint)
        loader.load_state_dict(checkpoint.metadata["position"])
        scores = dict(checkpoint.metadata["scores"])
        looks = list(checkpoint.metadata.get("looks", []))
        if tracker:
            tracker.resend(checkpoint.metadata["unsent_metrics"])
    perceptual = None
    if config.loss.perceptual:
        perceptual = load_perceptual(config.loss.perceptual, device)
    objective = wrap(Objective(state.model, perceptual))
    generator = torch.Generator(device)
    autocast = AUTOCAST[training.precision]
    meter = Meter(device)
    guard = DivergenceGuard(state.optimizer, state.scaler)
    clock = Clock(state.step, training.steps, training.global_batch_size)
    sample_log = SampleLog(config.tracking.sample_log, rank, world_size)
    batches: Iterator[Any] = iter(loader)
    held_out = None if preview is None else Preview(preview.to(device), state, tracker)
    for earlier in looks:
        report(earlier)

    while state.step < training.steps:
        waited = loader.wait_seconds
        batch = next(batches)
        meter.wait_seconds += loader.wait_seconds - waited
        sample_log.write(state.step, batch.key)
        image = to_float(batch.image.to(device, non_blocking=True))

        generator.manual_seed(seed_of(training.seed, state.step, rank))
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            loss, t = objective(image, generator)
        # Not the mean over this rank's images, of which it may have one more than another.
        mean_loss = loss.sum() / (training.global_batch_size / world_size)
        state.scaler.scale(mean_loss).backward()

        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), optimization.max_grad_norm)
        guard.watch(state.step, batch.key, loss, norm)
        rate = rate_factor * learning_rate_at(state.step, training.steps, optimization)
        set_learning_rate(state.optimizer, rate)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.average.update(state.model, state.step)
        meter.add(loss, t)
        state.step += 1

        last = state.step == training.steps
        save = state.step % training.checkpoint_interval == 0 or last
        look = state.step % training.evaluation_interval == 0 or last
        if state.step % training.log_interval == 0 or save or look:
            meter.bad_samples = len(loader.bad_samples)
            metrics = meter.read() | {"learning_rate": rate, "gradient_norm": float(norm)}
            guard.check(metrics["loss"])
            metrics["images_seen"] = state.step * training.global_batch_size
            if tracker:
                tracker.log_metrics(state.step, metrics)
            clock.tick(state.step, metrics, say)
            if look:
                looks.append({"step": state.step} | (held_out.measure() if held_out else {}))
                scores |= {name: looks[-1][name] for name in ("psnr",) if name in looks[-1]}
            scores["loss"] = metrics["loss"]
            save = ends_soon() or save
            if save and writer:
                totals = clock.totals(state.step, loader.wait_seconds) | {
                    "device": describe_device(device),
                    "world_size": world_size,
                    "bad_samples": meter.bad_samples_of_all,
                    "checkpoints": writer.saved,
                    "checkpoint_stall_seconds": writer.stall_seconds,
                }
                extra = {
                    "position": loader.state_dict(),
                    "unsent_metrics": tracker.unsent() if tracker else [],
                    "totals": totals,
                    "scores": dict(scores),
                    "looks": list(looks),
                }
                writer.save(state, extra)
            if look:
                report(looks[-1])
    if writer:
        writer.wait()
    return state


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seed_of(*numbers: int) -> int:
    """A well-mixed seed of (seed, step, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Clock:
    """Says how far the run is, at most every few seconds."""

    def __init__(self, step: int, steps: int, batch_size: int, seconds: float = 10.0):
        self.first, self.steps, self.batch_size, self.seconds = step, steps, batch_size, seconds
        self.started = self.said = time.monotonic()

    def totals(self, step: int, wait_seconds: float) -> dict[str, float]:
        """Speed since these workers started."""
        elapsed = time.monotonic() - self.started
        return {
            "images_per_second": (step - self.first) * self.batch_size / elapsed,
            "data_wait_fraction": wait_seconds / elapsed,
        }

    def tick(self, step: int, metrics: dict[str, float], say: Callable[[str], None]) -> None:
        """Say where the run is, if it is time."""
        now = time.monotonic()
        if now - self.said < self.seconds and step < self.steps:
            return
        self.said = now
        left = (now - self.started) / (step - self.first) * (self.steps - step)
        filled = 20 * step // self.steps
        say(
            f"[{'#' * filled}{'.' * (20 - filled)}] step {step}/{self.steps}"
            f"  loss {metrics['loss']:.4f}  {metrics['images_per_second']:.0f} images/s"
            f"  data wait {metrics['data_wait_fraction']:.1%}"
            f"  {int(left // 60)}:{int(left % 60):02d} left"
        )
