"""Distances between sets: closed forms, and sets made for a known precision and recall."""

import numpy as np
import pytest
import torch

from efae.evaluation.set_distances import (
    Features,
    Moments,
    MomentSums,
    SetFeatures,
    draw_positions,
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


def test_moments_are_numpys_at_once_and_in_batches():
    features = 1e4 + torch.randn(40, 3)
    found = [Moments.of(features)]
    for batch_size in (1, 7, 40):
        sums = MomentSums()
        for batch in features.split(batch_size):
            sums.add(batch)
        found.append(sums.compute())
    for moments in found:
        assert np.allclose(moments.mean, features.double().mean(0), rtol=1e-12)
        assert np.allclose(moments.covariance, np.cov(features.double().numpy().T), rtol=1e-9)


def test_a_set_in_batches_keeps_the_chosen_features_and_scores_parts_of_5000():
    pooled, logits = torch.randn(10_100, 3), 3 * torch.randn(10_100, 4)
    found = SetFeatures(kept := draw_positions(10_100, 50))
    for start in range(0, 10_100, 333):
        part = pooled[start : start + 333]
        found.add(Features(part, part, logits[start : start + 333]))
    assert torch.equal(found.kept, pooled[kept])
    assert found.count == 10_100
    assert found.inception_score == pytest.approx(score_inception(logits))


def test_drawn_positions_are_fixed_and_miss_no_class_of_those_that_samples_take_in_turn():
    found = draw_positions(50_000, 10_000)
    assert found == sorted(set(found)) == draw_positions(50_000, 10_000)
    assert len(found) == 10_000
    assert len({position % 1000 for position in found}) == 1000
    assert draw_positions(5, 10) == [0, 1, 2, 3, 4]


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
