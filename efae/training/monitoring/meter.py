"""Training curves: sums on the device, one host sync and one all-reduce per log interval.

An interval ends at `read`, and the next begins at `reset`: what lies between them (validation, the
copy of a checkpoint) counts in neither. Each rank reads its own clock. Rank 0's is the one to log:
it alone copies checkpoints and draws pictures, and the next step of other ranks waits for it.
"""

import time

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from efae.evaluation.flow_measures import TIME_BINS


class Meter:
    """Measures loss overall and by bin of t, images per second and the share of data wait.

    Args:
        device: Device of training, where losses are summed so that `add` never waits for it.

    Attributes:
        sums: Sums of losses and counts (2, TIME_BINS) by bin of t, of this rank; float64.
        bad_samples: Number of distinct training images that this rank replaced; set by the caller.
        bad_samples_of_all: Sum of `bad_samples` over all ranks, at the last `read`.
        wait_seconds: Time spent waiting for data since the last `reset`; the caller adds to it.
        seconds: Length of all intervals that were read, by the clock of this rank.
        started: Value of `time.monotonic()` at the last `reset`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bad_samples = self.bad_samples_of_all = 0
        self.seconds = 0.0
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.sums = torch.zeros(2, TIME_BINS, dtype=torch.float64, device=self.device)
        self.wait_seconds = 0.0
        self.started = time.monotonic()

    def add(self, loss: Float[Tensor, "batch"], t: Float[Tensor, "batch"]) -> None:
        """Add the loss of each example at its flow time t in [0, 1]."""
        bins = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        values = torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])
        self.sums.index_add_(1, bins, values)

    def read(self) -> dict[str, float]:
        """Return the metrics since the last reset, over all ranks.

        All ranks call it together, since it sums over them. `reset` begins a new interval.

        Returns:
            "loss" (mean per example; nan if none was added), "images_per_second",
            "data_wait_fraction" (in [0, 1], mean over ranks), "bad_samples", and "loss_by_t/0.0"
            onwards by the lower edge of each bin that is not empty.
        """
        scalars = self.sums.new_tensor([self.wait_seconds, self.bad_samples])
        row = torch.cat([self.sums.flatten(), scalars])
        if dist.is_initialized():
            dist.all_reduce(row)
        row = row.cpu()
        # Only now has the device ended the steps of the interval.
        elapsed = max(time.monotonic() - self.started, 1e-9)
        self.seconds += elapsed
        losses, counts = row[:-2].view(2, -1)
        waited, bad = float(row[-2]), float(row[-1])
        self.bad_samples_of_all = int(bad)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        metrics = {
            "loss": float(losses.sum() / counts.sum()),
            "images_per_second": float(counts.sum()) / elapsed,
            "data_wait_fraction": waited / world_size / elapsed,
            "bad_samples": bad,
        }
        for i in range(TIME_BINS):
            if counts[i]:
                metrics[f"loss_by_t/{i / TIME_BINS:.1f}"] = float(losses[i] / counts[i])
        return metrics
