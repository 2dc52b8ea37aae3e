"""Detection of divergence before the update, without a host sync per step.

The first gradient that is not finite freezes the weights on the device: the fused optimizer skips
every later update. The host checks when it waits for the device anyway, and reports the step and
its samples.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SAMPLES_NAMED = 8


class TrainingDiverged(RuntimeError):
    """Loss or gradient of a step is not finite; the weights are those before that step.

    Attributes:
        step: Number of updates before that step.
        samples: Keys of this rank's samples in that step whose loss is not finite, or of all if
            the loss of each is finite.
        checkpoint: URI of the run's newest checkpoint; None if there is none.
        rolls_back: Whether the run resumes from it automatically, at a lower learning rate.
    """

    def __init__(
        self,
        step: int,
        samples: Sequence[str],
        checkpoint: str | None = None,
        rolls_back: bool = False,
    ):
        super().__init__(step, samples, checkpoint, rolls_back)
        self.step, self.samples = step, list(samples)
        self.checkpoint, self.rolls_back = checkpoint, rolls_back

    def __str__(self) -> str:
        named = ", ".join(repr(key) for key in self.samples[:_SAMPLES_NAMED])
        more = len(self.samples) - _SAMPLES_NAMED
        what = (
            f"loss or gradient of step {self.step} is not finite: the weights are those before this"
            f" step. Its samples on this rank: {named}{f' and {more} more' if more > 0 else ''}."
        )
        if self.rolls_back:
            return f"{what} Going back to {self.checkpoint or 'the start'} at half the rate."
        return (
            f"{what} Newest checkpoint: {self.checkpoint or 'none yet'}. Inspect the samples; lower"
            " optimizer.learning_rate (a new run: --resume URI starts it from a checkpoint); or let"
            " the run go back automatically: --ray.rollbacks 2"
        )


class DivergenceGuard:
    """Watches the steps of one rank for values that are not finite.

    A gradient scaler (fp16) skips single steps whose gradient overflows, and lowers its scale. With
    one, training has diverged when a loss is not finite or when the scale falls below 1.

    Args:
        optimizer: Fused optimizer, which can skip updates on the device.
        scaler: Gradient scaler of the loss.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self._optimizer, self._scaler = optimizer, scaler
        self._recent: list[tuple[int, Sequence[str], Tensor, Tensor]] = []
        self._frozen: Tensor | None = None

    def watch(self, step: int, keys: Sequence[str], loss: Tensor, norm: Tensor) -> None:
        """Record a step; call this before its update.

        Args:
            step: Number of updates done.
            keys: Keys of this rank's samples.
            loss: Loss (b,) of each sample.
            norm: Norm () of the gradient over all ranks.
        """
        loss = loss.detach()
        bad = ~torch.isfinite(loss).all()
        if not self._scaler.is_enabled():
            bad = bad | ~torch.isfinite(norm)
            # A fused optimizer skips the update where found_inf is 1. Taking the maximum with all
            # earlier steps keeps the weights frozen until the host notices.
            now = bad.float()
            self._frozen = now if self._frozen is None else torch.maximum(self._frozen, now)
            self._optimizer.found_inf = self._frozen  # pyright: ignore[reportAttributeAccessIssue]
        self._recent.append((step, keys, loss, bad))

    def check(self, mean_loss: float) -> None:
        """Check the steps since the last call; waits for the device. All ranks call it together.

        Args:
            mean_loss: Mean loss of these steps over all ranks.

        Raises:
            TrainingDiverged: Loss or gradient of one of them is not finite.
        """
        first_bad = None
        if self._recent and bool(
            (flags := torch.stack([entry[3] for entry in self._recent])).any()
        ):
            first_bad = self._recent[int(flags.int().argmax())]
        scale_is_gone = self._scaler.is_enabled() and self._scaler.get_scale() < 1
        if first_bad is None and math.isfinite(mean_loss) and not scale_is_gone:
            self._recent.clear()
            return
        step, keys, loss, _ = first_bad or self._recent[-1]
        finite: list[bool] = torch.isfinite(loss).tolist()  # pyright: ignore[reportUnknownVariableType]
        bad_keys = [key for key, good in zip(keys, finite, strict=True) if not good]
        raise TrainingDiverged(step, bad_keys or keys)
