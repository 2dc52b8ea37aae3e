"""Rates, decay, averages and seeds of a step, against their formulas."""

import itertools

import pytest
import torch

from efae.config import OptimizerConfig
from efae.training.ema import MovingAverage
from efae.training.loop import seed_of
from efae.training.optimizer import build_optimizer, learning_rate_at


def test_seeds_do_not_collide():
    seeds = {seed_of(s, step, rank) for s in range(3) for step in range(200) for rank in range(8)}
    assert len(seeds) == 3 * 200 * 8


def test_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_learning_rate_fraction=0.1)
    rates = [learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.001)


def test_weight_decay_spares_vectors():
    model = torch.nn.Linear(3, 2)
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(model, OptimizerConfig(weight_decay=0.5)).param_groups
        for p in group["params"]
    }
    assert decay == {id(model.weight): 0.5, id(model.bias): 0.0}


def test_moving_average_follows_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, decay=0.6)
    expected = float(model.weight.detach())
    for step in range(20):
        with torch.no_grad():
            model.weight.fill_(step)
        average.update(model, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(average.weights["weight"]) == pytest.approx(expected, rel=1e-5)
