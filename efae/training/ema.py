"""Exponential moving average of the weights: the model that is evaluated and registered."""

import torch
from torch import Tensor, nn


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, with the decay warmed up.

    The warm-up min(decay, (1 + step) / (10 + step)) forgets the random initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.weights.values()), current, 1 - decay
        )

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self.weights[name])
