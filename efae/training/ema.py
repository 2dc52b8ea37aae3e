"""Exponential moving average of the weights: the model that is evaluated and registered."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """The moving average: average <- decay * average + (1 - decay) * weights, with warm-up.

    The warm-up decay min(decay, (1 + step) / (10 + step)) forgets the random initial weights.

    Args:
        model: Model to average; the average starts as a copy, on the devices of its parameters.
        decay: Share of the old average that a step keeps, in [0, 1].

    Attributes:
        decay: Decay after the warm-up.
        weights: Average by parameter name, in the shapes and dtypes of the parameters.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {
            # Frozen networks are their own average, and take no memory for another.
            name: p.detach() if _is_frozen(name, p) else p.detach().clone()
            for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights after optimizer update number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach() for p in model.parameters()]
        get_ema_multi_avg_fn(decay)(list(self.weights.values()), current, None)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy `weights`, from any device, into the average; other names are ignored.

        Raises:
            KeyError: The name of a parameter is missing.
        """
        for name, average in self.weights.items():
            average.copy_(weights[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of a model of the same architecture with the average.

        Raises:
            KeyError: The model has a parameter that is not in the average.
        """
        for name, parameter in model.named_parameters():
            parameter.copy_(self.weights[name])


def _is_frozen(name: str, parameter: nn.Parameter) -> bool:
    # Statistics, which training updates, need no gradient either.
    return not parameter.requires_grad and name.startswith(("encoder.", "decoder."))
