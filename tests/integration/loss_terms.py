"""Loss terms that make jobs diverge, run slowly or need much memory."""

import os
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

CALLS_BEFORE = 50
_calls = 0


def marker() -> Path:
    """Exists once `once` has struck; a file for each stack of servers on this machine."""
    port = os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]
    return Path(tempfile.gettempdir()) / f"efae-poisoned-{port}"


def always(prediction: Tensor, image: Tensor) -> Tensor:
    """Not a number from some step on."""
    global _calls
    _calls += 1
    poison = torch.nan if _calls > CALLS_BEFORE else 0.0
    return poison * prediction.mean((1, 2, 3))


def slow(prediction: Tensor, image: Tensor) -> Tensor:
    """Nothing, but late: a step lasts long enough for nodes to come and go meanwhile."""
    time.sleep(0.05)
    return torch.zeros(len(image))


def once(prediction: Tensor, image: Tensor) -> Tensor:
    """Not a number at one step, of the first processes that come there."""
    global _calls
    _calls += 1
    if _calls == CALLS_BEFORE + 1 and not marker().exists():
        marker().touch()
        return torch.nan * prediction.mean((1, 2, 3))
    return 0.0 * prediction.mean((1, 2, 3))


def hungry(prediction: Tensor, image: Tensor) -> Tensor:
    """Nothing, late, and with more memory than the host has for ten images and more."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch.empty(len(image) * whole // 10, dtype=torch.uint8)
    return slow(prediction, image)
