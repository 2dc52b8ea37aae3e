"""The octic nonlinearity as one Triton kernel: bias, to the regular basis, ReLU, and back.

As matrix products of few rows, the changes of basis of `layers.Nonlinearity` read and write every
feature three times, and nothing fuses with them; nor does a compiler fuse the bias of the map
before with a kernel that is not its own. Here a program loads all slots of a tile of features once
and keeps them in registers; sums are in float32, and grouped so that the result
commutes with the group bit for bit (where irreps are split, unless the compiler fuses products).

Importing this module needs Triton, which CUDA builds of torch bring.
"""

# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUnknownArgumentType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import register_autograd, triton_op, wrap_triton

_TILE = 1024
"""Features per program, slot and coset: 8 per thread, or 16 bytes in half precision."""


@triton.jit
def _find_tile(tokens, m, COSETS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return token * (COSETS * m) + channel, (token < tokens) & (channel < m)


@triton.jit
def _turn(u, v, SPLIT: tl.constexpr):
    # Its own inverse: two cosets <-> sum and difference.
    if SPLIT:
        u, v = (u + v) * 0.7071067811865476, (u - v) * 0.7071067811865476
    return u, v


@triton.jit
def _load(x, at, m, inside, COSETS: tl.constexpr, EXISTS: tl.constexpr):
    # Both cosets of a slot. Zeros in place of a slot or coset that the group does not have leave
    # the others as they are: a Hadamard of two, done twice, is that of four with two zeros.
    u = tl.full(at.shape, 0.0, tl.float32)
    v = u
    if EXISTS:
        u = tl.load(x + at, inside, other=0.0).to(tl.float32)
        if COSETS == 2:
            v = tl.load(x + m + at, inside, other=0.0).to(tl.float32)
    return u, v


@triton.jit
def _load_all(
    x, at, size, m, inside, shift, SLOTS: tl.constexpr, COSETS: tl.constexpr, SPLIT: tl.constexpr
):
    a, e = _load(x, at, m, inside, COSETS, True)
    b, f = _load(x + size, at, m, inside, COSETS, True)
    c, g = _load(x + 2 * size, at, m, inside, COSETS, SLOTS == 4)
    d, h = _load(x + 3 * size, at, m, inside, COSETS, SLOTS == 4)
    a, e = _turn(a + shift, e, SPLIT > 0)
    b, f = _turn(b, f, SPLIT > 1)
    c, g = _turn(c, g, SPLIT > 2)
    d, h = _turn(d, h, SPLIT > 3)
    a, b, c, d = _hadamard(a, b, c, d)
    e, f, g, h = _hadamard(e, f, g, h)
    return a, b, c, d, e, f, g, h


@triton.jit
def _load_shift(bias, m, COSETS: tl.constexpr, CHANNELS: tl.constexpr, BIASED: tl.constexpr):
    # What the bias adds to the first coset of the first slot, A1: `layout.embed_invariant`.
    shift = tl.full((1, CHANNELS), 0.0, tl.float32)
    if BIASED:
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        shift = tl.load(bias + channel, channel < m, other=0.0).to(tl.float32)
        if COSETS == 2:
            shift = shift * 1.4142135623730951
    return shift


@triton.jit
def _hadamard(a, b, c, d):
    p, q, r, s = a + b, a - b, c + d, c - d
    return p + r, p - r, q + s, q - s


@triton.jit
def _store(y, at, m, inside, u, v, COSETS: tl.constexpr, EXISTS: tl.constexpr, SPLIT: tl.constexpr):
    if EXISTS:
        u, v = _turn(u, v, SPLIT)
        tl.store(y + at, u.to(y.dtype.element_ty), inside)
        if COSETS == 2:
            tl.store(y + m + at, v.to(y.dtype.element_ty), inside)


@triton.jit
def _store_all(
    y, at, size, m, inside, values, SLOTS: tl.constexpr, COSETS: tl.constexpr, SPLIT: tl.constexpr
):
    a, b, c, d, e, f, g, h = values
    a, b, c, d = _hadamard(a * 0.25, b * 0.25, c * 0.25, d * 0.25)
    e, f, g, h = _hadamard(e * 0.25, f * 0.25, g * 0.25, h * 0.25)
    _store(y, at, m, inside, a, e, COSETS, True, SPLIT > 0)
    _store(y + size, at, m, inside, b, f, COSETS, True, SPLIT > 1)
    _store(y + 2 * size, at, m, inside, c, g, COSETS, SLOTS == 4, SPLIT > 2)
    _store(y + 3 * size, at, m, inside, d, h, COSETS, SLOTS == 4, SPLIT > 3)


@triton.jit
def _run_forward(
    x,
    bias,
    y,
    size,
    tokens,
    m,
    SLOTS: tl.constexpr,
    COSETS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIASED: tl.constexpr,
):
    at, inside = _find_tile(tokens, m, COSETS, TOKENS, CHANNELS)
    shift = _load_shift(bias, m, COSETS, CHANNELS, BIASED)
    a, b, c, d, e, f, g, h = _load_all(x, at, size, m, inside, shift, SLOTS, COSETS, SPLIT)
    a, b, c, d = tl.maximum(a, 0.0), tl.maximum(b, 0.0), tl.maximum(c, 0.0), tl.maximum(d, 0.0)
    e, f, g, h = tl.maximum(e, 0.0), tl.maximum(f, 0.0), tl.maximum(g, 0.0), tl.maximum(h, 0.0)
    _store_all(y, at, size, m, inside, (a, b, c, d, e, f, g, h), SLOTS, COSETS, SPLIT)


@triton.jit
def _run_backward(
    x,
    bias,
    gradient,
    out,
    size,
    tokens,
    m,
    SLOTS: tl.constexpr,
    COSETS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BIASED: tl.constexpr,
):
    at, inside = _find_tile(tokens, m, COSETS, TOKENS, CHANNELS)
    shift = _load_shift(bias, m, COSETS, CHANNELS, BIASED)
    a, b, c, d, e, f, g, h = _load_all(x, at, size, m, inside, shift, SLOTS, COSETS, SPLIT)
    i, j, k, o, p, q, r, t = _load_all(gradient, at, size, m, inside, 0.0, SLOTS, COSETS, SPLIT)
    a, b = tl.where(a > 0.0, i, 0.0), tl.where(b > 0.0, j, 0.0)
    c, d = tl.where(c > 0.0, k, 0.0), tl.where(d > 0.0, o, 0.0)
    e, f = tl.where(e > 0.0, p, 0.0), tl.where(f > 0.0, q, 0.0)
    g, h = tl.where(g > 0.0, r, 0.0), tl.where(h > 0.0, t, 0.0)
    _store_all(out, at, size, m, inside, (a, b, c, d, e, f, g, h), SLOTS, COSETS, SPLIT)


@triton_op("efae::activate", mutates_args=())
def activate(x: Tensor, cosets: int, split: int, bias: Tensor | None = None) -> Tensor:
    """Apply a ReLU in the regular basis to tokens (slot, ..., coset * m) of two or four slots.

    Args:
        x: Tokens in float32, bfloat16 or float16.
        cosets: Number of cosets that slots hold one after the other; 1 if the change of basis does
            not mix them.
        split: Number of leading slots that hold sum and difference of two cosets, of unit norm.
        bias: Invariants (m,) to add first, as `layout.embed_invariant` embeds them, in any dtype.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    grid, sizes, constants = _split_work(x, cosets, split, bias)
    with torch.cuda.device_of(x):  # kernels start on the current GPU
        wrap_triton(_run_forward)[grid](x, x if bias is None else bias, y, *sizes, **constants)
    return y


@triton_op("efae::activate_backward", mutates_args=())
def _activate_backward(
    x: Tensor, gradient: Tensor, cosets: int, split: int, bias: Tensor | None
) -> Tensor:
    x, gradient = x.contiguous(), gradient.contiguous()
    out = torch.empty_like(x)
    grid, sizes, constants = _split_work(x, cosets, split, bias)
    given = x if bias is None else bias
    with torch.cuda.device_of(x):
        wrap_triton(_run_backward)[grid](x, given, gradient, out, *sizes, **constants)
    return out


def _split_work(
    x: Tensor, cosets: int, split: int, bias: Tensor | None
) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int | bool]]:
    """Return the grid of programs, the kernels' sizes, and their constants."""
    slots, m = x.shape[0], x.shape[-1] // cosets
    size = x.numel() // slots
    tokens = size // x.shape[-1]
    channels = min(_TILE, 1 << (m - 1).bit_length())  # the next power of two
    rows = _TILE // channels
    grid = (-(-tokens // rows), -(-m // channels))
    constants = {"SLOTS": slots, "COSETS": cosets, "SPLIT": split, "BIASED": bias is not None}
    return grid, (size, tokens, m), constants | {"TOKENS": rows, "CHANNELS": channels}


def _save_input(ctx: Any, inputs: tuple[Tensor, int, int, Tensor | None], output: Tensor) -> None:
    x, ctx.cosets, ctx.split, bias = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    x, bias = ctx.saved_tensors
    out = _activate_backward(x, gradient, ctx.cosets, ctx.split, bias)
    if bias is None:
        return out, None, None, None
    # Summed by torch, in a fixed order: the eighth of the gradient that is read again is less than
    # the sums that programs of few tokens would write.
    invariant = out[0, ..., : len(bias)].flatten(0, -2)
    summed = invariant.sum(0, dtype=torch.float32) * ctx.cosets**0.5
    return out, None, None, summed.to(bias.dtype)


register_autograd("efae::activate", _backward, setup_context=_save_input)
