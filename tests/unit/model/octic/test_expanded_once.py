"""Weights expanded once belong to the thread that expanded them, and to no longer than that."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from efae.model.octic import layers as octic
from efae.symmetry import D4


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return octic.Mlp(D4, 4, 8)


def test_weights_are_expanded_once_inside_and_anew_outside(mlp):
    inward, outward = mlp[0], mlp[2]
    with octic.expanded_once(mlp):
        weight = inward.weight()
        with octic.expanded_once(outward):
            assert outward.weight() is outward.weight()
            assert inward.weight() is weight
        assert inward.weight() is weight
    assert inward.weight() is not weight


def test_another_thread_trains_and_samples_meanwhile(mlp):
    x = torch.randn(4, 2, 3, 8)

    def train():
        mlp(x).square().sum().backward()
        return [parameter.grad for parameter in mlp.parameters()]

    def sample():
        with torch.no_grad(), octic.expanded_once(mlp):
            return mlp(x)

    with ThreadPoolExecutor(1) as other, torch.no_grad(), octic.expanded_once(mlp):
        expected, weight = mlp(x), mlp[0].weight()
        assert all(gradient.any() for gradient in other.submit(train).result())
        assert torch.equal(other.submit(sample).result(), expected)
        assert torch.equal(mlp(x), expected)
        assert mlp[0].weight() is weight
