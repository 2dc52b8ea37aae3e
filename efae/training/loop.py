"""The training loop: read this file first.

A batch becomes float images on the device; the autoencoder draws t, noise and group element per
example and returns the flow loss; the optimizer steps; the moving average follows; now and then a
checkpoint is written and reported. Everything random is a function of (seed, step, rank), so a
resumed run goes on as if nothing had happened.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines import ShardDataset
from efae.artifacts.checkpoint import Checkpoint, write_checkpoint
from efae.artifacts.report import draw_reconstructions
from efae.artifacts.tracker import Tracker
from efae.config import Config
from efae.model.objective import Objective
from efae.training.measures import psnr, to_float
from efae.training.meter import Meter
from efae.training.optimizer import learning_rate_at, set_learning_rate
from efae.training.perceptual import load_perceptual
from efae.training.sample_log import SampleLog
from efae.training.state import TrainState

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no longer a number."""


def train(
    config: Config,
    dataset: ShardDataset,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    checkpoint: Checkpoint | None = None,
    report: Callable[[dict[str, Any], Path | None], None],
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    tracker: Tracker | None = None,
    preview: Tensor | None = None,
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
        report: called by every rank with metrics and, on rank 0, the folder of a new checkpoint.
        wrap: makes the model data parallel.
        tracker: receives the curves; rank 0 only.
        preview: held-out uint8 images (n, c, h, w) to look at during training; rank 0 only.
        say: prints progress; rank 0 only.

    Raises:
        TrainingDiverged: loss or gradient is not finite; the weights are as before the step.
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
        pin_memory=device.type == "cuda",
    )
    if checkpoint is not None:
        state.restore(checkpoint)
        loader.load_state_dict(checkpoint.metadata["position"])
        if tracker:
            tracker.resend(checkpoint.metadata["unsent_metrics"])
    perceptual = None
    if config.loss.perceptual:
        perceptual = load_perceptual(config.loss.perceptual, device)
    objective = wrap(Objective(state.model, perceptual))
    generator = torch.Generator(device)
    autocast = AUTOCAST[training.precision]
    meter = Meter(device)
    clock = Clock(state.step, training.steps, training.global_batch_size)
    sample_log = SampleLog(config.tracking.sample_log, rank, world_size)
    batches: Iterator[Any] = iter(loader)
    if checkpoint is not None and state.step >= training.steps:
        report(checkpoint.metadata["totals"], None)  # only what comes after training is missing

    while state.step < training.steps:
        waited = loader.wait_seconds
        batch = next(batches)
        meter.wait_seconds += loader.wait_seconds - waited
        sample_log.write(state.step, batch.key)
        image = to_float(batch.image.to(device, non_blocking=True))

        generator.manual_seed(seed_of(training.seed, state.step, rank))
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            loss, t = objective(image, generator)
        state.scaler.scale(loss.mean()).backward()

        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), optimization.max_grad_norm)
        if not state.scaler.is_enabled():  # an fp16 scaler skips such a step and lowers its scale
            require_finite(norm, state.step)
        rate = learning_rate_at(state.step, training.steps, optimization)
        set_learning_rate(state.optimizer, rate)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.average.update(state.model, state.step)
        meter.add(loss, t)
        state.step += 1

        if state.step % training.log_interval == 0 or state.step == training.steps:
            meter.bad_samples = len(loader.bad_samples)
            metrics = meter.read() | {"learning_rate": rate, "gradient_norm": float(norm)}
            metrics["images_seen"] = state.step * training.global_batch_size
            if tracker:
                tracker.log_metrics(state.step, metrics)
            clock.tick(state.step, metrics, say)
        if preview is not None and tracker and state.step % training.evaluation_interval == 0:
            show_preview(state, preview.to(device), tracker)
        if state.step % training.checkpoint_interval == 0 or state.step == training.steps:
            metrics = {"step": state.step, "device": describe_device(device)}
            metrics |= clock.totals(state.step, loader.wait_seconds)
            metrics["bad_samples"] = meter.bad_samples_of_all
            extra = {
                "position": loader.state_dict(),
                "images_seen": state.step * training.global_batch_size,
                "unsent_metrics": tracker.unsent() if tracker else [],
                "totals": metrics,
            }
            report_checkpoint(state, config, extra, rank, report, metrics)
    sample_log.close()
    return state


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seed_of(*numbers: int) -> int:
    """A well-mixed seed of (seed, step, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def require_finite(norm: Tensor, step: int) -> None:
    """Stop before the update when the gradient is not a number, without a host sync on a GPU."""
    message = (
        f"the gradient of step {step} is not finite: the weights are as before this step; lower"
        " optimizer.learning_rate, or look at the batch"
    )
    if norm.is_cuda:
        torch._assert_async(torch.isfinite(norm), message)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
    elif not torch.isfinite(norm):
        raise TrainingDiverged(message)


def report_checkpoint(
    state: TrainState,
    config: Config,
    extra: dict[str, Any],
    rank: int,
    report: Callable[[dict[str, Any], Path | None], None],
    metrics: dict[str, Any],
) -> None:
    """Write a checkpoint (rank 0) and hand it over (every rank, since reporting is a barrier)."""
    folder = None
    if rank == 0:
        tensors, metadata = state.snapshot()
        folder = Path(tempfile.mkdtemp(prefix="efae-checkpoint-"))
        write_checkpoint(folder, **tensors, metadata=metadata | extra, config=config)
    report(metrics, folder)


@torch.no_grad()
def show_preview(state: TrainState, preview: Tensor, tracker: Tracker) -> None:
    """Reconstruct held-out images with the averaged weights and send picture and PSNR."""
    model = copy.deepcopy(state.model).eval()
    state.average.copy_to(model)
    image = to_float(preview)
    sample = model.decode(model.encode(image), seed=0).clamp(-1, 1)
    tracker.log_metrics(state.step, {"held_out/psnr": float(psnr(sample, image).mean())})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"step-{state.step:08d}.png"
        draw_reconstructions(image.cpu(), sample.cpu(), path)
        tracker.log_figure(path, f"reconstructions/{path.name}")


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
