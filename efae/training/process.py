"""One process of a run: its rank, its device and its links to the other ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def _ignore(validation: dict[str, float]) -> None:
    pass


@dataclass(frozen=True)
class Process:
    """A rank, its device, and its links to the other ranks. By default it is the only one.

    Attributes:
        device: Device that this process trains on.
        rank: Rank of this process, in [0, world_size).
        hosts: Addresses of the machines of all processes, by rank.
        wrap: Function that makes a model data parallel.
        agree: Function that returns rank 0's value on every rank; all ranks call it together.
        ends_soon: Whether this machine, or another rank's, is about to be preempted; all ranks ask
            at the same steps.
        report: Function that takes every validation: {"step": ...} and what was measured; all
            ranks call it at the same steps.
    """

    device: torch.device
    rank: int = 0
    hosts: Sequence[str] = ("localhost",)
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    agree: Callable[[Any], Any] = lambda value: value
    ends_soon: Callable[[], bool] = lambda: False
    report: Callable[[dict[str, float]], None] = _ignore

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return len(self.hosts)
