"""Exponential moving average of the weights: the model that is evaluated and registered."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, with the decay warmed up.

    The warm-up min(decay, (1 + step) / (10 + step)) forgets the random initial weights.

    Args:
        model: whose parameters to follow; the average starts as a copy, on their devices.
        decay: share of the old average that a step keeps, in [0, 1].

    Attributes:
        decay: as given.
        weights: the average by parameter name, in the shapes and dtypes of the parameters.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach() for p in model.parameters()]
        get_ema_multi_avg_fn(decay)(list(self.weights.values()), current, None)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Become `weights`, from any device; names beyond the model's are ignored.

        Raises:
            KeyError: a parameter's name is not among them.
        """
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of a model of the same architecture with the average.

        Raises:
            KeyError: the model has a parameter that the average does not follow.
        """
        for name, parameter in model.named_parameters():
            parameter.copy_(self.weights[name])
