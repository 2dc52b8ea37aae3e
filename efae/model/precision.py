"""Precision of the arithmetic: fp32, TF32 matrix products, or autocast to bf16 or fp16.

Weights, and all that must not lose bits (norms, bottleneck, loss), stay in fp32 throughout.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_device(device: str, option: str) -> None:
    """Raise a ValueError that names the user's option if torch cannot compute on a device here."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"{option}: torch cannot compute on {device!r} here: use cpu; cuda takes a GPU and a"
            " torch that was built for CUDA"
        ) from error


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return a context in which a forward pass runs at this precision; off for fp32 and tf32."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which arithmetic on the device of `like` keeps the dtypes it is given."""
    # Tensors without data, on which FLOPs are counted, know no autocast.
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


@contextmanager
def float32_arithmetic(precision: Precision) -> Generator[None]:
    """Run fp32 matrix products and convolutions with TF32's ten bits of mantissa, or with all 23.

    The setting is the process's, and is put back at the end. By default, cuDNN uses TF32 for
    convolutions; and a caller may have allowed it for matrix products.
    """
    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


@contextmanager
def at_precision(precision: Precision, device: torch.device) -> Generator[None]:
    """Run forward passes at this precision; see `autocast` and `float32_arithmetic`."""
    with float32_arithmetic(precision), autocast(precision, device):
        yield
