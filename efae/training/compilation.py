"""How a training step runs: eager or compiled, and how many activations it keeps for backward."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from efae.config import AnyConfig
from efae.config.model import RECOMPILE_LIMIT
from efae.model.execution.compilation import compile_blocks
from efae.model.octic.layers import Recomputing


def prepare(objective: nn.Module, config: AnyConfig, device: torch.device, one_pass: bool) -> None:
    """Compile the objective in place, at its first call, or have its blocks recompute activations.

    Names of weights, and copies of the model, stay as they are.

    Args:
        objective: Objective, not yet wrapped for data parallelism.
        config: Configuration of the experiment.
        device: Device of training.
        one_pass: Whether a step is one forward and backward pass of one process.
    """
    chosen = config.choose_compilation(device.type)
    blocks = [module for module in objective.modules() if isinstance(module, Recomputing)]
    if chosen == "none":
        for block in blocks[: round((1 - config.training.activation_memory) * len(blocks))]:
            block.recomputes = True
    elif chosen == "blocks":
        compile_blocks(objective)
    else:
        # CUDA graphs replay the kernels of a small model without waiting for the host. Several
        # processes go without: DDP's reduction starts between the kernels. So do several passes: a
        # replay overwrites the gradients that it returned before (pytorch/pytorch#169545).
        mode = "reduce-overhead" if device.type == "cuda" and one_pass else None
        objective.compile(fullgraph=True, dynamic=False, mode=mode)


@contextmanager
def compiler_options(config: AnyConfig) -> Generator[None]:
    """Tell the compiler which share of the activations to keep; without effect on eager steps."""
    # They take seconds to import, which a driver need not wait for.
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    share, limit = config.training.activation_memory, RECOMPILE_LIMIT
    with functorch.patch(activation_memory_budget=share), dynamo.patch(recompile_limit=limit):
        yield
