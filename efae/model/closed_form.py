"""The best equivariant linear map from patches to a latent and back, in closed form.

A linear map commutes with the group if each copy of an irrep in the latent reads a copy of the same
irrep in the pixels (Schur). So the principal components (Pearson 1901) of the patches, taken irrep
by irrep, are the equivariant map of least squared error; their variances say which irreps carry the
images, and so which multiplicities suit them.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from efae.model.autoencoder import Autoencoder
from efae.model.networks import diffusers_vae
from efae.model.networks.linear_path import patchify, unpatchify
from efae.model.octic.layers import patch_action
from efae.symmetry.group import Group
from efae.symmetry.representation import IRREPS, Representation, irrep_matrix

LARGEST_PATCH = 4096
"""Most values of a patch that a map is fitted to: several matrices of 4096 x 4096 values take 134
MB each. A cell of 32 x 32 pixels has 3072 values in colour; one of 128 x 128 would take 19 GB."""


@dataclass(frozen=True)
class Moments:
    """Sums over patches of pixel values from 0 to 255: integers in float64, so exact in any order.

    Attributes:
        count: Number of patches; exact up to 10^11.
        first: Sum of each value.
        second: Sum of each product of two values.
    """

    count: Float[Tensor, ""]
    first: Float[Tensor, "n"]
    second: Float[Tensor, "n n"]

    @classmethod
    def none(cls, values: int, device: torch.device) -> "Moments":
        """Return the sums over no patches.

        Args:
            values: Number of values of a patch.
            device: Device of the sums.
        """
        zeros = torch.zeros(values * (values + 1) + 1, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1 : values + 1], zeros[values + 1 :].view(values, values))

    @classmethod
    def of(cls, image: UInt8[Tensor, "b c h w"], side: int) -> "Moments":
        """Sum over all side x side patches, whose values are ordered (channel, row, column)."""
        patches = patchify(image, side).flatten(0, 1).double()
        count = torch.tensor(len(patches), dtype=torch.float64, device=image.device)
        return cls(count, patches.sum(0), patches.mT @ patches)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.first + other.first, self.second + other.second
        )

    def over_processes(self) -> "Moments":
        """Add those of the other processes, in place, if torch.distributed is initialised."""
        if dist.is_available() and dist.is_initialized():
            for part in (self.count, self.first, self.second):
                dist.all_reduce(part)
        return self

    def mean_product(self) -> Float[Tensor, "n n"]:
        """Return the mean products of values scaled to [-1, 1], on the CPU."""
        count, first, second = (part.cpu() for part in (self.count, self.first, self.second))
        shift = first / count / 127.5
        return second / count / 127.5**2 - shift[:, None] - shift[None] + 1


@dataclass(frozen=True)
class LinearMap:
    """An equivariant linear map from patches to latent cells; its transpose is its best inverse.

    Attributes:
        rows: Map; rows are orthonormal, or zero where the pixels have no more copies of an irrep.
        variance: Mean square of each latent channel.
        total: Mean square of a patch, over all its values together.
    """

    rows: Float[Tensor, "dim n"]
    variance: Float[Tensor, "dim"]
    total: float

    @property
    def error(self) -> float:
        """Mean squared error of a value in [-1, 1] after the map and its transpose."""
        return max(0.0, self.total - float(self.variance.sum())) / self.rows.shape[1]

    def reconstruct(self, image: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "b c h w"]:
        """Map the side x side patches of an image in [-1, 1] to a latent and back."""
        rows = self.rows.to(image)
        height, width = image.shape[-2:]
        return unpatchify(patchify(image, side) @ rows.mT @ rows, side, height, width)


def fit_linear_map(moments: Moments, representation: Representation, side: int) -> LinearMap:
    """Return the equivariant linear map of least squared error to a latent of `representation`.

    Args:
        moments: Moments of the side x side patches of the images.
        representation: Representation of the latent.
        side: Side of a latent cell, in pixels.
    """
    components = _Components(representation.group, moments.mean_product(), side)
    rows = torch.zeros(representation.dim, len(components.product), dtype=torch.float64)
    variance = torch.zeros(representation.dim, dtype=torch.float64)
    taken: dict[tuple[int, ...], int] = {}
    for irrep, block in representation.blocks.items():
        step = 2 if irrep == "e" else 1
        for channel in range(block.start, block.stop, step):
            for place, signs in enumerate(components.pieces(irrep)):
                found = components.find(signs)
                number = taken.get(signs, 0)  # irreps that the group does not tell apart share
                taken[signs] = number + 1
                if number < len(found.variance):
                    copy = found.rows[number]
                    rows[channel + place : channel + place + len(copy)] = copy
                    variance[channel + place : channel + place + len(copy)] = found.variance[number]
    return LinearMap(rows, variance, float(components.product.trace()))


def choose_multiplicities(
    moments: Moments, group: Group, dim: int, side: int, invariant: int
) -> dict[str, int]:
    """Return the multiplicities with which the linear map of `fit_linear_map` has the least error.

    Where the group does not tell two irreps apart, the first of `IRREPS` stands for both.

    Args:
        moments: Moments of the side x side patches of the images.
        group: Group that acts.
        dim: Number of channels.
        side: Side of a latent cell, in pixels.
        invariant: Least number of A1 channels, that of colours.
    """
    components = _Components(group, moments.mean_product(), side)
    seen: set[tuple[int, ...]] = set()
    planes: list[float] = []
    lines: list[tuple[float, str]] = []
    for irrep in IRREPS:
        pieces = components.pieces(irrep)
        if seen & set(pieces):
            continue
        seen |= set(pieces)
        spectra = [cast(list[float], components.find(s).variance.tolist()) for s in pieces]
        if irrep == "e":
            planes = [sum(pair) * 2 / len(pair) for pair in zip(*spectra, strict=False)]
        else:
            first = invariant if irrep == "a1" else 0
            lines += [(variance, irrep) for variance in spectra[0][first:]]
    lines.sort(reverse=True)
    left = dim - invariant

    # A plane takes two channels: the best number of planes is sought among all.
    carried = [
        sum(planes[:count]) + sum(variance for variance, _ in lines[: left - 2 * count])
        for count in range(min(len(planes), left // 2) + 1)
    ]
    count = carried.index(max(carried))
    chosen = dict.fromkeys(IRREPS, 0) | {"a1": invariant, "e": count}
    left -= 2 * count
    for _, irrep in lines[:left]:
        chosen[irrep] += 1
    chosen["a1"] += max(0, left - len(lines))  # more channels than the pixels have copies
    return chosen


@torch.no_grad()
def set_linear_paths(model: Autoencoder, fitted: LinearMap) -> None:
    """Set the linear paths of a model whose networks correct them, and its statistics.

    A latent channel of standard deviation s is divided by sqrt(s) and multiplied by it on the way
    back: of all scales, equal noise on every channel then costs least in the pixels. The mean
    square over all channels is 1.
    """
    root = fitted.variance.clamp(min=1e-8).sqrt()
    power = torch.where(fitted.variance > 0, root, 0)
    scale = (root * power.mean()).sqrt()[:, None]
    power /= power.mean()
    assert not isinstance(model.encoder, diffusers_vae.Encoder)
    assert not isinstance(model.decoder, diffusers_vae.Decoder)
    encoder, decoder = model.encoder.linear_path, model.decoder.linear_path
    assert decoder is not None
    for path, rows in ((encoder, fitted.rows / scale), (decoder, fitted.rows * scale)):
        rows = rows[None, :, :, None].to(path.free.device)
        path.free.copy_(model.from_irreps(rows)[0, :, :, 0])
    model.decoder.residual_power.copy_(
        torch.tensor([fitted.error, fitted.total / fitted.rows.shape[1]])
    )
    statistics = model.bottleneck.power
    means = [power[block].mean() for block in model.bottleneck.blocks]
    statistics.copy_(torch.stack(means))


@dataclass(frozen=True)
class _Spectrum:
    """Copies of an irrep in the pixels, by falling mean square.

    Attributes:
        variance: Mean square of each channel of a copy.
        rows: Orthonormal rows of each copy, one per channel.
    """

    variance: Float[Tensor, "copy"]
    rows: Float[Tensor, "copy d n"]


class _Components:
    """The principal components of patches, irrep by irrep."""

    def __init__(self, group: Group, product: Tensor, side: int):
        self.group, self.product = group, product
        self.source, _ = patch_action(group, side, len(product) // side**2)
        # Elements under which a copy of any irrep changes signs only.
        self.diagonal = [i for i, g in enumerate(group) if not g.swaps_sides]
        self._found: dict[tuple[int, ...], _Spectrum] = {}

    def pieces(self, irrep: str) -> list[tuple[int, ...]]:
        """Return the signs of what an irrep splits into, one value per element.

        A plane that quarter turns keep whole has the signs of its first channel.
        """
        elements = list(self.group)
        if irrep == "e" and self.group.swaps_sides:
            elements = [self.group[i] for i in self.diagonal]
            places = [0]
        else:
            places = range(2 if irrep == "e" else 1)
        matrices = [irrep_matrix(irrep, g) for g in elements]
        return [tuple(int(matrix[i, i]) for matrix in matrices) for i in places]

    def find(self, signs: tuple[int, ...]) -> _Spectrum:
        """Return the components that change by these signs; pairs if they are of a plane."""
        if signs not in self._found:
            plane = len(signs) < len(self.group)
            basis = self._find_basis(signs)
            self._found[signs] = self._find_planes(basis) if plane else self._find_lines(basis)
        return self._found[signs]

    def _find_basis(self, signs: tuple[int, ...]) -> Float[Tensor, "n k"]:
        """Return an orthonormal basis of the patches that elements change by these signs."""
        elements = range(len(self.group)) if len(signs) == len(self.group) else self.diagonal
        source, n = self.source[list(elements)], self.source.shape[1]
        projection = torch.zeros(n, n, dtype=torch.float64)  # mean of sign(g) R(g)
        for row, sign in zip(source, signs, strict=True):
            projection[torch.arange(n), row] += sign / len(signs)
        # Orbits of pixels are disjoint, so that one column of each is orthogonal to the others.
        columns = projection[:, source.min(0).values == torch.arange(n)]
        norm = columns.square().sum(0).sqrt()
        return columns[:, norm > 1e-6] / norm[norm > 1e-6]

    def _find_lines(self, basis: Tensor) -> _Spectrum:
        variance, vectors = _diagonalize(basis.mT @ self.product @ basis)
        return _Spectrum(variance, _fix_signs((basis @ vectors).mT)[:, None])

    def _find_planes(self, basis: Tensor) -> _Spectrum:
        turn = next(i for i, g in enumerate(self.group) if g.name == "rot90")
        turned = basis[self.source[turn]]  # E takes its first channel to the second
        product = basis.mT @ self.product @ basis + turned.mT @ self.product @ turned
        _, vectors = _diagonalize(product / 2)
        planes = list[Tensor]()
        for row in _fix_signs((basis @ vectors).mT):
            # Without mirrors a plane may be turned within itself, and each is found twice.
            for plane in planes:
                row = row - plane.mT @ (plane @ row)
            if row.square().sum() > 1e-12:
                row = F.normalize(row, dim=0)
                planes.append(torch.stack([row, row[self.source[turn]]]))
        rows = torch.stack(planes) if planes else basis.new_zeros(0, 2, len(basis))
        variance = torch.einsum("kdn,nm,kdm->k", rows, self.product, rows) / 2
        return _Spectrum(variance, rows)


def _diagonalize(product: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, falling and not below 0, and eigenvectors, by column."""
    values, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(product))
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _fix_signs(rows: Tensor) -> Tensor:
    """Choose, of each row and its negative, the one whose largest entry is positive."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0)
