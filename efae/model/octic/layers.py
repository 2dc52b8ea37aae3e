"""Octic layers: layers that commute with a group of flips and quarter turns.

Their tokens are one tensor (slot, batch, token, coset * m), laid out as `layout` describes.
With the trivial group the same classes are ordinary dense layers: the dense twins of encoder and
decoder are built that way. Source: Octic Vision Transformers (Nordström, Edstedt, Kahl, Bökman
2025, arXiv:2505.15441).
"""

import math
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from efae.model.octic import on_cpu, on_gpu
from efae.model.octic.layout import (
    convert_fourier,
    embed_invariant,
    from_regular,
    layout_of,
    spread_gains,
    to_regular,
)
from efae.model.precision import no_autocast
from efae.symmetry.group import Group, grid_sources
from efae.symmetry.representation import Representation

_T = TypeVar("_T")


def _expand(
    ties: Float[Tensor, "coefficient *entries"],
    coefficient: Float[Tensor, "coefficient m_in m_out"],
) -> Float[Tensor, "*entries m_in m_out"]:
    """Return the entries of a linear map, each a matrix between channels."""
    entries = ties.flatten(1).t() @ coefficient.flatten(1)
    return entries.view(*ties.shape[1:], *coefficient.shape[1:])


def _join(
    entries: Float[Tensor, "slot coset_in coset_out m_in m_out"],
) -> Float[Tensor, "slot coset_in*m_in coset_out*m_out"]:
    """Join the entries of each slot to one matrix."""
    return entries.transpose(2, 3).flatten(3).flatten(1, 2)


class _Expanded(threading.local):
    """What `expanded_once` keeps in this thread: weights by layer and name; None outside of it."""

    weights: "dict[nn.Module, dict[str, Any]] | None" = None


_expanded = _Expanded()


class Expanding(nn.Module):
    """A layer whose weights are expanded from fewer coefficients."""

    def _keep(self, name: str, expand: Callable[[], _T]) -> _T:
        kept = None if _expanded.weights is None else _expanded.weights.get(self)
        if kept is None:
            return expand()
        if name not in kept:
            kept[name] = expand()
        return kept[name]


@contextmanager
def expanded_once(model: nn.Module) -> Generator[None]:
    """Expand the weights of all octic layers once, while no coefficient changes.

    For inference in several passes, as a sampler makes them: expanding takes a fixed time, which
    small batches feel. Each thread expands its own, so that another may train the same model, or
    sample from it, at the same time.
    """
    outer = _expanded.weights
    layers = [module for module in model.modules() if isinstance(module, Expanding)]
    _expanded.weights = {**(outer or {}), **{layer: {} for layer in layers}}
    try:
        yield
    finally:
        _expanded.weights = outer


class Linear(Expanding):
    """An equivariant linear map between tokens: W with rho_out(g) W = W rho_in(g) for every g.

    For D4 every such W has 8 coefficients per channel pair.

    Args:
        group: Group that acts.
        m_in: Number of channels of the input tokens.
        m_out: Number of channels of the output tokens.
        bias: Whether to add a learned token, which can only be on A1.
        gain: Factor on the initial coefficients; 1 keeps about a third of the variance, as
            `nn.Linear` does.
    """

    ties: Tensor

    def __init__(self, group: Group, m_in: int, m_out: int, bias: bool = True, gain: float = 1.0):
        super().__init__()
        self.layout = layout_of(group)
        self.m_in, self.m_out = m_in, m_out
        # In torch's default dtype, as the coefficients that they are multiplied by.
        ties = self.layout.ties.to(torch.get_default_dtype())
        self.register_buffer("ties", ties, persistent=False)
        self.coefficient = nn.Parameter(torch.empty(len(self.ties), m_in, m_out))
        self.bias = nn.Parameter(torch.zeros(m_out)) if bias else None
        # An output sums over `cosets` copies of m_in channels, not over the whole token.
        bound = gain / math.sqrt(self.layout.cosets * m_in)
        nn.init.uniform_(self.coefficient, -bound, bound)

    def weight(self) -> Float[Tensor, "slot coset*m_in coset*m_out"]:
        """Expand the coefficients to blocks, one per slot."""
        return self._keep("weight", lambda: _join(_expand(self.ties, self.coefficient)))

    def forward(
        self, x: Float[Tensor, "slot *axes coset*m_in"]
    ) -> Float[Tensor, "slot *axes coset*m_out"]:
        """Map every token, in the dtype of `x`."""
        if self.layout.split and on_cpu.applies_to(x):
            return self._multiply_by_irrep(x.flatten(1, -2)).view(*x.shape[:-1], -1)
        y = self.multiply(x)
        if self.bias is not None:
            # Not baddbmm: on CUDA it writes the bias to the whole output first, compiled too.
            token = self.bias.view([1] * (x.ndim - 2) + [-1])
            y = y + embed_invariant(self.layout, token).to(y.dtype)
        return y

    def multiply(
        self, x: Float[Tensor, "slot *axes coset*m_in"]
    ) -> Float[Tensor, "slot *axes coset*m_out"]:
        """Map every token, without the bias."""
        flat = x.flatten(1, -2)
        return torch.bmm(flat, self.weight().to(flat.dtype)).view(*x.shape[:-1], -1)

    def _multiply_by_irrep(self, x: Tensor) -> Tensor:
        """Do without the zeros of the first slots' blocks."""
        split, cosets = self.layout.split, self.layout.cosets

        def expand() -> tuple[Tensor, Tensor]:
            signs = self.ties[:, :split].diagonal(dim1=2, dim2=3)
            others = _join(_expand(self.ties[:, split:], self.coefficient))
            return _expand(signs, self.coefficient), others

        irreps, others = self._keep("irreps", expand)
        bias = None if self.bias is None else self.bias.to(x.dtype) * math.sqrt(cosets)
        return on_cpu.multiply(x, irreps.to(x.dtype), others.to(x.dtype), bias)


class Lift(Expanding):
    """An equivariant linear map from a signed permutation representation R to tokens.

    The weight w has one row per channel. Component g of the regular feature is w R(g)^-1 x, so that
    R(h) x has in component g what x has in h^-1 g; every equivariant map has this form. One class
    serves patches (R permutes pixels), latents (R = rho) and positions.

    Args:
        group: Group that acts.
        source: Indices (len(group), n), with (R(g) x)[i] = sign[g, i] * x[source[g, i]].
        sign: Signs (len(group), n).
        m: Number of channels of the tokens.
        fan_in: Number of terms in the sum of an output, for initialisation.
    """

    source: Tensor
    sign: Tensor
    fourier: Tensor

    def __init__(self, group: Group, source: Tensor, sign: Tensor, m: int, fan_in: int):
        super().__init__()
        self.layout = layout_of(group)
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("sign", sign, persistent=False)
        self.register_buffer("fourier", self.layout.fourier, persistent=False)
        self.coefficient = nn.Parameter(torch.empty(m, source.shape[1]))
        nn.init.uniform_(self.coefficient, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def weight(self) -> Float[Tensor, "slot n coset*m"]:
        """Return the map as one matrix per slot."""
        return self._keep("weight", self._expand)

    def _expand(self) -> Tensor:
        m, n = self.coefficient.shape
        regular = self.coefficient[:, self.source] * self.sign  # w R(g)^-1: (m, element, n)
        fourier = convert_fourier(self.fourier, regular.dtype)
        with no_autocast(regular):  # a weight is rounded once, in use
            slots = torch.einsum("sg,mgn->snm", fourier, regular)
        slots = slots.view(self.layout.slots, self.layout.cosets, n, m)
        return slots.transpose(1, 2).flatten(2)

    def forward(self, x: Float[Tensor, "*axes n"]) -> Float[Tensor, "slot *axes coset*m"]:
        """Map vectors on which R acts to tokens, in the dtype of `x`."""
        weight = self.weight().to(x.dtype)
        return torch.matmul(x.flatten(0, -2), weight).view(len(weight), *x.shape[:-1], -1)

    def back(self, x: Float[Tensor, "slot *axes coset*m"]) -> Float[Tensor, "*axes n"]:
        """Apply the transposed map, from tokens to vectors on which R acts."""
        weight = self.weight().to(x.dtype)
        return torch.bmm(x.flatten(1, -2), weight.mT).sum(0).view(*x.shape[1:-1], -1)


def normalize(
    x: Float[Tensor, "slot *axes features"], eps: float = 1e-5
) -> Float[Tensor, "slot *axes features"]:
    """Divide each token by its root mean square, which the orthogonal action leaves unchanged.

    RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467) without gain, computed in float32 or wider.
    `eps` is added to the mean square, so that a token of zeros stays zero.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    square = wide.square().mean((0, -1), keepdim=True)
    return x * torch.rsqrt(square + eps).to(x.dtype)


class Nonlinearity(nn.Module):
    """ReLU in the regular basis, where the group permutes features."""

    fourier: Tensor

    def __init__(self, group: Group):
        super().__init__()
        self.layout = layout_of(group)
        self.register_buffer("fourier", self.layout.fourier, persistent=False)

    def forward(
        self, x: Float[Tensor, "slot *axes m_in"], inward: Linear | None = None
    ) -> Float[Tensor, "slot *axes features"]:
        """Apply the nonlinearity to every token.

        Args:
            x: Tokens.
            inward: Linear map to apply first; on CUDA the kernel adds its bias and saves a pass.
        """
        trivial, layout = len(self.fourier) == 1, self.layout
        activate = None if trivial else on_gpu.find_kernel(x)
        if activate is not None:
            if inward is None:
                return activate(x, layout.cosets, layout.split)
            return activate(inward.multiply(x), layout.cosets, layout.split, inward.bias)
        x = x if inward is None else inward(x)
        if trivial:
            return F.relu(x)
        if on_cpu.applies_to(x):
            fourier = convert_fourier(self.fourier, x.dtype)
            return on_cpu.relu_in_regular(x.flatten(1, -2), fourier).view(x.shape)
        return from_regular(self.fourier, F.relu(to_regular(self.fourier, x)), len(x))


class Mlp(nn.Sequential):
    """A linear map to `hidden` channels, the nonlinearity, and a linear map back."""

    def __init__(self, group: Group, m: int, hidden: int):
        super().__init__(Linear(group, m, hidden), Nonlinearity(group), Linear(group, hidden, m))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "slot *axes coset*m"]
    ) -> Float[Tensor, "slot *axes coset*m"]:
        """Map every token."""
        inward, nonlinearity, outward = self
        return outward(nonlinearity(x, inward))


class Attention(nn.Module):
    """Self-attention: heads split the channels; inner products of tokens are invariant.

    Args:
        group: Group that acts.
        m: Number of channels of the tokens.
        num_heads: Number of heads; divides m.
    """

    def __init__(self, group: Group, m: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.inward = Linear(group, m, 3 * m)
        self.outward = Linear(group, m, m)

    def forward(
        self, x: Float[Tensor, "slot batch token coset*m"]
    ) -> Float[Tensor, "slot batch token coset*m"]:
        """Attend from every token to all tokens of its example."""
        slots, batch, tokens, width = x.shape
        inward, cosets = self.inward(x), self.inward.layout.cosets
        shape = (slots, batch, tokens, cosets, 3, self.num_heads, -1)
        if slots > 1 and on_cpu.applies_to(x):
            query, key, value = on_cpu.split_heads(inward.view(shape))
            mixed = F.scaled_dot_product_attention(query, key, value)
            mixed = on_cpu.merge_heads(mixed, slots, cosets)
            return self.outward(mixed)
        split = inward.view(shape).permute(4, 1, 5, 2, 0, 3, 6)
        query, key, value = split.flatten(-3)  # (batch, head, token, slot * coset * channel)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = torch.unflatten(mixed, -1, (slots, cosets, -1)).permute(3, 0, 2, 4, 1, 5)
        return self.outward(mixed.reshape(slots, batch, tokens, width))


class Offset(nn.Module):
    """Adds a learned vector: a block's own part of a modulation that all blocks share."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Float[Tensor, "batch size"]) -> Float[Tensor, "batch size"]:
        """Add the vector."""
        return x + self.bias


class Recomputing(nn.Module):
    """A block of a network: its residual stream in, and out again.

    Attributes:
        recomputes: Whether backward computes the block's activations again, to save memory.
    """

    recomputes = False

    def forward(self, x: Tensor, condition: Tensor | None = None, *sizes: int) -> Tensor:
        """Apply the block to tokens; `condition` is ignored by a block that is not modulated.

        Args:
            x: Tokens (slot, batch, token, coset * m).
            condition: Condition (batch, conditioning), if the block is modulated.
            sizes: Height and width of the grid of tokens, if the block needs them.
        """
        if self.recomputes and torch.is_grad_enabled():
            return cast(
                Tensor, checkpoint(self.apply_block, x, condition, *sizes, use_reentrant=False)
            )
        return self.apply_block(x, condition, *sizes)

    def apply_block(self, x: Tensor, condition: Tensor | None, *sizes: int) -> Tensor:
        """Apply the block, keeping all activations."""
        raise NotImplementedError


class Block(Recomputing):
    """A transformer block; with `conditioning`, scaled, shifted and gated by invariants.

    Source: adaLN-Zero (Peebles & Xie 2023, arXiv:2212.09748); shared by all blocks up to an offset
    in PixArt (Chen et al. 2023, arXiv:2310.00426).

    Args:
        group: Group that acts.
        m: Number of channels of the tokens.
        num_heads: Number of attention heads; divides m.
        mlp_ratio: Ratio of the hidden channels of the MLP to m.
        conditioning: Width of the condition; 0 for none.
        shared: Whether the condition is already the modulation, made once for all blocks, of
            `modulation_sizes` in total.
        attention: Attention between tokens; None for `Attention`.
        mlp: Map of each token; None for `Mlp`.
    """

    def __init__(
        self,
        group: Group,
        m: int,
        num_heads: int,
        mlp_ratio: int,
        conditioning: int = 0,
        shared: bool = False,
        attention: nn.Module | None = None,
        mlp: nn.Sequential | None = None,
    ):
        super().__init__()
        self.layout = layout_of(group)
        self.m = m
        self.attention = attention or Attention(group, m, num_heads)
        self.mlp = mlp or Mlp(group, m, mlp_ratio * m)
        self.modulation = None
        if conditioning:
            self.sizes = modulation_sizes(group, m)
            self.modulation = Offset(sum(self.sizes))
            if not shared:
                self.modulation = zero_linear(conditioning, sum(self.sizes))

    def apply_block(
        self,
        x: Float[Tensor, "slot batch token coset*m"],
        condition: Float[Tensor, "batch conditioning"] | None,
        *sizes: int,
    ) -> Float[Tensor, "slot batch token coset*m"]:
        """Apply the block; attention needs no sizes of a grid."""
        if self.modulation is None:
            x = x + self.attention(normalize(x))
            return x + self.mlp(normalize(x))
        parts = self.modulation(condition).split(self.sizes, -1)
        scale1, gate1, scale2, gate2 = (spread_gains(self.layout, parts[i]) for i in (0, 1, 3, 4))
        shift1, shift2 = (embed_invariant(self.layout, parts[i])[:, :, None] for i in (2, 5))
        attended = self.attention(torch.addcmul(shift1, normalize(x), 1 + scale1))
        x = torch.addcmul(x, gate1, attended)
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, normalize(x), 1 + scale2)))


def modulation_sizes(group: Group, m: int) -> list[int]:
    """Return the sizes of scale, gate and shift of attention, then of the MLP, in a modulation."""
    gains = layout_of(group).gains
    return [gains * m, gains * m, m] * 2


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear map that is zero at first: zero gates make every block the identity."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def patch_action(
    group: Group, side: int, channels: int
) -> tuple[Int[Tensor, "element n"], Float[Tensor, "element n"]]:
    """Return source and sign, as `Lift` takes them, of the action on a patch of pixels.

    The patch is side x side and flattened as (channel, row, column); all signs are 1.
    """
    source = grid_sources(group, side, side)
    offsets = torch.arange(channels)[:, None] * side * side
    source = (source[:, None] + offsets).flatten(1)
    return source, torch.ones(source.shape)


def latent_action(
    group: Group, representation: Representation
) -> tuple[Int[Tensor, "element dim"], Float[Tensor, "element dim"]]:
    """Return source and sign, as `Lift` takes them, of rho restricted to the elements of `group`.

    Raises:
        ValueError: An element of `group` is not in the group of the representation.
    """
    rows = [representation.group.index(element) for element in group]
    source, sign = representation.tables(torch.device("cpu"))
    return source[rows], sign[rows]
