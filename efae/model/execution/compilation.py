"""Compiled inference: the blocks of a network as few programs, each for one shape."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from efae.config.model import RECOMPILE_LIMIT
from efae.model.octic.layers import Recomputing
from efae.model.octic.on_gpu import find_compiler


def compile_blocks(model: nn.Module, fullgraph: bool = True) -> bool:
    """Compile every block in place, for each shape at its first call; returns whether there is one.

    Args:
        model: Network; its weights keep their names, and its copies are not compiled.
        fullgraph: Whether to raise an error where a block is not one program, or where there are
            more programs than the limit; such calls stay eager otherwise.
    """
    blocks = [module for module in model.modules() if isinstance(module, Recomputing)]
    for block in blocks:
        block.compile(fullgraph=fullgraph, dynamic=False)
    return bool(blocks)


class Compilable(nn.Module):
    """A network for inference whose blocks can be compiled.

    Attributes:
        compiled: Whether they are.
    """

    compiled = False

    def compile_blocks(self, when: Literal["auto", "none", "blocks"] = "blocks") -> None:
        """Compile the blocks in place, as `compile_repeated_blocks` of diffusers does.

        The first call with each shape takes seconds per kind of block. So that shapes are few,
        batches are filled up to the next power of two: choose such sizes. A network without blocks
        of this package, such as that of an `AutoencoderKL`, stays as it is.

        Args:
            when: "auto" compiles on CUDA only, and "none" nowhere.

        Raises:
            ValueError: The C compiler is missing, or Triton on GPUs.
        """
        on_gpu = next(self.parameters()).is_cuda
        if when == "none" or (when == "auto" and not on_gpu):
            return
        try:
            find_compiler(on_gpu)
        except ValueError as error:
            raise ValueError(
                f"compiled blocks need {error}: install it, or compile none (--compile none)"
            ) from error
        self.compiled = compile_blocks(self, fullgraph=False)

    def call_filled(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Call a function of batches; with compiled blocks, of batches that are filled up."""
        if not self.compiled:
            return function(*inputs)
        from torch._dynamo import config  # a second

        counts = [len(batch) for batch in inputs if batch is not None]
        count = max(counts)
        if not count or not set(counts) <= {1, count}:
            return function(*inputs)
        target = 1 << (count - 1).bit_length()
        with config.patch(recompile_limit=RECOMPILE_LIMIT):
            return function(*(_fill(batch, target) for batch in inputs))[:count]

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, whose blocks are not compiled."""
        return {**super().__getstate__(), "compiled": False}


def _fill(batch: Tensor | None, target: int) -> Tensor | None:
    """Repeat the last entry, which is also the only one of what is the same for all."""
    if batch is None or len(batch) == target:
        return batch
    return torch.cat([batch, batch[-1:].expand(target - len(batch), *batch.shape[1:])])
