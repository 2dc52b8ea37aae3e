"""Precision of the arithmetic: fp32, TF32 matrix products, or autocast to bf16 or fp16.

Weights, and all that must not lose bits (norms, bottleneck, loss), stay in fp32 throughout.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

_T = TypeVar("_T")
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

    The setting is the process's, and is put back when the last call in any thread ends; until then
    the latest call that has not ended decides. By default, cuDNN uses TF32 for convolutions; and a
    caller may have allowed it for matrix products, by either API of torch.
    """
    call = object()
    with _lock:
        if not _calls:
            _found.callback(_save_arithmetic())
        _calls[call] = precision
        _set_arithmetic(precision)
    try:
        yield
    finally:
        with _lock:
            del _calls[call]
            if _calls:
                _set_arithmetic(next(reversed(_calls.values())))
            else:
                _found.close()


_lock = threading.Lock()
_calls: dict[object, Precision] = {}
"""Precisions of the calls of `float32_arithmetic` that have not ended, in all threads."""
_found = ExitStack()
"""Puts back the settings that the first of these calls found."""


def _save_arithmetic() -> Callable[[], None]:
    """Return a function that puts back the settings of now."""
    backends: Any = torch.backends
    parts = [
        (backends.cuda.matmul, backends.cudnn),
        (backends.cudnn.conv, backends.cudnn),
        (backends.cudnn.rnn, backends.cudnn),
        (backends.mkldnn.matmul, backends.mkldnn),
    ]
    # A part that agrees with what it belongs to is left to inherit from it, as it does by default.
    found = [part.fp32_precision for part, _ in parts]
    inherited = [whole.fp32_precision for _, whole in parts]
    # Where the two APIs disagree, which is so as soon as the newer one is used, the older one's
    # getters raise an error, in torch.compile too. Its setters also set the newer one.
    convolutions = _read(lambda: backends.cudnn.allow_tf32, default=True)
    products = _read(torch.get_float32_matmul_precision, default="highest")

    def put_back() -> None:
        backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
        for (part, _), value, from_whole in zip(parts, found, inherited, strict=True):
            part.fp32_precision = "none" if value == from_whole else value

    return put_back


def _set_arithmetic(precision: Precision) -> None:
    backends, tf32 = torch.backends, precision == "tf32"
    backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if not tf32:  # these the older one leaves to inherit
        backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = "ieee"


def _read(getter: Callable[[], _T], default: _T) -> _T:
    try:
        return getter()
    except RuntimeError:
        return default


@contextmanager
def at_precision(precision: Precision, device: torch.device) -> Generator[None]:
    """Run forward passes at this precision; see `autocast` and `float32_arithmetic`."""
    with float32_arithmetic(precision), autocast(precision, device):
        yield
