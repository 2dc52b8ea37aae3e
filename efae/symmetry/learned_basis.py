"""A learned orthonormal basis of the latent: rho'(g) = Q rho(g) Q^T.

Any orthogonal Q keeps the group law, so the basis may be learned; it adds no expressiveness beyond
the multiplicities. Q is the exponential of a skew-symmetric matrix, and so orthogonal for every
value of the free parameters: after every optimizer step, and for a moving average of the
parameters. A moving average of the matrices Q would not be orthogonal.
"""

import math
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Basis(nn.Module):
    """The basis Q = exp(A), A skew-symmetric, of a latent with `dim` channels.

    `torch.nn.utils.parametrizations.orthogonal` is not used. It computes in the precision of the
    parameter, and in float32 the rounding error of the group law grows with |A|; half of its square
    parameter is unused; and its state holds a base matrix beside the parameter.

    Raises:
        ValueError: There are fewer than two channels.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim < 2:
            raise ValueError(f"a basis of {dim} channels has nothing to learn: use 2 or more")
        self.dim = dim
        # Entries of A below the diagonal, row by row; |A| is about 0.2 radians.
        self.angles = nn.Parameter(0.1 / math.sqrt(dim) * torch.randn(dim * (dim - 1) // 2))
        self._constant: Tensor | None
        self.register_buffer("_constant", None, persistent=False)

    def matrix(self) -> Float[Tensor, "dim dim"]:
        """Compute Q, float64; its columns are the basis of the irreps. A matrix exponential."""
        if self._constant is not None:
            return self._constant
        rows, columns = torch.tril_indices(self.dim, self.dim, -1, device=self.angles.device)
        lower = self.angles.new_zeros((self.dim, self.dim), dtype=torch.float64)
        lower = lower.index_put((rows, columns), self.angles.double())
        return torch.matrix_exp(lower - lower.T)

    @torch.no_grad()
    def make_constant(self) -> None:
        """Compute Q for the last time: formats such as ONNX have no matrix exponential."""
        self._constant = self.matrix()

    @torch.no_grad()
    def set_matrix(self, matrix: Float[Tensor, "dim dim"]) -> None:
        """Set the angles so that Q is this orthogonal matrix, whose determinant must be 1.

        A is the logarithm of the matrix, from its real Schur form: planes that turn by an angle,
        and axes that stay or, two by two, turn by pi.
        """
        schur: Any = import_module("scipy.linalg").schur  # takes a second; has no types
        form, vectors = schur(matrix.double().cpu().numpy(), output="real")
        logarithm, reversed_axes = torch.zeros(self.dim, self.dim, dtype=torch.float64), list[int]()
        i = 0
        while i < self.dim:
            if i + 1 < self.dim and abs(form[i + 1, i]) > 1e-8:
                angle = math.atan2(form[i + 1, i] - form[i, i + 1], form[i, i] + form[i + 1, i + 1])
                logarithm[i + 1, i], logarithm[i, i + 1] = angle, -angle
                i += 2
                continue
            if form[i, i] < 0:
                reversed_axes.append(i)
            i += 1
        for i, j in zip(reversed_axes[::2], reversed_axes[1::2], strict=True):
            logarithm[j, i], logarithm[i, j] = math.pi, -math.pi
        vectors = torch.from_numpy(vectors)
        rows, columns = torch.tril_indices(self.dim, self.dim, -1)
        self.angles.copy_((vectors @ logarithm @ vectors.T)[rows, columns])

    def to_irreps(
        self,
        latent: Float[Tensor, "batch dim height width"],
        matrix: Float[Tensor, "dim dim"] | None = None,
    ) -> Float[Tensor, "batch dim height width"]:
        """Map a latent to the basis of the irreps: Q^T z at every cell.

        Args:
            latent: Latent in the learned basis.
            matrix: Q, if the caller already has it.
        """
        return _apply((self.matrix() if matrix is None else matrix).T, latent)

    def from_irreps(
        self,
        latent: Float[Tensor, "batch dim height width"],
        matrix: Float[Tensor, "dim dim"] | None = None,
    ) -> Float[Tensor, "batch dim height width"]:
        """Map a latent to the learned basis: Q z at every cell.

        Args:
            latent: Latent in the basis of the irreps.
            matrix: Q, if the caller already has it.
        """
        return _apply(self.matrix() if matrix is None else matrix, latent)


def _apply(matrix: Tensor, latent: Tensor) -> Tensor:
    """Multiply in float32 or wider, also under autocast: bfloat16 is orthogonal to 1e-2 only."""
    dtype = torch.promote_types(latent.dtype, torch.float32)
    with torch.autocast(latent.device.type, enabled=False):
        moved = torch.einsum("ij,bjhw->bihw", matrix.to(dtype), latent.to(dtype))
    return moved.to(latent.dtype)
