"""Every variant of the ablation learns at the rate that its row says."""

import pytest
import torch

from benchmarks.ablate import list_variants, train
from efae.config.forms import with_overrides
from efae.presets import PRESETS


@pytest.mark.parametrize("name", ["exact, narrow", "none, narrow", "sketch"])
def test_two_learning_rates_give_two_models(name):
    base = PRESETS["fashion_mnist"][1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 1, 32, 32), generator=generator, dtype=torch.uint8)

    def weights(rate):
        config = with_overrides(
            base,
            list_variants(base)[name]
            | {"optimizer.learning_rate": rate, "training.global_batch_size": 4},
        )
        trained, _ = train(name, config, images, steps=2)
        return torch.cat([p.detach().flatten() for p in trained.model.parameters()])

    assert not torch.equal(weights(1e-3), weights(4e-3))
    assert torch.equal(weights(1e-3), weights(1e-3))
