"""Quality of samples: their distances to held-out images, in a classifier's features."""

from collections.abc import Callable

import torch
from torch import Tensor

from data_pipelines.loading.dataset import ImageSet
from efae.evaluation.set_distances import (
    Features,
    Moments,
    frechet,
    measure_precision_recall,
    score_inception,
)
from efae.latents.set_features import build_network

_BATCH_SIZE = 250


class Judge:
    """Held-out images, and the classifier of them that compares samples with them.

    Args:
        held_out: Images with classes.
        count: Number of them for precision and recall, which take equal numbers.
        say: Function that prints a line.
    """

    def __init__(self, held_out: ImageSet, count: int, say: Callable[[str], None]):
        self.network = build_network(held_out, say)
        say(self.network.description)
        loader = held_out.loader(_BATCH_SIZE, shuffle=False, decode_threads=1)
        pooled = self._read(torch.cat([batch.image for batch in loader])).pooled
        self._moments, self._some = Moments.of(pooled), pooled[:count]

    def measure(self, images: Tensor) -> dict[str, float]:
        """Return FID, precision, recall and Inception score of images uint8 (n, c, h, w)."""
        found = self._read(images)
        assert found.logits is not None
        precision, recall = measure_precision_recall(found.pooled, self._some)
        return {
            "fid": self._distance(found),
            "precision": precision,
            "recall": recall,
            "inception_score": score_inception(found.logits),
        }

    def measure_fid(self, images: Tensor) -> float:
        """Return the FID alone."""
        return self._distance(self._read(images))

    def _distance(self, features: Features) -> float:
        return frechet(Moments.of(features.pooled), self._moments)

    def _read(self, images: Tensor) -> Features:
        parts = [self.network(part) for part in images.split(_BATCH_SIZE)]
        return Features(
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.spatial for part in parts]),
            torch.cat([part.logits for part in parts if part.logits is not None]),
        )
