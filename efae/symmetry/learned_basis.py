"""A learned orthonormal basis of the latent: rho'(g) = Q rho(g) Q^T.

Any orthogonal Q keeps the group law, so the basis may be learned; it adds no expressiveness beyond
the multiplicities. Q is the exponential of a skew-symmetric matrix: orthogonal for every value of
the free parameter, hence after every optimizer step and for a moving average of the parameters,
where an average of the matrices Q would not be.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Basis(nn.Module):
    """Q = exp(A), A skew-symmetric, of a latent with `dim` channels.

    `torch.nn.utils.parametrizations.orthogonal` is not used: it computes in the parameter's own
    precision, and float32 keeps the group law no better than its rounding, which grows with |A|;
    half of its square parameter is dead; and its state adds a base matrix beside the parameter.

    Raises:
        ValueError: fewer than two channels.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim < 2:
            raise ValueError(f"a basis of {dim} channels has nothing to learn: use 2 or more")
        self.dim = dim
        # Entries of A below the diagonal, row by row; |A| is about 0.2 radians.
        self.angles = nn.Parameter(0.1 / math.sqrt(dim) * torch.randn(dim * (dim - 1) // 2))

    def matrix(self) -> Float[Tensor, "dim dim"]:
        """Q, float64; its columns are the basis of the irreps. One matrix exponential a call."""
        rows, columns = torch.tril_indices(self.dim, self.dim, -1, device=self.angles.device)
        lower = self.angles.new_zeros((self.dim, self.dim), dtype=torch.float64)
        lower = lower.index_put((rows, columns), self.angles.double())
        return torch.matrix_exp(lower - lower.T)

    def to_irreps(
        self,
        latent: Float[Tensor, "batch dim height width"],
        matrix: Float[Tensor, "dim dim"] | None = None,
    ) -> Float[Tensor, "batch dim height width"]:
        """Q^T z at every cell: channels of the latent to channels of the irreps.

        Args:
            latent: in the learned basis.
            matrix: Q, where the caller already has it.
        """
        return _apply((self.matrix() if matrix is None else matrix).T, latent)

    def from_irreps(
        self,
        latent: Float[Tensor, "batch dim height width"],
        matrix: Float[Tensor, "dim dim"] | None = None,
    ) -> Float[Tensor, "batch dim height width"]:
        """Q z at every cell: channels of the irreps to channels of the latent.

        Args:
            latent: in the basis of the irreps.
            matrix: Q, where the caller already has it.
        """
        return _apply(self.matrix() if matrix is None else matrix, latent)


def _apply(matrix: Tensor, latent: Tensor) -> Tensor:
    """In float32 at least, also under autocast: bfloat16 would leave 1e-2 of orthogonality."""
    dtype = torch.promote_types(latent.dtype, torch.float32)
    with torch.autocast(latent.device.type, enabled=False):
        moved = torch.einsum("ij,bjhw->bihw", matrix.to(dtype), latent.to(dtype))
    return moved.to(latent.dtype)
