"""Octic layers on a GPU: one Triton kernel is the nonlinearity where Triton finds what it needs."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def find_compiler(on_gpu: bool) -> str:
    """Return the compiler that torch calls at run time: Triton's for C on GPUs, else that for C++.

    Raises:
        ValueError: It, a header file or, on GPUs, Triton is missing; the message says which.
    """
    # Neither Triton nor torch.compile tries any other name.
    language, variable, wanted = "c", "CC", ["gcc", "clang"]
    if not on_gpu:
        language, variable = "c++", "CXX"
        wanted = ["clang++" if sys.platform == "darwin" else "g++"]
    named = os.environ.get(variable)
    found = next(filter(None, map(shutil.which, [named] if named else wanted)), None)
    missing = [] if found else [f"a compiler ({named or ' or '.join(wanted)})"]
    if found and not _reads_headers(found, language):
        missing.append(f"header files that {found} does not find (python3-dev and libc6-dev)")
    if on_gpu and importlib.util.find_spec("triton") is None:
        missing.append("Triton, which comes with torch for CUDA")
    if missing:
        raise ValueError(" and ".join(missing))
    return found or ""


def _reads_headers(compiler: str, language: str) -> bool:
    """Whether Python.h and all that it includes is there, as on slim images it is often not."""
    folder = sysconfig.get_path("include", "posix_prefix")
    command = [compiler, "-x", language, "-E", "-I", folder, "-"]
    return not subprocess.run(command, input=b"#include <Python.h>", capture_output=True).returncode


activate: Callable[..., Tensor] | None = None
_missing = ""
if torch.cuda.is_available():
    try:
        find_compiler(on_gpu=True)
    except ValueError as error:
        _missing = str(error)
    else:
        from efae.model.octic import fused_relu

        activate = fused_relu.activate


def find_kernel(x: Tensor) -> Callable[..., Tensor] | None:
    """Return `activate` if it computes on `x`; warn once where it would if nothing were missing."""
    if not x.is_cuda or x.dtype == torch.float64:
        return None
    if activate is None and not torch.compiler.is_compiling():
        _warn_once()
    return activate


@cache
def _warn_once() -> None:
    warnings.warn(
        f"the Triton kernel of octic layers needs {_missing}: install it; until then, matrix"
        " products compute the same and take longer (this warning is shown once per process)",
        stacklevel=2,
    )
