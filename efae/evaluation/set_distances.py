"""Distances between two sets of images, and scores of one, from features of their images.

torchmetrics computes FID of two sets too, but takes no stored moments; its Inception score draws
from the global generator; it has no precision and recall.
"""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

NEIGHBOURS = 3
"""Neighbour whose distance is the radius of a ball, for precision and recall."""
_SCORED_AT_ONCE = 5000
_ROWS_AT_ONCE = 256
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Features:
    """What a network computes for each of n images, float32.

    Attributes:
        pooled: Features (n, d) of the whole image.
        spatial: Features (n, s) of an earlier layer at every place of a grid, flattened.
        logits: Logits (n, classes); None for a network without classes.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> "Moments":
        """Compute the moments of at least two examples."""
        wide = features.double()
        return cls(wide.mean(0), wide.T.cov())


def frechet(a: Moments, b: Moments) -> float:
    """Return the squared Fréchet distance of two Gaussians (FID; arXiv:1706.08500).

    |m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Dowson & Landau 1982).
    """
    values, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(a.covariance))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    squares = cast(Tensor, torch.linalg.eigvalsh(root @ b.covariance @ root))
    cross = squares.clamp(min=0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    distance = apart + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding can make it negative


def score_inception(logits: Float[Tensor, "n classes"]) -> float:
    """Return the Inception score, from 1 to the number of classes (arXiv:1606.03498).

    exp(E KL(p(class | image) || p(class))), the mean over parts of 5,000 images in their order, as
    in guided-diffusion.
    """
    scores: list[float] = []
    for part in torch.split(logits.double(), _SCORED_AT_ONCE):
        given = part.log_softmax(1)
        overall = given.exp().mean(0).log()
        # An impossible class adds nothing: 0 log 0 = 0.
        each = torch.where(given.exp() > 0, given.exp() * (given - overall), 0)
        scores.append(float(each.sum(1).mean().exp()))
    return sum(scores) / len(scores)


def measure_precision_recall(
    samples: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]
) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), k = 3.

    Every point carries a ball that reaches its third-nearest neighbour in its own set. Precision is
    the share of the samples within a ball of the reference, recall the share of the reference
    within a ball of the samples. Each set needs four points.
    """
    # Distances come from products of matrices, so points near the origin lose the fewest digits.
    centre = reference.double().mean(0)
    x, y = samples.double() - centre, reference.double() - centre
    slack = _ROUNDING * float(torch.cat([x, y]).square().sum(1).max())
    return _share_covered(x, y, slack), _share_covered(y, x, slack)


def _share_covered(points: Tensor, centres: Tensor, slack: float) -> float:
    """Return the share of the points within a ball around one of the centres."""
    # A point is its own nearest neighbour.
    radii = [
        _measure_squares(part, centres).kthvalue(NEIGHBOURS + 1).values
        for part in torch.split(centres, _ROWS_AT_ONCE)
    ]
    reach = torch.cat(radii) + slack
    covered = [
        (_measure_squares(part, centres) <= reach).any(1)
        for part in torch.split(points, _ROWS_AT_ONCE)
    ]
    return float(torch.cat(covered).double().mean())


def _measure_squares(points: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance of each of (a, d) to each of (b, d), up to rounding."""
    squares = points.square().sum(1)[:, None] + others.square().sum(1)
    return squares - 2 * points @ others.T
