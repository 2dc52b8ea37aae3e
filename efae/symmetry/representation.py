"""Orthogonal representations of D4 on a latent's channels.

Channels are complex fields of charge m: a rotation by theta multiplies by e^{i m theta}, a mirror
conjugates. Over D4 that gives five irreps. Every real representation is a direct sum of them, up
to a change of basis, so five multiplicities describe it:

    irrep  dims   rot90   flip_h, flip_v   transpose, anti_transpose
    A1     1      +       +                +      invariant
    A2     1      +       -                -      changes sign under every mirror
    B1     1      -       +                -      changes sign under a quarter turn
    B2     1      -       -                +      changes sign under a quarter turn
    E      2      rotates the plane by 90 degrees; flip_h = diag(-1, 1), flip_v = diag(1, -1)

A latent is a grid of such vectors: (g z)(p) = rho(g) z(g^-1 p). In this basis every rho(g) is a
signed permutation, so the action is a gather and a sign.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from efae.symmetry.group import D4, Element, Group, act_on_grid

IRREPS = ("a1", "a2", "b1", "b2", "e")
_IRREP_DIMS = {"a1": 1, "a2": 1, "b1": 1, "b2": 1, "e": 2}
# Irreps that change sign, one of each class that stays distinct when restricted to the group.
_CHIRAL = {
    "D4": ("b1", "b2", "a2"),
    "C4": ("b1",),
    "flips": ("a2",),
    "mirror": ("a2",),
    "trivial": (),
}


def irrep_matrix(irrep: str, element: Element) -> Float[Tensor, "d d"]:
    """Return the matrix of an irrep in `IRREPS`, float64; d = 2 for "e", else 1."""
    turns, mirrored = element.quarter_turns, element.mirrored
    if irrep == "e":
        cosine, sine = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]
        x = -1 if mirrored else 1  # the mirror comes first and negates x
        entries = [[cosine * x, -sine], [sine * x, cosine]]
    else:
        under_turn = -1 if irrep in ("b1", "b2") else 1
        under_mirror = -1 if irrep in ("a2", "b2") else 1
        entries = [[under_turn**turns * under_mirror**mirrored]]
    return torch.tensor(entries, dtype=torch.float64)


class Representation:
    """A direct sum of irreps: channels in the order A1, A2, B1, B2, then E plane by plane.

    Args:
        group: Group that acts; the irreps of D4 are restricted to it.
        a1: Multiplicity of A1, one channel each.
        a2: Multiplicity of A2, one channel each.
        b1: Multiplicity of B1, one channel each.
        b2: Multiplicity of B2, one channel each.
        e: Multiplicity of E, two channels each.

    Attributes:
        group: Group that acts.
        multiplicities: Multiplicity by name in `IRREPS`, zeros included.

    Raises:
        ValueError: A multiplicity is not an integer >= 0, or all are 0.
    """

    def __init__(
        self, group: Group = D4, *, a1: int = 0, a2: int = 0, b1: int = 0, b2: int = 0, e: int = 0
    ):
        self.group = group
        self.multiplicities = {"a1": a1, "a2": a2, "b1": b1, "b2": b2, "e": e}
        for irrep, count in self.multiplicities.items():
            if type(count) is not int or count < 0:
                raise ValueError(f"{irrep}={count!r}: a multiplicity is an integer >= 0")
        if self.dim == 0:
            raise ValueError("a representation needs at least one channel")
        with torch.inference_mode(False), torch.device("cpu"):  # for training and all devices, too
            matrices = torch.stack([self.matrix(g) for g in group])  # (element, dim, dim)
            source = matrices.abs().argmax(-1)
            sign = matrices.gather(-1, source[..., None])[..., 0].float()
        self._tables = {source.device: (source, sign)}

    @classmethod
    def from_split(
        cls,
        *,
        group: Group = D4,
        dim: int,
        rotation_dims: int | None = None,
        chirality_split: float | None = None,
        invariant: int = 1,
    ) -> "Representation":
        """Build a representation from the number of rotating and the share of chiral channels.

        The defaults follow the group's action on pixels: half of the channels rotate, and half of
        the others change sign, as far as the group has such elements.

        Args:
            group: Group that acts.
            dim: Number of channels.
            rotation_dims: Number of channels that rotate as planes; even, at most dim.
            chirality_split: Share in [0, 1] of the other channels that change sign, rounded to
                whole channels and dealt in turn to those of B1, B2, A2 that differ under the group.
            invariant: Least number of A1 channels that the defaults leave; as many as the image
                has colours, since a flat patch is symmetric.

        Raises:
            ValueError: No representation has these numbers.
        """
        chiral_irreps = _CHIRAL[group.name]
        if rotation_dims is None:
            free = max(0, dim - invariant)
            rotation_dims = 2 * min(dim // 4, free // 2) if group.turns else 0
        if chirality_split is None:
            others = dim - rotation_dims
            chiral = min(others // 2, max(0, others - invariant)) if chiral_irreps else 0
            chirality_split = chiral / max(1, others)
        if not 0 <= rotation_dims <= dim or rotation_dims % 2:
            raise ValueError(
                f"rotation_dims={rotation_dims}: planes take two channels each, so use an even"
                f" number from 0 to dim={dim}"
            )
        if not 0 <= chirality_split <= 1:
            raise ValueError(f"chirality_split={chirality_split}: a share lies in [0, 1]")
        others = dim - rotation_dims
        chiral = round(others * chirality_split)
        if rotation_dims and not group.turns:
            raise ValueError(
                f"rotation_dims={rotation_dims}: no element of {group} rotates a plane, use 0"
            )
        if chiral and not chiral_irreps:
            raise ValueError(
                f"chirality_split={chirality_split}: no element of {group} changes a sign, use 0"
            )
        dealt = {
            irrep: (chiral + len(chiral_irreps) - 1 - i) // len(chiral_irreps)
            for i, irrep in enumerate(chiral_irreps)
        }
        return cls(group, a1=others - chiral, e=rotation_dims // 2, **dealt)

    @property
    def dim(self) -> int:
        """Number of channels of the latent."""
        return sum(_IRREP_DIMS[irrep] * count for irrep, count in self.multiplicities.items())

    @property
    def blocks(self) -> dict[str, slice]:
        """Channels of each irrep that occurs, by name."""
        blocks: dict[str, slice] = {}
        start = 0
        for irrep, count in self.multiplicities.items():
            stop = start + count * _IRREP_DIMS[irrep]
            if stop > start:
                blocks[irrep] = slice(start, stop)
            start = stop
        return blocks

    def matrix(self, element: Element) -> Float[Tensor, "dim dim"]:
        """Return rho(element), float64."""
        whole = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for irrep, channels in self.blocks.items():
            copies = torch.eye(self.multiplicities[irrep], dtype=torch.float64)
            whole[channels, channels] = torch.kron(copies, irrep_matrix(irrep, element))
        return whole

    def tables(
        self, device: torch.device
    ) -> tuple[Int[Tensor, "element dim"], Float[Tensor, "element dim"]]:
        """Return (source, sign) of every rho(g): (rho(g) z)[i] = sign[g, i] * z[source[g, i]].

        The first axis is in the order of the group; signs are +-1, float32. Cached by device, so
        do not modify.
        """
        if device not in self._tables:
            source, sign = self._tables[torch.device("cpu")]
            with torch.inference_mode(False):
                self._tables[device] = (source.to(device), sign.to(device))
        return self._tables[device]

    def act(
        self,
        element: Element | Sequence[Element] | Int[Tensor, "batch"],
        latent: Float[Tensor, "batch dim height width"],
    ) -> Float[Tensor, "batch dim rows columns"]:
        """Act on a latent, out of place: (g z)(p) = rho(g) z(g^-1 p).

        An element that `swaps_sides` turns a grid of h x w cells into one of w x h.

        Args:
            element: One element for all examples, or one per example (as elements, or as positions
                in the group). On grids that are not square, all exchange the sides or all keep
                them, and a group with quarter turns takes no positions.
            latent: Grid of channel vectors, of any range.

        Raises:
            ValueError: The latent does not have `dim` channels; an element is not in the group;
                there is not one per example; or not all of them can act on grids of this shape.
        """
        if latent.ndim != 4 or latent.shape[1] != self.dim:
            raise ValueError(
                f"latent of shape {tuple(latent.shape)}: expected (batch, {self.dim}, h, w)"
            )
        moved = act_on_grid(self.group, element, latent)
        if isinstance(element, Element):
            chosen = self.group.index(element)
        else:
            chosen = self.group.indices(element, len(latent)).to(latent.device)
        # (dim, 1, 1), or (batch, dim, 1, 1)
        source, sign = (table[chosen][..., None, None] for table in self.tables(latent.device))
        return sign.to(latent.dtype) * moved.gather(1, source.expand_as(moved))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out tables on other devices, which a pickle's reader may not have."""
        cpu = torch.device("cpu")
        return {**self.__dict__, "_tables": {cpu: self._tables[cpu]}}

    def __repr__(self) -> str:
        parts = "+".join(f"{n}{irrep.upper()}" for irrep, n in self.multiplicities.items() if n)
        return f"Representation({self.group}, {parts})"


def split_pixels(side: int) -> tuple[float, float]:
    """Return which shares of D4's action on the pixels of a patch turn planes, and change sign.

    Args:
        side: Side of the patch.
    """
    # The characters: how many pixels the identity, a turn, an upright and a diagonal mirror fix.
    every, turned = side * side, side % 2
    upright, diagonal = side * turned, side
    a2 = (every + 3 * turned - 2 * upright - 2 * diagonal) // 8
    b1 = (every - turned + 2 * upright - 2 * diagonal) // 8
    b2 = (every - turned - 2 * upright + 2 * diagonal) // 8
    planes = (every - turned) // 4
    return 2 * planes / every, (a2 + b1 + b2) / every


def group_law_error(
    group: Group, matrices: Mapping[str, Float[Tensor, "dim dim"]]
) -> tuple[float, Element, Element]:
    """Return the largest |rho(a b) - rho(a) rho(b)| entry, and the pair (a, b) where it occurs.

    It is NaN if an entry of a product is.

    Args:
        group: Group to check all pairs of.
        matrices: Matrix of each element, by name.

    Raises:
        KeyError: An element has no matrix.
    """
    worst = (-1.0, group.identity, group.identity)
    for a in group:
        for b in group:
            difference = matrices[(a @ b).name] - matrices[a.name] @ matrices[b.name]
            size = float(difference.abs().max())
            if math.isnan(size):  # compares as no larger than any number
                return size, a, b
            worst = max(worst, (size, a, b), key=lambda entry: entry[0])
    return worst


def check_representation(
    group: Group, matrices: Mapping[str, Float[Tensor, "dim dim"]], tolerance: float = 1e-6
) -> None:
    """Raise unless the matrices, one per element name, are a representation of the group.

    The usual mistake is a mirror that flips signs but leaves alone a plane that r rotates: h r h
    must be r^-1, so a mirror has to reflect every plane that a turn rotates.

    Args:
        group: Group that the matrices are to represent.
        matrices: Matrix of each element, by name, all of one size.
        tolerance: Largest accepted error of an entry of a product.

    Raises:
        ValueError: A matrix is missing, not square or not finite, their sizes differ, that of the
            identity is another one, or the group law fails; the message names the pair with the
            largest violation, and its size.
    """
    missing = [element.name for element in group if element.name not in matrices]
    if missing:
        raise ValueError(f"no matrix for {', '.join(missing)} of {group.name}")
    matrices = {name: torch.as_tensor(m, dtype=torch.float64) for name, m in matrices.items()}
    shapes = {tuple(matrix.shape) for matrix in matrices.values()}
    if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != shape[1] for shape in shapes):
        raise ValueError(f"matrices of shapes {sorted(shapes)}: all must be (dim, dim)")
    broken = [element.name for element in group if not matrices[element.name].isfinite().all()]
    if broken:
        raise ValueError(f"the matrix of {', '.join(broken)} has NaN or infinity")
    identity = matrices[group.identity.name]
    away = float((identity - torch.eye(len(identity), dtype=identity.dtype)).abs().max())
    if away > tolerance:
        raise ValueError(
            f"not a representation of {group.name}: rho({group.identity}) differs from the identity"
            f" matrix by {away:.3g}"
        )
    size, a, b = group_law_error(group, matrices)
    if size > tolerance:
        raise ValueError(
            f"not a representation of {group.name}: rho({a} @ {b}) differs from"
            f" rho({a}) rho({b}) by {size:.3g} (a mirror must reflect every plane that a quarter"
            " turn rotates, since h r h = r^-1)"
        )
