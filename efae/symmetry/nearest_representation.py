"""The representation that comes nearest to given matrices, one per element of the group.

Sought are multiplicities and an orthogonal Q with the largest sum of the inner products
<Q rho(g) Q^T, M_g> over g. For orthogonal matrices M_g, that is the nearest representation; for
moments M_g = E y_g x^T, the one that predicts y_g from x with the least squared error.

A channel q of a one-dimensional irrep with character chi adds q^T (sum_g chi(g) M_g) q to the sum,
and a plane of E adds a quadratic form of its pair (q1, q2): leading eigenvectors are a good start.
If the M_g represent the group, they are the answer. If not, the sum then rises in two ways, in
turns: Q moves along the gradient, and single channels or planes change their irrep. The result is a
local maximum; on random matrices of four channels it was always the best of all multiplicities.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from efae.symmetry.group import Group
from efae.symmetry.representation import IRREPS, Representation, irrep_matrix

_linalg = cast(Any, torch.linalg)  # has no types
_ROUNDING = 1e-12
_LEAST_GAIN = 1e-9
"""Smallest gain for which the search continues; like rounding, relative to a bound of the sum."""
_MOST_STEPS = 300
_MOST_CHANNELS = 32
"""Largest number of channels that change their irreps after the start; more would take minutes."""


def find_nearest_representation(
    group: Group, matrices: Float[Tensor, "element dim dim"], invariant: int = 0
) -> tuple[Representation, Float[Tensor, "dim dim"]]:
    """Return rho and an orthogonal Q with the largest sum of <Q rho(g) Q^T, matrices[g]> over g.

    As in `efae.symmetry.learned_basis`, Q^T maps latents to the basis of the irreps. Where the
    group does not tell two irreps apart, the first of `IRREPS` stands for both; of equally near
    representations, one with more A1 channels is chosen. Deterministic.

    Args:
        group: Group that the representation represents.
        matrices: Matrix of each element, in the order of the group.
        invariant: Least number of A1 channels.
    """
    matrices = matrices.double()
    inverses = [group.index(g.inverse) for g in group]
    # rho(g^-1) = rho(g)^T, so this changes no sum, and makes every form below symmetric.
    matrices = (matrices + matrices[inverses].mT) / 2
    search = _Search(group, matrices, invariant)
    columns, value = search.polish(search.start())
    improved = matrices.shape[-1] <= _MOST_CHANNELS
    while improved:
        improved = False
        for candidate in search.neighbours(columns):
            polished, found = search.polish(candidate)
            if found > value + _LEAST_GAIN * search.bound:
                columns, value, improved = polished, found, True
                break
    representation = Representation(group, **{name: len(found) for name, found in columns.items()})
    return representation, _join(columns)


def find_nearest_orthogonal(matrix: Float[Tensor, "*axes n k"]) -> Float[Tensor, "*axes n k"]:
    """Return the matrix with orthonormal columns that is nearest to each matrix; n >= k."""
    left, _, right = cast(tuple[Tensor, ...], _linalg.svd(matrix, full_matrices=False))
    return left @ right


_Columns = dict[str, list[Tensor]]
"""Frames (dim, 1 or 2) of orthonormal channels by irrep, in the order of `IRREPS`."""


class _Search:
    """The sum to maximise, and the steps that raise it.

    Attributes:
        irreps: Matrices (element, d, d) of the irreps that the group tells apart, by name.
        bound: Upper bound of the sum, for any representation.
    """

    def __init__(self, group: Group, matrices: Tensor, invariant: int):
        self.group, self.invariant = group, invariant
        self.matrices = matrices
        self.irreps: dict[str, Tensor] = {}
        seen: set[tuple[float, ...]] = set()
        for irrep in IRREPS:
            stacked = torch.stack([irrep_matrix(irrep, g) for g in group]).to(matrices)
            signs = cast(list[list[float]], stacked.diagonal(dim1=1, dim2=2).mT.tolist())
            diagonals = {tuple(of_channel) for of_channel in signs}
            if not diagonals <= seen:
                self.irreps[irrep] = stacked
            seen |= diagonals
        self.bound = float(_linalg.matrix_norm(matrices, "nuc").sum())
        # The steps of `polish` never lower the sum if no form below has an eigenvalue under -shift.
        forms = [self._form(irrep, matrices) for irrep in self.irreps]
        self.shift = max(0.0, *(-float(_linalg.eigvalsh(form)[0]) for form in forms))

    def start(self) -> _Columns:
        """Choose channels and planes one by one, always what adds most per channel."""
        columns: _Columns = {irrep: [] for irrep in self.irreps}
        for _ in range(self.invariant):
            columns["a1"].append(self._find_frame("a1", self._complement(columns))[1])
        while (left := self._complement(columns)).shape[1]:
            offers = [
                (irrep, *self._find_frame(irrep, left))
                for irrep, stacked in self.irreps.items()
                if stacked.shape[-1] <= left.shape[1]
            ]
            best = max(value for _, value, _ in offers)
            irrep, _, frame = next(o for o in offers if o[1] >= best - _ROUNDING * self.bound)
            columns[irrep].append(frame)
        return columns

    def polish(self, columns: _Columns) -> tuple[_Columns, float]:
        """Move all channels at once, for fixed multiplicities; returns them and the sum.

        The sum is quadratic in Q: its gradient, projected onto the orthogonal matrices, raises it.
        """
        counts = {name: len(found) for name, found in columns.items()}
        rho = Representation(self.group, **counts)
        rhos = torch.stack([rho.matrix(g) for g in self.group]).to(self.matrices)
        basis, value = _join(columns), -torch.inf
        for _ in range(_MOST_STEPS):
            gradient: Tensor = (self.matrices @ basis @ rhos.mT).sum(0)
            previous, value = value, float((gradient * basis).sum())
            if value <= previous + _LEAST_GAIN * self.bound:
                break
            basis = find_nearest_orthogonal(gradient + self.shift * basis)
        moved: _Columns = {name: [] for name in self.irreps}
        for name, channels in rho.blocks.items():
            frames = cast(Any, basis[:, channels]).split(self.irreps[name].shape[-1], dim=1)
            moved[name] = cast(list[Tensor], list(frames))
        return moved, value

    def neighbours(self, columns: _Columns) -> Iterator[_Columns]:
        """Yield the splits that differ in one channel, or in one plane for two channels."""
        weakest = {
            irrep: sorted(frames, key=lambda frame: self._value(irrep, frame))
            for irrep, frames in columns.items()
        }
        lines = [irrep for irrep in self.irreps if irrep != "e"]
        pairs = [(a, b) for i, a in enumerate(lines) for b in lines[i:]]
        swaps = [((a,), (b,)) for a in lines for b in lines if a != b]
        if "e" in self.irreps:
            swaps += [(pair, ("e",)) for pair in pairs] + [(("e",), pair) for pair in pairs]
        for removed, added in swaps:
            rest = {irrep: list(frames) for irrep, frames in weakest.items()}
            if any(len(rest[irrep]) < removed.count(irrep) for irrep in removed):
                continue
            if len(rest["a1"]) + added.count("a1") - removed.count("a1") < self.invariant:
                continue
            for irrep in removed:
                rest[irrep].pop(0)
            for irrep in added:
                rest[irrep].append(self._find_frame(irrep, self._complement(rest))[1])
            yield rest

    def _form(self, irrep: str, matrices: Tensor) -> Tensor:
        """Return the symmetric form of d stacked channels, (d k, d k), for matrices (.., k, k)."""
        size = matrices.shape[-1] * self.irreps[irrep].shape[-1]
        form = torch.einsum("gij,gab->iajb", self.irreps[irrep], matrices)
        return form.reshape(size, size)

    def _value(self, irrep: str, frame: Tensor) -> float:
        """Return what a frame adds to the sum, per channel."""
        stacked = frame.mT.reshape(-1)
        return float(stacked @ self._form(irrep, self.matrices) @ stacked) / frame.shape[1]

    def _find_frame(self, irrep: str, left: Tensor) -> tuple[float, Tensor]:
        """Return the frame in the span of `left` that adds most per channel, and how much."""
        k, d = left.shape[1], self.irreps[irrep].shape[-1]
        form = self._form(irrep, left.mT @ self.matrices @ left)
        if d == 2 and not self.group.swaps_sides:  # no element couples the plane's two channels
            first = _find_leading(form[:k, :k])
            others = _find_complement(first)
            second = others @ _find_leading(others.mT @ form[k:, k:] @ others)
            frame = torch.cat([first, second], 1)
        else:
            frame = find_nearest_orthogonal(_find_leading(form).view(d, k).mT)
        frame = left @ frame
        return self._value(irrep, frame), frame

    def _complement(self, columns: _Columns) -> Tensor:
        """Return an orthonormal basis of the channels that no frame holds."""
        frames = [frame for found in columns.values() for frame in found]
        if not frames:
            return torch.eye(len(self.matrices[0])).to(self.matrices)
        return _find_complement(torch.cat(frames, 1))


def _find_leading(form: Tensor) -> Tensor:
    """Return the eigenvector of the largest eigenvalue, (k, 1)."""
    vectors: Tensor = _linalg.eigh(form)[1]
    return vectors[:, -1:]


def _find_complement(frame: Tensor) -> Tensor:
    """Return an orthonormal basis of what is orthogonal to the columns of a frame."""
    basis: Tensor = _linalg.qr(frame, mode="complete")[0]
    return basis[:, frame.shape[1] :]


def _join(columns: _Columns) -> Tensor:
    return torch.cat([frame for frames in columns.values() for frame in frames], 1)
