"""Octic layers on a CPU: the same functions as in `layers`, with less arithmetic and fewer copies.

Eager PyTorch computes products near the speed of a core, so each multiplication by a known zero and
each pass over memory counts. On CUDA one batched product is faster than several small ones, and a
compiler fuses passes by itself: both take the plain path in `layers`. A training step at width 512
(32 px, one thread) takes 0.74 s with this module, 0.97 s without.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens are taken to the regular basis in parts of this many numbers, which stay in the cache.
_PART = 2**19


def applies_to(x: Tensor) -> bool:
    """Whether the functions of this module compute on `x`; they are not for 16 bits or autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def multiply(x: Tensor, irreps: Tensor, others: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear map: the irreps of the first slots one by one, other slots as a whole.

    For D4 that is 12 products of channels where blocks of whole slots take 16, a quarter of them
    zero: an eighth off the training step at width 512.

    Args:
        x: Tokens (slot, token, coset * m_in).
        irreps: Weights (slot, coset, m_in, m_out) of the slots that are split.
        others: Weights (slot, coset * m_in, coset * m_out) of the other slots.
        bias: Addend (m_out,) of A1, if any.
    """
    return cast(Tensor, _Linear.apply(x, irreps, others, bias))


def relu_in_regular(x: Tensor, fourier: Tensor) -> Tensor:
    """Apply ReLU in the regular basis to tokens (slot, token, coset * m), part by part.

    As long as a part stays in the cache, the changes of basis cost no more than those of slots.
    """
    return cast(Tensor, _Relu.apply(x, fourier))


def split_heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort features (slot, batch, token, coset, part, head, channel) by part and head.

    Returns one tensor (batch, head, token, slot * coset * channel) per part: query, key, value.
    Copying all at once, PyTorch loops over a few channels innermost, which is 2 to 5 times slower.
    """
    return cast(tuple[Tensor, Tensor, Tensor], _SplitHeads.apply(x))


def merge_heads(x: Tensor, slots: int, cosets: int) -> Tensor:
    """Invert `split_heads` for one part: to tokens (slot, batch, token, coset * m)."""
    return cast(Tensor, _MergeHeads.apply(x, slots, cosets))


def _by_coset(x: Float[Tensor, "token coset*m"], cosets: int) -> Float[Tensor, "coset token m"]:
    return x.view(len(x), cosets, -1).transpose(0, 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, irreps: Tensor, others: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, irreps, others)
        y = _multiply(x, irreps, others)
        if bias is not None:
            y[0, :, : len(bias)] += bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, irreps, others = ctx.saved_tensors
        grad = grad.contiguous()
        split, cosets, _, m_out = irreps.shape
        grad_irreps = torch.empty_like(irreps)
        for slot in range(split):
            columns = _by_coset(x[slot], cosets).mT
            torch.bmm(columns, _by_coset(grad[slot], cosets), out=grad_irreps[slot])
        grad_others = torch.bmm(x[split:].mT, grad[split:])
        grad_bias = grad[0, :, :m_out].sum(0) if ctx.needs_input_grad[3] else None
        grad_x = _multiply(grad, irreps.mT, others.mT) if ctx.needs_input_grad[0] else None
        return grad_x, grad_irreps, grad_others, grad_bias


def _multiply(x: Tensor, irreps: Tensor, others: Tensor) -> Tensor:
    # Each product is written to its place in y, so that nothing is concatenated.
    split, cosets, _, m_out = irreps.shape
    y = x.new_empty(*x.shape[:2], cosets * m_out)
    for slot in range(split):
        torch.bmm(_by_coset(x[slot], cosets), irreps[slot], out=_by_coset(y[slot], cosets))
    torch.bmm(x[split:], others, out=y[split:])
    return y


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fourier: Tensor) -> Tensor:
        y, regular = torch.empty_like(x), []
        for source, target in _split(fourier, x, y):
            part = F.relu_(fourier.t() @ source.reshape(len(fourier), -1))
            target.copy_((fourier @ part).view(target.shape))
            regular.append(part)
        ctx.save_for_backward(fourier, *regular)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        fourier, *regular = ctx.saved_tensors
        grad = grad.contiguous()
        y = torch.empty_like(grad)
        for (source, target), part in zip(_split(fourier, grad, y), regular, strict=True):
            moved = fourier.t() @ source.reshape(len(fourier), -1)
            torch.ops.aten.threshold_backward.grad_input(moved, part, 0, grad_input=moved)
            target.copy_((fourier @ moved).view(target.shape))
        return y, None


def _split(fourier: Tensor, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Return corresponding parts of two tensors of tokens, as views (slot, coset, token, m)."""
    shape = (len(fourier) // len(x), -1)
    source, target = (torch.unflatten(tokens, -1, shape).transpose(1, 2) for tokens in (x, y))
    rows = max(1, _PART // x[:, 0].numel())
    for start in range(0, x.shape[1], rows):
        yield source[:, :, start : start + rows], target[:, :, start : start + rows]


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        ctx.slots, ctx.cosets = x.shape[0], x.shape[3]
        return _to_heads(x).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _from_heads(grads, ctx.slots, ctx.cosets)


class _MergeHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: int, cosets: int) -> Tensor:
        ctx.heads, ctx.cosets = x.shape[1], cosets
        return _from_heads([x], slots, cosets).flatten(3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _to_heads(torch.unflatten(grad, -1, (ctx.cosets, 1, ctx.heads, -1)))[0], None, None


def _to_heads(x: Tensor) -> Tensor:
    slots, batch, tokens, cosets, parts, heads, channels = x.shape
    y = x.new_empty(parts, batch, heads, tokens, slots, cosets, channels)
    source, target = _join_runs(x, y)
    # One copy per piece of a head; see split_heads.
    for slot in range(slots):
        for coset in range(cosets):
            target[..., slot, coset, :] = source[slot, :, :, coset].permute(2, 0, 3, 1, 4)
    return y.flatten(-3)


def _from_heads(parts: Sequence[Tensor], slots: int, cosets: int) -> Tensor:
    batch, heads, tokens, width = parts[0].shape
    channels = width // slots // cosets
    x = parts[0].new_empty(slots, batch, tokens, cosets, len(parts), heads, channels)
    for i, part in enumerate(parts):
        source, target = _join_runs(torch.unflatten(part, -1, (slots, cosets, channels)), x)
        for slot in range(slots):
            for coset in range(cosets):
                target[slot, :, :, coset, i] = source[..., slot, coset, :].transpose(1, 2)
    return x


def _join_runs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """View 8 or 16 bytes in the last dimension as one number, which is copied up to 3x faster."""
    channels = x.shape[-1]
    joined = {8: torch.complex64, 16: torch.complex128}.get(channels * x.element_size())
    for tensor in (x, y):
        steps = (tensor.storage_offset(), *tensor.stride()[:-1])
        if joined is None or tensor.stride(-1) != 1 or any(step % channels for step in steps):
            return x, y
    assert joined
    return x.view(joined), y.view(joined)
