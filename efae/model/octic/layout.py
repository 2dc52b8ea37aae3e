"""The memory layout of octic tokens: slots and cosets, in which linear maps are block diagonal.

A token carries m copies of the group's regular representation: one number per channel and group
element. Take as basis the characters of the group's flips (its part of {e, rot180, flip_h,
flip_v}). In it every group element is a signed permutation, and an equivariant linear map is block
diagonal. So tokens are one tensor (slot, batch, token, coset * m): one slot per character, one
coset index per coset of the flips, the channel fastest. For D4 there are 4 slots and 2 cosets (the
flips, and the flips times transpose):

    slot 0 = (A1, B1)   slot 1 = (B2, A2)   slots 2, 3 = the two axes of E

Where sum and difference of the two cosets are irreps, as in slots 0 and 1, they take the place of
the cosets: a linear map does not mix them either. The trivial group has 1 slot and 1 coset. Source
of the blocks: Octic Vision Transformers (Nordström, Edstedt, Kahl, Bökman 2025, arXiv:2505.15441);
this slot layout is ours.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from efae.symmetry.group import D4, FLIPS, Element, Group

# By row, the characters of {identity, rot180, flip_h, flip_v}: each is +-1 and multiplicative.
_FLIP_NAMES = ("identity", "rot180", "flip_h", "flip_v")
_CHARACTERS = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of a group's regular features in slots and cosets.

    Attributes:
        group: Group that acts.
        slots: Number of blocks of a linear map, one per character of the group's flips.
        cosets: Number of copies that a block holds, one per coset of the flips.
        split: Number of leading slots whose copies are separate irreps, which no linear map mixes.
        fourier: Matrix (slots * cosets, len(group)), orthogonal: regular basis -> slots. The
            non-zero entries of a row have one size.
        ties: Signs (coefficients, slots, cosets, cosets) of each free coefficient of a linear map
            in the entries of its blocks; 0 where it does not occur.
        gain_of: Index of the free gain that scales each feature, by slot and coset.
    """

    group: Group
    slots: int
    cosets: int
    split: int
    fourier: Tensor
    ties: Tensor
    gain_of: tuple[tuple[int, ...], ...]

    @property
    def gains(self) -> int:
        """Number of free gains per channel."""
        return max(map(max, self.gain_of)) + 1


@functools.cache
def layout_of(group: Group) -> Layout:
    """Compute the layout of a group; averaging over the group finds the maps that commute with it.

    Cached, on the CPU and in float32: do not modify its tensors.
    """
    # For training and on every device, too, whatever the mode in which it is computed first.
    with torch.inference_mode(False), torch.device("cpu"):
        return _find_layout(group)


def _find_layout(group: Group) -> Layout:
    flips = [D4[name] for name in _FLIP_NAMES if any(D4[name] == g for g in group)]
    columns = [_FLIP_NAMES.index(g.name) for g in flips]
    characters = list(dict.fromkeys(tuple(row[i] for i in columns) for row in _CHARACTERS))
    turns = [g for g in group if g not in list(FLIPS)]
    # Prefer transpose as the representative of the second coset: it is its own inverse, and so
    # moves features without a sign.
    cosets = [group.identity, *sorted(turns, key=lambda g: g.name != "transpose")[:1]]
    slots, hadamard = len(flips), torch.tensor(characters)  # of norm sqrt(slots)
    fourier = torch.zeros(slots, len(cosets), len(group), dtype=torch.float32)
    for coset, representative in enumerate(cosets):
        for row, flip in enumerate(flips):
            fourier[:, coset, group.index(flip @ representative)] = hadamard[:, row]
    fourier = fourier.flatten(0, 1)
    actions = torch.stack([fourier @ _regular_matrix(group, g) @ fourier.T / slots for g in group])
    block = torch.eye(slots, dtype=torch.bool)
    block = block.repeat_interleave(len(cosets), 0).repeat_interleave(len(cosets), 1)
    numbers = range(len(group))
    ties = _find_commuting(actions, [(i, j) for i in numbers for j in numbers if block[i, j]])
    gains = _find_commuting(actions, [(i, i) for i in numbers])
    gain_of = gains.diagonal(dim1=1, dim2=2).argmax(0).view(slots, len(cosets))
    ties = ties.view(-1, slots, len(cosets), slots, len(cosets)).diagonal(dim1=1, dim2=3)
    ties, split = ties.movedim(-1, 1).clone(), 0
    if len(cosets) == 2:
        irreps = torch.tensor([[1, 1], [1, -1]]).to(ties)  # sum and difference, of norm sqrt(2)
        rotated = irreps @ ties @ irreps / 2
        while not rotated[:, split, [0, 1], [1, 0]].any():
            split += 1
        ties[:, :split] = rotated[:, :split]
        fourier = fourier.view(slots, 2, -1)
        fourier[:split] = irreps @ fourier[:split]
        fourier = fourier.flatten(0, 1)
    return Layout(
        group,
        slots,
        len(cosets),
        split,
        F.normalize(fourier, dim=1),
        ties,
        tuple(tuple(int(gain) for gain in row) for row in gain_of),
    )


def _regular_matrix(group: Group, g: Element) -> Tensor:
    """Return the action of g on the regular basis: component u becomes component g u."""
    matrix = torch.zeros(len(group), len(group), dtype=torch.float32)
    for column, u in enumerate(group):
        matrix[group.index(g @ u), column] = 1
    return matrix


def _find_commuting(actions: Tensor, entries: list[tuple[int, int]]) -> Tensor:
    """Find a basis (n, d, d), of entries 0 and +-1, of the matrices that commute with the actions.

    Only matrices with a non-zero entry at one of `entries` are returned. As the actions are signed
    permutations, all non-zero entries of the average of A E A^T, for an elementary matrix E, have
    one size, and two averages have either the same non-zero entries or none in common.
    """
    found: list[Tensor] = []
    for i, j in entries:
        if any(tie[i, j] for tie in found):
            continue
        elementary = torch.zeros_like(actions[0])
        elementary[i, j] = 1
        average = (actions @ elementary @ actions.mT).mean(0)
        if average[i, j] > 1e-6:
            found.append((average / average[i, j]).round())
    return torch.stack(found)


def convert_fourier(
    fourier: Float[Tensor, "slot*coset element"], dtype: torch.dtype
) -> Float[Tensor, "slot*coset element"]:
    """Return a layout's `fourier`, orthogonal to the precision of another dtype.

    The entries 1 / sqrt(8) of float32 would limit float64 to 8 digits.
    """
    return F.normalize(fourier.to(dtype), dim=1)


def to_regular(
    fourier: Float[Tensor, "slot*coset element"], x: Float[Tensor, "slot *axes coset*m"]
) -> Float[Tensor, "element *axes m"]:
    """Map tokens to the regular basis: one number per channel and element.

    `fourier` is that of the layout, on the device of `x`.
    """
    split = torch.unflatten(x, -1, (len(fourier) // len(x), -1)).movedim(-2, 1).flatten(0, 1)
    return (convert_fourier(fourier, x.dtype).t() @ split.flatten(1)).view(split.shape)


def from_regular(
    fourier: Float[Tensor, "slot*coset element"], x: Float[Tensor, "element *axes m"], slots: int
) -> Float[Tensor, "slot *axes coset*m"]:
    """Invert `to_regular`."""
    split = (convert_fourier(fourier, x.dtype) @ x.flatten(1)).view(slots, -1, *x.shape[1:])
    return split.movedim(1, -2).flatten(-2)


def embed_invariant(
    layout: Layout, values: Float[Tensor, "*axes m"]
) -> Float[Tensor, "slot *axes coset*m"]:
    """Embed invariants as tokens, in A1."""
    padding = (0, (layout.cosets - 1) * values.shape[-1])
    scaled = values[None] * math.sqrt(layout.cosets)
    return F.pad(scaled, padding + (0, 0) * (values.ndim - 1) + (0, layout.slots - 1))


def take_invariant(
    layout: Layout, x: Float[Tensor, "slot *axes coset*m"]
) -> Float[Tensor, "*axes m"]:
    """Return the A1 part of tokens, which no element changes."""
    return x[0, ..., : x.shape[-1] // layout.cosets]


def spread_gains(
    layout: Layout, gains: Float[Tensor, "batch gains*m"]
) -> Float[Tensor, "slot batch 1 coset*m"]:
    """Spread invariant gains to factors on tokens.

    Features that an element exchanges share a gain. For D4 also the two irreps of slots 0 and 1 do,
    and slots 2 and 3 with their cosets swapped.
    """
    # Stacked, not indexed: an index tensor on the host would make every call wait for the device.
    by_gain = torch.unflatten(gains, -1, (layout.gains, -1)).unbind(1)  # each (b, m)
    slots = [torch.cat([by_gain[i] for i in row], -1) for row in layout.gain_of]
    return torch.stack(slots)[:, :, None]
