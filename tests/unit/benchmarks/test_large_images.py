"""The benchmark of large photographs, with a small model and image."""

import pytest
import torch

from benchmarks.large_images import LEVELS, compare, print_table
from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder

SIZES = {
    "data.resolution": 16,
    "representation.dim": 12,
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 1,
    "model.downsampling": 4,
}


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    """A model with attention, whose tiles are an approximation."""
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_differences_are_from_the_whole_image_by_element(model, capsys):
    image = torch.rand(1, 3, 48, 64) * 2 - 1
    _, rows = compare(model, image, [64, 24])
    assert max(rows[64]["latent_difference"].values()) < 1e-5  # one tile: equivariance alone
    assert max(rows[64]["image_difference"].values()) < 1e-5 * LEVELS
    assert set(rows[24]["latent_difference"]) == {g.name for g in model.group}
    assert min(rows[24]["latent_difference"].values()) > 1e-4
    peaks = {action: {"peak_mib": 7.4, "cpu_seconds": 1.0} for action in ("encode", "decode")}
    print_table({"rows": [{"tile": None, **peaks}, {"tile": 64, **peaks, **rows[64]}]})
    assert "| none | 7 MiB | 7 MiB |  |  |\n| 64 | 7 MiB | 7 MiB | " in capsys.readouterr().out
