"""Distances between two sets of images, and scores of one, from features of their images.

torchmetrics computes FID of two sets too, but takes no stored moments; its Inception score draws
from the global generator; it has no precision and recall.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

NEIGHBOURS = 3
"""Neighbour whose distance is the radius of a ball, for precision and recall."""
_SCORED_AT_ONCE = 5000
_ROWS_AT_ONCE = 256
_ROUNDING = 1e-12
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Function that shows the progress of an iterable with this name."""


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


class MomentSums:
    """Sums over features that come in batches; the moments follow from them."""

    def __init__(self):
        self.width = 0
        """Number of features."""
        self._count = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, features: Float[Tensor, "b d"]) -> None:
        """Add the features of a batch."""
        wide = features.double()
        if self._sums is None:
            # Sums about a point near the mean keep the digits that the covariance needs.
            origin, self.width = wide.mean(0), wide.shape[1]
            products = wide.new_zeros(self.width, self.width)
            self._sums = origin, torch.zeros_like(origin), products
        origin, sums, products = self._sums
        wide = wide - origin
        self._count += len(wide)
        sums += wide.sum(0)
        products.addmm_(wide.T, wide)

    def compute(self) -> Moments:
        """Return the moments of at least two examples, on the CPU."""
        assert self._sums is not None
        origin, sums, products = (part.cpu() for part in self._sums)
        mean = sums / self._count
        covariance = (products - torch.outer(sums, mean)) / (self._count - 1)
        return Moments(origin + mean, covariance)


class SetFeatures:
    """What the distances need of a set whose features come in batches, whatever its size.

    Args:
        kept: Positions in the set, ascending, of the images whose pooled features are kept.
    """

    def __init__(self, kept: Sequence[int]):
        self.pooled, self.spatial = MomentSums(), MomentSums()
        self.count = 0
        self._positions = torch.tensor(kept, dtype=torch.long)
        self._kept, self._logits, self._scores = list[Tensor](), list[Tensor](), list[float]()

    def add(self, features: Features) -> None:
        """Add the features of the next images."""
        first = self.count
        self.count += len(features.pooled)
        here = (self._positions >= first) & (self._positions < self.count)
        self._kept.append(features.pooled[self._positions[here] - first])
        self.pooled.add(features.pooled)
        self.spatial.add(features.spatial)
        if features.logits is not None:
            self._logits.append(features.logits)
            if sum(map(len, self._logits)) >= _SCORED_AT_ONCE:
                joined = torch.cat(self._logits)
                self._scores.append(score_inception(joined[:_SCORED_AT_ONCE]))
                self._logits = [joined[_SCORED_AT_ONCE:]]

    @property
    def kept(self) -> Tensor:
        """Pooled features of the images to keep."""
        return torch.cat(self._kept)

    @property
    def inception_score(self) -> float | None:
        """Inception score, as of `score_inception`; None for a network without classes."""
        rest = torch.cat(self._logits) if self._logits else torch.zeros(0)
        scores = self._scores + ([score_inception(rest)] if len(rest) else [])
        return sum(scores) / len(scores) if scores else None


def draw_positions(count: int, wanted: int) -> list[int]:
    """Return positions of `wanted` images of `count`, always the same ones, ascending.

    They are not evenly spaced: samples take their classes in turn, so that a stride could leave
    out classes.
    """
    return sorted(random.Random(0).sample(range(count), min(wanted, count)))


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
    samples: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    progress: Progress = lambda items, _: items,
) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), k = 3.

    Every point carries a ball that reaches its third-nearest neighbour in its own set. Precision is
    the share of the samples within a ball of the reference, recall the share of the reference
    within a ball of the samples. Each set needs four points. Where there are more points, the balls
    are smaller: compare results of equal numbers. The time grows with the product of the numbers.
    """
    # Distances come from products of matrices, so points near the origin lose the fewest digits.
    centre = reference.double().mean(0)
    x, y = samples.double() - centre, reference.double() - centre
    slack = _ROUNDING * float(torch.cat([x, y]).square().sum(1).max())
    precision = _share_covered(x, y, slack, lambda parts: progress(parts, "precision"))
    return precision, _share_covered(y, x, slack, lambda parts: progress(parts, "recall"))


def _share_covered(
    points: Tensor,
    centres: Tensor,
    slack: float,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]],
) -> float:
    """Return the share of the points within a ball around one of the centres."""
    # A point is its own nearest neighbour.
    radii = [
        _measure_squares(part, centres).kthvalue(NEIGHBOURS + 1).values
        for part in progress(torch.split(centres, _ROWS_AT_ONCE))
    ]
    reach = torch.cat(radii) + slack
    covered = [
        (_measure_squares(part, centres) <= reach).any(1)
        for part in progress(torch.split(points, _ROWS_AT_ONCE))
    ]
    return float(torch.cat(covered).double().mean())


def _measure_squares(points: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance of each of (a, d) to each of (b, d), up to rounding."""
    squares = points.square().sum(1)[:, None] + others.square().sum(1)
    return squares - 2 * points @ others.T
