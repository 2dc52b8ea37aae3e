"""Distances between sets: closed forms, and sets made for a known precision and recall."""

import numpy as np
import pytest
import torch

from efae.evaluation.set_distances import (
    Moments,
    frechet,
    measure_precision_recall,
    score_inception,
)


def test_the_distance_of_gaussians_is_the_closed_form():
    # Of covariances that commute: |m - n|^2 + sum (sqrt a - sqrt b)^2.
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    a, b = torch.rand(2, 6, dtype=torch.float64)
    m, n = torch.randn(2, 6, dtype=torch.float64)
    one, other = (Moments(mean, turn @ values.diag() @ turn.T) for mean, values in ((m, a), (n, b)))
    expected = float((m - n).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet(one, other) == pytest.approx(expected)
    assert frechet(other, one) == pytest.approx(expected)
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)


def test_of_covariances_that_do_not_commute_the_distance_is_the_trace_of_the_root():
    a, b = (x @ x.T for x in torch.randn(2, 5, 5, dtype=torch.float64))
    zero = torch.zeros(5, dtype=torch.float64)
    roots = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    expected = float(a.trace() + b.trace() - 2 * roots)
    assert frechet(Moments(zero, a), Moments(zero, b)) == pytest.approx(expected)


def test_moments_are_numpys():
    features = torch.randn(40, 3)
    found = Moments.of(features)
    assert np.allclose(found.mean, features.double().mean(0))
    assert np.allclose(found.covariance, np.cov(features.double().numpy().T))


def test_the_inception_score_counts_the_classes_of_certain_and_varied_images():
    certain = 100.0 * torch.eye(7).repeat(3, 1)
    assert score_inception(certain) == pytest.approx(7)
    assert score_inception(certain[:1].expand(9, -1)) == pytest.approx(1)
    assert score_inception(torch.zeros(9, 7)) == pytest.approx(1)


def test_the_inception_score_is_a_mean_over_parts_of_5000():
    one_class, all_classes = torch.zeros(5000, dtype=torch.long), torch.arange(5000) % 4
    logits = 1e4 * torch.nn.functional.one_hot(torch.cat([one_class, all_classes])).float()
    assert score_inception(logits) == pytest.approx((1 + 4) / 2)


def draw_points(count: int, at: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return at + torch.randn(count, 16, generator=generator)


def test_equal_sets_have_precision_and_recall_1_and_distant_ones_0():
    points = draw_points(600)
    assert measure_precision_recall(points, points.flip(0)) == (1, 1)
    assert measure_precision_recall(points, draw_points(500, at=100.0)) == (0, 0)
    same = torch.full((8, 16), 0.1)  # all balls have radius 0
    assert measure_precision_recall(same[:5], same) == (1, 1)
    assert measure_precision_recall(same[:5], same + 1e-3) == (0, 0)


def test_samples_of_one_of_two_modes_are_precise_and_recall_half():
    reference = torch.cat([draw_points(200), draw_points(200, at=100.0)])
    assert measure_precision_recall(reference[:200], reference) == (1, 0.5)
    assert measure_precision_recall(reference, reference[:200]) == (0.5, 1)


def test_a_ball_reaches_the_third_neighbour():
    # From 0, the neighbours of its own set lie at 1, 2 and 4; the other balls are larger.
    reference = torch.tensor([0.0, 1.0, 2.0, 4.0])[:, None]
    for far, precision in ((-3.9, 1), (-4.1, 0)):
        assert measure_precision_recall(torch.full((4, 1), far), reference)[0] == precision
