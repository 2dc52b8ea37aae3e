"""Training that diverges stops before the update, without a host sync per step.

The first gradient that is not finite freezes the weights on the device: the fused optimizer leaves
out every update from there on. The host looks when it waits for the device anyway, and says which
step it was and which samples it saw.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SAMPLES_NAMED = 8


class TrainingDiverged(RuntimeError):
    """Loss or gradient of a step is no longer a number; the weights are as before that step.

    Attributes:
        step: updates done before it.
        samples: keys of this rank's samples in that step: those whose loss is not finite, or all
            where the loss of each is.
        checkpoint: URI of the run's newest checkpoint, None where there is none.
        goes_back: whether the run goes back to it by itself, at a lower learning rate.
    """

    def __init__(
        self,
        step: int,
        samples: Sequence[str],
        checkpoint: str | None = None,
        goes_back: bool = False,
    ):
        super().__init__(step, samples, checkpoint, goes_back)
        self.step, self.samples = step, list(samples)
        self.checkpoint, self.goes_back = checkpoint, goes_back

    def __str__(self) -> str:
        named = ", ".join(repr(key) for key in self.samples[:_SAMPLES_NAMED])
        more = len(self.samples) - _SAMPLES_NAMED
        what = (
            f"loss or gradient of step {self.step} is not finite: the weights are as before this"
            f" step. Its samples on this rank: {named}{f' and {more} more' if more > 0 else ''}."
        )
        if self.goes_back:
            return f"{what} Going back to {self.checkpoint or 'the start'} at half the rate."
        return (
            f"{what} Newest checkpoint: {self.checkpoint or 'none yet'}. Look at the samples, lower"
            " optimizer.learning_rate (a new run, --resume URI goes on from a checkpoint), or let"
            " the run go back by itself: --ray.rollbacks 2"
        )


class DivergenceGuard:
    """Watches the steps of one rank.

    With a gradient scaler (fp16) single steps whose gradient overflows are left out by the scaler,
    which lowers its scale; there, training has diverged when a loss is not finite or when the scale
    fell below 1.

    Args:
        optimizer: fused, so that it can leave out updates on the device.
        scaler: of the loss.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self._optimizer, self._scaler = optimizer, scaler
        self._recent: list[tuple[int, Sequence[str], Tensor, Tensor]] = []
        self._frozen: Tensor | None = None

    def watch(self, step: int, keys: Sequence[str], loss: Tensor, norm: Tensor) -> None:
        """To be called before each update.

        Args:
            step: updates done.
            keys: of this rank's samples.
            loss: of each of them, (b,).
            norm: of the gradient over all ranks, ().
        """
        loss = loss.detach()
        bad = ~torch.isfinite(loss).all()
        if not self._scaler.is_enabled():
            bad = bad | ~torch.isfinite(norm)
            now = bad.float()
            self._frozen = now if self._frozen is None else torch.maximum(self._frozen, now)
            self._optimizer.found_inf = self._frozen  # pyright: ignore[reportAttributeAccessIssue]
        self._recent.append((step, keys, loss, bad))

    def check(self, mean_loss: float) -> None:
        """Looks at the steps since the last call, on all ranks alike; waits for the device.

        Args:
            mean_loss: of these steps over all ranks.

        Raises:
            TrainingDiverged: one of them was not finite.
        """
        first_bad = next((entry for entry in self._recent if entry[3]), None)
        scale_is_gone = self._scaler.is_enabled() and self._scaler.get_scale() < 1
        if first_bad is None and math.isfinite(mean_loss) and not scale_is_gone:
            self._recent.clear()
            return
        step, keys, loss, _ = first_bad or self._recent[-1]
        finite: list[bool] = torch.isfinite(loss).tolist()  # pyright: ignore[reportUnknownVariableType]
        culprits = [key for key, good in zip(keys, finite, strict=True) if not good]
        raise TrainingDiverged(step, culprits or keys)
