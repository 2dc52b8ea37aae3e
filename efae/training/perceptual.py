"""The hook for a perceptual term, for instance LPIPS (Zhang et al. 2018, arXiv:1801.03924).

The configuration names a function of the user's own code, as a job's entry point is named. Only
training resolves it: a model that is pulled from a registry runs nothing that its file names.
"""

import importlib
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn


def load_perceptual(path: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The function that "package.module:name" names.

    Args:
        path: of a function of (predicted image, image), each (b, c, h, w) in [-1, 1], to a loss
            (b,); a torch module is moved to the device and frozen.
        device: where the images are.

    Raises:
        ValueError: there is no such function.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"loss.perceptual={path!r}: {error}; name an importable function as"
            " package.module:function, and ship its package to the workers"
        ) from error
    if not callable(function):
        raise ValueError(f"loss.perceptual={path!r}: is not a function")  # noqa: TRY004
    if isinstance(function, nn.Module):
        function.to(device).eval().requires_grad_(False)
    # Behind a lambda, a module does not become part of the model, its weights and checkpoints.
    return lambda predicted, image: cast(Callable[[Tensor, Tensor], Tensor], function)(
        predicted, image
    )
