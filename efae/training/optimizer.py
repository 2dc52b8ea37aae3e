"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with linear warm-up and cosine decay."""

import math
from typing import Any

import torch
from torch import nn

from efae.config import OptimizerConfig
from efae.model.networks.linear_path import LinearPath

_LINEAR_RATE = 0.1
"""Learning rate of linear paths that start in closed form, as a share of the others'."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the parameters of `model`, in groups: matrices, vectors, linear starts.

    Weight decay applies to matrices only: biases and gains set scales, not directions. Linear paths
    that start in closed form learn slowly and do not decay.
    """
    started = {
        id(module.free)
        for module in model.modules()
        if isinstance(module, LinearPath) and module.starts_in_closed_form
    }
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in started]
    slow = [p for p in model.parameters() if id(p) in started]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if slow:
        groups.append({"params": slow, "weight_decay": 0.0, "rate_factor": _LINEAR_RATE})
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def learning_rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of update number `step` of `steps`.

    Linear from peak / warmup_steps up to the peak, then half a cosine down to
    peak * final_learning_rate_fraction (Loshchilov & Hutter 2017, arXiv:1608.03983).

    Args:
        step: Number of updates done, in [0, steps).
        steps: Length of the whole training, which also limits the warm-up.
        config: Settings of peak, warm-up and floor.
    """
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = config.final_learning_rate_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group, from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("rate_factor", 1.0)
