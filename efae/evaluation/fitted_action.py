"""The action that an encoder's channels already carry: which matrices make E(gx) of g E(x)?

For each element g, the orthogonal M_g with the least squared error E(gx) - M_g (g E(x)), where g
moves only the cells of the grid, is the orthogonal factor of the sum of E(gx) (g E(x))^T over
images and cells. No law ties the M_g to each other; the representation with the least error, in its
best basis, is fitted beside them (`efae.symmetry.nearest_representation`).

Every image is used in all its transforms. The error of g then equals that of g^-1, and for an
encoder that is equivariant, whatever the images, every moment commutes with its representation.

Nothing is centred. An action is linear, it has no offset: a mean that all transforms of an image
share must lie in invariant channels, and a fit to centred latents might change its sign. The shift
and the scales by which pipelines of diffusers map latents are left out for the same reason, and
because training acts on latents without them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from efae.evaluation.measures import to_float
from efae.evaluation.protocol import Tokenizer
from efae.model.autoencoder import Autoencoder
from efae.model.precision import float32_arithmetic
from efae.symmetry import Representation
from efae.symmetry.nearest_representation import (
    find_nearest_orthogonal,
    find_nearest_representation,
)

_INVARIANT = 1e-9
"""Weight of the identity in every moment, relative to the mean square of a channel: channels that
no image excites are called invariant."""


@dataclass(frozen=True)
class FittedAction:
    """The fitted matrices and representation, and how well they explain an encoder.

    Errors are E |E(gx) - M (g E(x))|^2 / Var E(x) by element. 1 is the error of a constant, and
    latents without relation have 2.
    """

    images: int
    representation: Representation
    """The representation rho with the least error that was found. Where the group does not tell two
    irreps apart, the first of `IRREPS` stands for both."""
    basis: Float[Tensor, "dim dim"]
    """Orthogonal Q with z = Q z', where z' is in the basis of the irreps; float64, on the CPU."""
    matrices: Float[Tensor, "element dim dim"]
    """M_g by element, in the order of the group; float64, on the CPU."""
    spatial_error: dict[str, float]
    """Error of the identity: the cells move, the channels stay."""
    own_error: dict[str, float]
    """Error of the model's own `act`."""
    fitted_error: dict[str, float]
    """Error of M_g, the least of any orthogonal matrix."""
    representation_error: dict[str, float]
    """Error of Q rho(g) Q^T."""
    variance_by_irrep: dict[str, float]
    """Share of the latent's variance that lies in the channels of each irrep."""

    def numbers(self) -> dict[str, Any]:
        """Return all fields except the matrices M_g, ready for JSON."""
        return {
            "images": self.images,
            "representation": repr(self.representation),
            "multiplicities": dict(self.representation.multiplicities),
            "variance_by_irrep": self.variance_by_irrep,
            "spatial_error": self.spatial_error,
            "own_error": self.own_error,
            "fitted_error": self.fitted_error,
            "representation_error": self.representation_error,
            "basis": self.basis.tolist(),
        }


@float32_arithmetic("fp32")
@torch.no_grad()
def fit_action(
    model: Tokenizer,
    images: UInt8[Tensor, "n c h w"],
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    invariant: int = 0,
) -> FittedAction:
    """Fit the action of the model's group on the channels of its latent.

    Args:
        model: Tokenizer in eval mode.
        images: Images in [0, 255], two or more.
        batch_size: Number of images per batch; affects rounding only.
        device: Device of the model.
        invariant: Least number of invariant channels of the representation.

    Raises:
        ValueError: There are fewer than two images, or a latent is not finite.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} images: a fit of the action takes two or more")
    moments = _Moments()
    for start in range(0, len(images), batch_size):
        moments.add(model, to_float(images[start : start + batch_size].to(device)))
    products, covariance = moments.products.cpu(), moments.covariance().cpu()
    if not products.isfinite().all():
        raise ValueError("the latents of these images are not finite: no action can be fitted")
    dim = products.shape[-1]
    names = [g.name for g in model.group]
    spread = max(float(covariance.trace()), 1e-12 * dim)

    def by_element(squares: Tensor) -> dict[str, float]:
        return dict(zip(names, map(float, squares / spread), strict=True))

    def errors(matrices: Tensor) -> dict[str, float]:
        # |a - M b|^2 = |a|^2 + |b|^2 - 2 <M, a b^T>; both squares run over all transforms.
        explained = (matrices * products).sum((1, 2))
        return by_element(2 * (products[0].trace() - explained).clamp(min=0))

    identity = torch.eye(dim, dtype=torch.float64).expand_as(products)
    regular = products + _INVARIANT / dim * products[0].trace() * identity
    matrices = find_nearest_orthogonal(regular)
    representation, basis = find_nearest_representation(model.group, regular, invariant)
    represented = torch.stack([basis @ representation.matrix(g) @ basis.T for g in model.group])
    variances = (basis.T @ covariance @ basis).diagonal() / spread
    return FittedAction(
        images=len(images),
        representation=representation,
        basis=basis,
        matrices=matrices,
        spatial_error=errors(identity),
        own_error=by_element(moments.own.cpu()),
        fitted_error=errors(matrices),
        representation_error=errors(represented),
        variance_by_irrep={
            irrep: float(variances[channels].sum())
            for irrep, channels in representation.blocks.items()
        },
    )


class _Moments:
    """Means over images, their transforms and cells, float64, from batches.

    Attributes:
        products: Mean of E(g h x) (g E(h x))^T over all h, by g; (element, dim, dim).
        own: Mean of |E(g h x) - act(g, E(h x))|^2 over all h, by g.
    """

    def __init__(self) -> None:
        self._images = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, model: Tokenizer, image: Float[Tensor, "b c h w"]) -> None:
        """Add a batch of images."""
        group = model.group
        latents = [_encode(model, g.act_on_image(image)) for g in group]
        products: list[Tensor] = []
        own: list[Tensor] = []
        for g in group:
            after = torch.cat([_cells(latents[group.index(g @ h)]) for h in group])
            moved = torch.cat([_cells(g.act_on_image(latent)) for latent in latents])
            acted = torch.cat([_cells(model.act(g, latent)) for latent in latents])
            products.append(after.T @ moved / len(group))
            own.append((after - acted).square().sum() / len(group))
        first = _cells(latents[0])
        self._images += len(image)
        self._add("products", torch.stack(products))
        self._add("own", torch.stack(own))
        self._add("squares", first.T @ first)
        self._add("latent", latents[0].double().sum(0))

    def _add(self, name: str, total: Tensor) -> None:
        self._sums[name] = self._sums[name] + total if name in self._sums else total

    @property
    def products(self) -> Tensor:
        return self._sums["products"] / self._count

    @property
    def own(self) -> Tensor:
        return self._sums["own"] / self._count

    @property
    def _count(self) -> int:
        return self._images * self._sums["latent"][0].numel()

    def covariance(self) -> Float[Tensor, "dim dim"]:
        """Return the covariance of the channels over the images, at each cell, averaged."""
        mean = self._sums["latent"].flatten(1) / self._images
        centred = self._sums["squares"] - self._images * mean @ mean.T
        return centred / (self._images - 1) / mean.shape[1]


def _encode(model: Tokenizer, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
    """Return latents that no factors of diffusers have shifted or scaled."""
    if isinstance(model, Autoencoder):
        if model.config.keeps_latents:
            return model.call_filled(model.bounded, image)
        return model.encode(image)
    return getattr(model, "bounded", model.encode)(image)


def _cells(latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "cell dim"]:
    """Return the channel vectors of all cells, float64."""
    return latent.double().movedim(1, -1).flatten(0, 2)
