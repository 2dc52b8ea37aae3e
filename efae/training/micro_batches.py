"""Gradient accumulation: forward and backward in parts of a batch, with the result of the whole.

All parts share the draws of the whole batch, and no loss of an example depends on other examples,
so the size of the parts changes memory and rounding only. Measurements, which need no gradients,
halve their own batches.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from efae.config import AnyConfig, Config
from efae.evaluation.measures import to_float
from efae.model.objective import BatchDraws
from efae.model.precision import autocast
from efae.training.state import TrainState

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")
# What torch says where it has no exception class: of the host's memory, and of GPU memory that not
# its own allocator but the driver or a library asked for.
_NO_MEMORY = (
    *("can't allocate memory", "CUDA error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


class OutOfMemory(RuntimeError):
    """The passes of a step did not fit into the memory of the device or the host.

    Attributes:
        micro_batch_size: Number of images per pass that was too many.
        cause: What the allocator said.
    """

    def __init__(self, micro_batch_size: int, cause: str):
        super().__init__(micro_batch_size, cause)
        self.micro_batch_size, self.cause = micro_batch_size, cause

    @property
    def is_final(self) -> bool:
        """Whether even one image is too many."""
        return self.micro_batch_size == 1

    def __str__(self) -> str:
        if self.is_final:
            return (
                f"a forward pass of one image does not fit into memory ({self.cause}): lower"
                " training.activation_memory or the sizes of the model, or take machines with more"
                " memory"
            )
        what = f"{self.micro_batch_size} images per forward pass do not fit into memory"
        return f"{what}: restarting with {self.micro_batch_size // 2} ({self.cause})"


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _NO_MEMORY
    )


def fit_batches(measure: Callable[[int], _Result], batch_size: int) -> tuple[_Result, int]:
    """Measure in batches that fit into memory; returns the result and their size.

    Args:
        measure: Function of the batch size, which changes memory and rounding only. It is called
            anew with half of the size whenever it runs out of memory.
        batch_size: Size to begin with.

    Raises:
        Exception: What `measure` raises for another reason, or with batches of one.
    """
    while True:
        try:
            return measure(batch_size), batch_size
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not _lacks_memory(error):
                raise
            what = f"{batch_size} images per batch do not fit into memory"
            logger.warning("%s: measuring again with %d", what, batch_size // 2)
        # Outside of the handler, whose traceback holds the tensors of the failed attempt.
        torch.cuda.empty_cache()
        batch_size //= 2


def _to_float(values: Tensor) -> Tensor:
    """Convert pixels to [-1, 1]; latents keep their values."""
    return to_float(values) if values.dtype == torch.uint8 else values.float()


class Accumulation:
    """Forward and backward passes of one step of one rank.

    Args:
        objective: Objective around the model of `state`, wrapped if there are several ranks.
        state: State of training; its gradients and its running latent power are set.
        config: Configuration of the experiment.
        micro_batch_size: Maximum number of images per pass; 0 is all.
    """

    def __init__(
        self, objective: nn.Module, state: TrainState, config: AnyConfig, micro_batch_size: int
    ):
        self._objective, self._state, self._training = objective, state, config.training
        self._size = micro_batch_size
        # What forward passes update; empty if nothing.
        updates = isinstance(config, Config) and not config.freezes_latent
        self._power: Tensor = state.model.bottleneck.power if updates else torch.zeros(0)

    def __call__(
        self, image: Shaped[Tensor, "b c h w"], draws: BatchDraws
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Add the gradients of a batch's mean loss; returns loss and t of each example.

        Args:
            image: Images in [0, 255], or latents of any dtype, on the device.
            draws: Draws of these.

        Raises:
            OutOfMemory: A pass does not fit into memory; the gradients are incomplete.
        """
        size = min(self._size or len(image), len(image))
        try:
            return self._accumulate(image, draws, size)
        except (RuntimeError, MemoryError) as error:
            if _lacks_memory(error):
                raise OutOfMemory(size, str(error).splitlines()[0]) from error
            raise

    def _accumulate(self, image: Tensor, draws: BatchDraws, size: int) -> tuple[Tensor, Tensor]:
        whole = self._training.global_batch_size
        images = cast(tuple[Tensor, ...], image.split(size))
        parts = draws.split(size)
        # Every part updates the running power from the same start; their mean is the update by the
        # whole batch, and the mean over ranks that by the global batch.
        power = self._power
        start, mean = power.detach().clone(), torch.zeros_like(power)
        losses, times = list[Tensor](), list[Tensor]()
        for i, (pixels, drawn) in enumerate(zip(images, parts, strict=True)):
            power.data.copy_(start)
            with self._sync(last=i == len(images) - 1):
                with autocast(self._training.precision, image.device):
                    loss, t = self._objective(_to_float(pixels), drawn)
                self._state.scaler.scale(self._mean(loss)).backward()
            mean += power.detach() * (len(pixels) / whole)
            losses.append(loss.detach())
            times.append(t)
        if len(power):
            if dist.is_initialized():
                dist.all_reduce(mean)
            power.data.copy_(mean)
        return torch.cat(losses), torch.cat(times)

    def _mean(self, loss: Tensor) -> Tensor:
        # DDP averages gradients over ranks with equal weight, but one rank may have one image more
        # than another: divide by the mean number per rank, not by this rank's own.
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        return loss.sum() / (self._training.global_batch_size / world_size)

    def _sync(self, last: bool) -> Any:
        """Return a context in which ranks average gradients only in the last backward pass."""
        no_sync = getattr(self._objective, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()
