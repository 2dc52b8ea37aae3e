"""Layers that commute with a group of flips and quarter turns: octic layers.

A token carries m copies of the group's regular representation, that is one number per channel and
group element. Written in the basis of the characters of its flips (its part of {e, rot180, flip_h,
flip_v}) every group element only signs and permutes, and a linear map falls into blocks. So tokens
are one tensor (slot, batch, token, m * coset): a slot per character, a coset per coset of the
flips, the coset fastest. For D4 there are 4 slots and 2 cosets (the flips, and the flips times
transpose):

    slot 0 = (A1, B1)   slot 1 = (B2, A2)   slots 2, 3 = the two axes of E

With the trivial group (1 slot, 1 coset) the same classes are ordinary dense layers; that is how
the dense twins of encoder and decoder are made. Source: Octic Vision Transformers (Nordström,
Edstedt, Kahl, Bökman 2025, arXiv:2505.15441); this slot layout is ours.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from efae.symmetry.group import D4, FLIPS, Element, Group, grid_sources
from efae.symmetry.representation import Representation

# By row, the characters of {identity, rot180, flip_h, flip_v}: each is +-1 and multiplicative.
_FLIP_NAMES = ("identity", "rot180", "flip_h", "flip_v")
_CHARACTERS = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))


@dataclass(frozen=True, eq=False)
class Layout:
    """How regular features of a group are laid out in slots and cosets.

    Attributes:
        group: the group.
        slots: blocks of a linear map, one per character of the group's flips.
        cosets: copies that a block mixes, one per coset of the flips.
        hadamard: (slots, slots), orthogonal and symmetric: slots <-> flips.
        fourier: (slots * cosets, len(group)), orthogonal: regular basis -> slots.
        ties: (coefficients, slots * cosets * cosets): the free numbers of a linear map, spread
            over its blocks with their signs.
        gain_of: (slots, cosets), which free gain scales a feature.
    """

    group: Group
    slots: int
    cosets: int
    hadamard: Tensor
    fourier: Tensor
    ties: Tensor
    gain_of: Tensor

    @property
    def gains(self) -> int:
        """Free gains per channel."""
        return int(self.gain_of.max()) + 1


@functools.cache
def layout_of(group: Group) -> Layout:
    """The layout of a group, with the maps that commute with it found by averaging over it.

    Cached, on the CPU and in float32: do not modify its tensors.
    """
    flips = [D4[name] for name in _FLIP_NAMES if any(D4[name] == g for g in group)]
    columns = [_FLIP_NAMES.index(g.name) for g in flips]
    characters = list(dict.fromkeys(tuple(row[i] for i in columns) for row in _CHARACTERS))
    turns = [g for g in group if g not in list(FLIPS)]
    # transpose, where there is one, is its own inverse and so moves features without a sign.
    cosets = [group.identity, *sorted(turns, key=lambda g: g.name != "transpose")[:1]]
    slots, hadamard = len(flips), torch.tensor(characters) / math.sqrt(len(flips))
    fourier = torch.zeros(slots, len(cosets), len(group))
    for coset, representative in enumerate(cosets):
        for row, flip in enumerate(flips):
            fourier[:, coset, group.index(flip @ representative)] = hadamard[:, row]
    fourier = fourier.flatten(0, 1)
    actions = torch.stack([fourier @ _regular_matrix(group, g) @ fourier.T for g in group])
    block = torch.eye(slots).repeat_interleave(len(cosets), 0).repeat_interleave(len(cosets), 1)
    numbers = range(len(group))
    ties = _find_commuting(actions, [(i, j) for i in numbers for j in numbers if block[i, j]])
    gains = _find_commuting(actions, [(i, i) for i in numbers])
    ties = ties.view(-1, slots, len(cosets), slots, len(cosets)).diagonal(dim1=1, dim2=3)
    return Layout(
        group,
        slots,
        len(cosets),
        hadamard,
        fourier,
        ties.movedim(-1, 1).flatten(1),
        gains.diagonal(dim1=1, dim2=2).argmax(0).view(slots, len(cosets)),
    )


def _regular_matrix(group: Group, g: Element) -> Tensor:
    """The action of g on the regular basis: component u becomes component g u."""
    matrix = torch.zeros(len(group), len(group))
    for column, u in enumerate(group):
        matrix[group.index(g @ u), column] = 1
    return matrix


def _find_commuting(actions: Tensor, entries: list[tuple[int, int]]) -> Tensor:
    """Matrices (n, d, d) of entries 0 and +-1 that commute with the actions and span such entries.

    The actions are signed permutations, so the average of A E A^T for an elementary matrix E has
    all its non-zero entries of one size, and two averages have the same ones or none in common.
    """
    found: list[Tensor] = []
    for i, j in entries:
        if any(tie[i, j] for tie in found):
            continue
        elementary = torch.zeros(actions.shape[1:])
        elementary[i, j] = 1
        average = (actions @ elementary @ actions.mT).mean(0)
        if average[i, j] > 1e-6:
            found.append((average / average[i, j]).round())
    return torch.stack(found)


class Linear(nn.Module):
    """Every equivariant linear map between tokens: 8 coefficients per channel pair for D4.

    Args:
        group: the group.
        m_in: channels of the tokens that come in.
        m_out: channels of those that go out.
        bias: whether to add a learned token, which can only be on A1.
        gain: factor on the initial coefficients; 1 keeps about a third of the variance, as
            `nn.Linear` does.
    """

    ties: Tensor

    def __init__(self, group: Group, m_in: int, m_out: int, bias: bool = True, gain: float = 1.0):
        super().__init__()
        self.layout = layout_of(group)
        self.m_in, self.m_out = m_in, m_out
        self.register_buffer("ties", self.layout.ties, persistent=False)
        self.coefficient = nn.Parameter(torch.empty(len(self.ties), m_in, m_out))
        self.bias = nn.Parameter(torch.zeros(m_out)) if bias else None
        # An output sums over `cosets` copies of m_in channels, not over the whole token.
        bound = gain / math.sqrt(self.layout.cosets * m_in)
        nn.init.uniform_(self.coefficient, -bound, bound)

    def weight(self) -> Float[Tensor, "slot m_in*coset m_out*coset"]:
        """The blocks, one per slot."""
        slots, cosets = self.layout.slots, self.layout.cosets
        blocks = (self.ties.t() @ self.coefficient.flatten(1)).view(
            slots, cosets, cosets, self.m_in, self.m_out
        )
        return blocks.permute(0, 3, 1, 4, 2).reshape(slots, self.m_in * cosets, self.m_out * cosets)

    def forward(
        self, x: Float[Tensor, "slot *axes m_in*coset"]
    ) -> Float[Tensor, "slot *axes m_out*coset"]:
        """The map of every token, in the dtype of `x`."""
        flat = x.flatten(1, -2)
        if self.bias is None:
            y = torch.bmm(flat, self.weight().to(flat.dtype))
        else:
            bias = embed_invariant(self.layout, self.bias)[:, None]  # (slot, 1, m_out * coset)
            y = torch.baddbmm(bias.to(flat.dtype), flat, self.weight().to(flat.dtype))
        return y.view(*x.shape[:-1], -1)


class Lift(nn.Module):
    """Every equivariant linear map between a signed permutation representation R and tokens.

    The weight w has one row per channel; component g of the regular feature is w R(g)^-1, so
    one class serves patches (R permutes pixels), latents (R = rho) and positions.

    Args:
        group: the group.
        source: (len(group), n), with (R(g) x)[i] = sign[g, i] * x[source[g, i]].
        sign: (len(group), n).
        m: channels of the token.
        fan_in: how many terms an output sums, for initialisation.
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

    def weight(self) -> Float[Tensor, "slot n m*coset"]:
        """The map as one matrix per slot."""
        m, n = self.coefficient.shape
        regular = self.coefficient[:, self.source] * self.sign  # (m, element, n)
        slots = torch.einsum("sg,mgn->snm", self.fourier, regular)
        slots = slots.view(self.layout.slots, self.layout.cosets, n, m)
        return slots.permute(0, 2, 3, 1).reshape(self.layout.slots, n, m * self.layout.cosets)

    def forward(self, x: Float[Tensor, "*axes n"]) -> Float[Tensor, "slot *axes m*coset"]:
        """Vectors on which R acts to tokens, in the dtype of `x`."""
        weight = self.weight().to(x.dtype)
        return torch.matmul(x.flatten(0, -2), weight).view(len(weight), *x.shape[:-1], -1)

    def back(self, x: Float[Tensor, "slot *axes m*coset"]) -> Float[Tensor, "*axes n"]:
        """The transposed map."""
        weight = self.weight().to(x.dtype)
        return torch.bmm(x.flatten(1, -2), weight.mT).sum(0).view(*x.shape[1:-1], -1)


def embed_invariant(
    layout: Layout, values: Float[Tensor, "*axes m"]
) -> Float[Tensor, "slot *axes m*coset"]:
    """Invariants as tokens: all in A1, the same in each coset of slot 0."""
    spread = values[..., None].expand(*values.shape, layout.cosets).flatten(-2)
    return F.pad(spread[None], (0, 0) * values.ndim + (0, layout.slots - 1))


def take_invariant(
    layout: Layout, x: Float[Tensor, "slot *axes m*coset"]
) -> Float[Tensor, "*axes m"]:
    """The A1 part of tokens: what no element changes."""
    return torch.unflatten(x[0], -1, (-1, layout.cosets)).sum(-1) / math.sqrt(layout.cosets)


def spread_gains(
    layout: Layout, gains: Float[Tensor, "batch gains*m"]
) -> Float[Tensor, "slot batch 1 m*coset"]:
    """Invariant gains as factors on tokens.

    What an element exchanges shares a gain: for D4 the two cosets of slots 0 and 1, and slots 2
    and 3 with their cosets swapped.
    """
    by_gain = torch.unflatten(gains, -1, (layout.gains, -1))
    spread = by_gain[:, layout.gain_of]  # (b, slot, coset, m)
    return spread.permute(1, 0, 3, 2).flatten(2)[:, :, None]


def normalize(
    x: Float[Tensor, "slot *axes features"], eps: float = 1e-5
) -> Float[Tensor, "slot *axes features"]:
    """RMS norm over the whole token: the action is orthogonal, so the norm is invariant.

    The norm is taken in float32 at least (Zhang & Sennrich 2019, arXiv:1910.07467, with no gain);
    `eps` is added to the mean square, so a token of zeros stays one.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    square = wide.square().mean((0, -1), keepdim=True)
    return x * torch.rsqrt(square + eps).to(x.dtype)


class Nonlinearity(nn.Module):
    """ReLU in the regular basis, where the group permutes: Hadamard, pointwise, Hadamard."""

    hadamard: Tensor

    def __init__(self, group: Group):
        super().__init__()
        self.register_buffer("hadamard", layout_of(group).hadamard, persistent=False)

    def forward(
        self, x: Float[Tensor, "slot *axes features"]
    ) -> Float[Tensor, "slot *axes features"]:
        """The nonlinearity of every token."""
        if len(self.hadamard) == 1:
            return F.relu(x)
        hadamard = self.hadamard.to(x.dtype)
        return (hadamard @ F.relu(hadamard @ x.flatten(1))).view(x.shape)


class Attention(nn.Module):
    """Self-attention: heads split the channels; inner products of tokens are invariant.

    Args:
        group: the group.
        m: channels of the tokens.
        num_heads: divides m.
    """

    def __init__(self, group: Group, m: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.inward = Linear(group, m, 3 * m)
        self.outward = Linear(group, m, m)

    def forward(
        self, x: Float[Tensor, "slot batch token m*coset"]
    ) -> Float[Tensor, "slot batch token m*coset"]:
        """Every token of an example looks at all of that example."""
        slots, batch, tokens, width = x.shape
        split = self.inward(x).view(slots, batch, tokens, 3, self.num_heads, -1)
        query, key, value = split.permute(3, 1, 4, 2, 0, 5).flatten(-2)  # (batch, head, token, ·)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = torch.unflatten(mixed, -1, (slots, -1)).permute(3, 0, 2, 1, 4)
        return self.outward(mixed.reshape(slots, batch, tokens, width))


class Block(nn.Module):
    """A transformer block; with `conditioning`, scaled, shifted and gated by invariants.

    Source: adaLN-Zero (Peebles & Xie 2023, arXiv:2212.09748).

    Args:
        group: the group.
        m: channels of the tokens.
        num_heads: of the attention; divides m.
        mlp_ratio: hidden channels of the MLP over m.
        conditioning: width of the condition; 0 for none.
    """

    def __init__(self, group: Group, m: int, num_heads: int, mlp_ratio: int, conditioning: int = 0):
        super().__init__()
        self.layout = layout_of(group)
        self.m = m
        self.attention = Attention(group, m, num_heads)
        self.mlp = nn.Sequential(
            Linear(group, m, mlp_ratio * m), Nonlinearity(group), Linear(group, mlp_ratio * m, m)
        )
        self.modulation = None
        if conditioning:
            self.sizes = [self.layout.gains * m, self.layout.gains * m, m] * 2
            self.modulation = nn.Linear(conditioning, sum(self.sizes))
            # Zero gates make every block the identity at first.
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Float[Tensor, "slot batch token m*coset"],
        condition: Float[Tensor, "batch conditioning"] | None = None,
    ) -> Float[Tensor, "slot batch token m*coset"]:
        """One block; `condition` is needed if there is `conditioning`, and else ignored."""
        if self.modulation is None:
            x = x + self.attention(normalize(x))
            return x + self.mlp(normalize(x))
        parts = self.modulation(condition).split(self.sizes, -1)
        scale1, gate1, scale2, gate2 = (spread_gains(self.layout, parts[i]) for i in (0, 1, 3, 4))
        shift1, shift2 = (embed_invariant(self.layout, parts[i])[:, :, None] for i in (2, 5))
        x = x + gate1 * self.attention(normalize(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(normalize(x) * (1 + scale2) + shift2)


def patch_action(
    group: Group, side: int, channels: int
) -> tuple[Int[Tensor, "element n"], Float[Tensor, "element n"]]:
    """Source and sign, as `Lift` takes them, of the action on a patch of pixels.

    The patch is side x side and flattened as (channel, row, column); all signs are 1.
    """
    source = grid_sources(group, side, side)
    offsets = torch.arange(channels)[:, None] * side * side
    source = (source[:, None] + offsets).flatten(1)
    return source, torch.ones(source.shape)


def latent_action(
    group: Group, representation: Representation
) -> tuple[Int[Tensor, "element dim"], Float[Tensor, "element dim"]]:
    """Source and sign, as `Lift` takes them, of rho restricted to the elements of `group`.

    Raises:
        ValueError: the group holds an element that the representation's group does not.
    """
    rows = [representation.group.index(element) for element in group]
    source, sign = representation.tables(torch.device("cpu"))
    return source[rows], sign[rows]


class Resample(nn.Module):
    """Merge ratio x ratio tokens into one (space to depth), or the reverse, equivariantly.

    In the regular basis component g of a token at offset p is filed under the offset q with
    p = g q; filed so, the ratio^2 tokens are ratio^2 * m plain regular channels.

    Args:
        group: the group.
        ratio: side of the square of tokens that become one.
    """

    goes_to: Tensor
    fourier: Tensor

    def __init__(self, group: Group, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.layout = layout_of(group)
        # act_on_grid moves the cell at source to p; g q is where the cell q goes.
        goes_to = grid_sources(group, ratio, ratio).argsort(-1)
        self.register_buffer("goes_to", goes_to, persistent=False)
        self.register_buffer("fourier", self.layout.fourier, persistent=False)

    def merge(
        self, x: Float[Tensor, "slot batch token m*coset"], height: int, width: int
    ) -> Float[Tensor, "slot batch token/ratio**2 ratio**2*m*coset"]:
        """Tokens of a height x width grid, row by row, to those of the grid `ratio` times coarser.

        `ratio` divides both sides.
        """
        r, batch = self.ratio, x.shape[1]
        grid = self._to_regular(x).view(
            -1, batch, height // r, r, width // r, r, x.shape[-1] // self.layout.cosets
        )
        offsets = grid.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5)  # (g, b, h, w, r * r, m)
        filed = torch.stack(
            [part[..., i, :] for part, i in zip(offsets, self.goes_to, strict=True)]
        )
        return self._from_regular(filed.flatten(-2).flatten(2, 3))

    def split(
        self,
        x: Float[Tensor, "slot batch token/ratio**2 ratio**2*m*coset"],
        height: int,
        width: int,
    ) -> Float[Tensor, "slot batch token m*coset"]:
        """The reverse of `merge`: height and width are those of the fine grid."""
        r, batch = self.ratio, x.shape[1]
        filed = self._to_regular(x).view(-1, batch, height // r, width // r, r * r, self._m(x))
        sources = self.goes_to.argsort(-1)
        offsets = torch.stack([part[..., i, :] for part, i in zip(filed, sources, strict=True)])
        grid = torch.unflatten(offsets, 4, (r, r)).permute(0, 1, 2, 4, 3, 5, 6)
        return self._from_regular(grid.reshape(-1, batch, height * width, self._m(x)))

    def _m(self, x: Tensor) -> int:
        return x.shape[-1] // self.layout.cosets // self.ratio**2

    def _to_regular(self, x: Tensor) -> Tensor:
        """(slot, ..., m * coset) -> (element, ..., m)."""
        split = torch.unflatten(x, -1, (-1, self.layout.cosets)).movedim(-1, 1).flatten(0, 1)
        return (self.fourier.t().to(x.dtype) @ split.flatten(1)).view(split.shape)

    def _from_regular(self, x: Tensor) -> Tensor:
        slots = (self.fourier.to(x.dtype) @ x.flatten(1)).view(
            self.layout.slots, self.layout.cosets, *x.shape[1:]
        )
        return slots.movedim(1, -1).flatten(-2)
