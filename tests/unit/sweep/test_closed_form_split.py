"""The split in closed form, from a shard set whose best split is planted."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.build_shards import build_shards
from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.held_out import read_held_out
from efae.evaluation.measures import psnr, to_float
from efae.model.closed_form import Moments, fit_linear_map
from efae.sweep.closed_form import find_closed_form_split
from efae.symmetry import D4, Representation


def write_gradients(folder) -> str:
    """Write 40 flat images with a gradient in any direction, of any strength, and faint noise."""
    images = folder / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(16) - 7.5, np.arange(16) - 7.5)
    for i in range(40):
        along, down = generator.normal(0, 4, 2)
        grey = generator.uniform(110, 145) + along * x + down * y
        pixels = grey[..., None] + generator.normal(0, 2, (16, 16, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f"{i:02d}.png")
    build_shards(f"folder:{images}", str(folder / "set"), samples_per_shard=8)
    return str(folder / "set")


def test_gradients_need_a_plane_and_colours_their_invariants(tmp_path):
    uri = write_gradients(tmp_path)
    config = with_overrides(
        Config(),
        {
            "data.uri": uri,
            "data.held_out_uri": uri,
            "data.resolution": 16,
            "data.decode_threads": 1,
            "representation.dim": 5,
            "representation.rotation_dims": 0,
            "model.downsampling": 16,
            "training.global_batch_size": 8,
            "training.held_out_images": 32,
        },
    )
    found = find_closed_form_split(config)
    assert found["multiplicities"] == {"a1": 3, "a2": 0, "b1": 0, "b2": 0, "e": 1}
    images = read_held_out(config.data, 40)
    rho = Representation(D4, **found["multiplicities"])
    fitted = fit_linear_map(Moments.of(images, 16), rho, 16)
    held_out = to_float(images[:32])
    expected = psnr(fitted.reconstruct(held_out, 16).clamp(-1, 1), held_out).mean()
    assert found["linear_psnr"] == pytest.approx(float(expected), abs=1e-4)
    torch.manual_seed(0)
    assert find_closed_form_split(config) == found
    large = {"data.resolution": 48, "model.patch_size": 48, "model.downsampling": 48}
    assert find_closed_form_split(with_overrides(config, large)) is None
