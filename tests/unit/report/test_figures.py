"""The figures of a report draw what they were given."""

import numpy as np
import pytest
import torch
from PIL import Image

from efae.report.card import draw_reconstructions
from efae.report.charts import draw_rotations
from efae.report.image_grids import draw_orbit
from efae.symmetry import D4


def test_orbit_draws_the_pixels_it_was_given(tmp_path):
    # One colour per column: they must stand from left to right in the order of the group.
    colours = torch.linspace(-0.9, 0.9, 9)
    plain = torch.ones(1, 3, 8, 8)
    acted = {g.name: plain * colours[i + 1] for i, g in enumerate(D4)}
    draw_orbit(plain * colours[0], acted, tmp_path / "orbit.png")
    pixels = np.asarray(Image.open(tmp_path / "orbit.png").convert("RGB"))
    row = pixels[150 + 80, :, 0]  # through the middle of the only row of tiles
    seen = [int(value) for value in row[np.r_[True, row[1:] != row[:-1]]]]
    expected = ((colours + 1) * 127.5).round().int().tolist()
    assert [value for value in seen if value in expected] == expected


def test_orbit_prefers_examples_that_the_group_changes(tmp_path):
    symmetric = torch.full((1, 3, 8, 8), -0.5)
    corner = -torch.ones(1, 3, 8, 8)
    corner[..., :2, :5] = 1
    drawn = []
    for images in (torch.cat([symmetric, corner]), torch.cat([corner, symmetric]), corner):
        acted = {g.name: g.act_on_image(images) for g in D4}
        draw_orbit(images, acted, tmp_path / "orbit.png", examples=1)
        drawn.append((tmp_path / "orbit.png").read_bytes())
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (5, 3), (40, 3)])
def test_training_pictures_of_any_count_and_colour(tmp_path, count, channels):
    original = torch.rand(count, channels, 12, 12) * 2 - 1
    draw_reconstructions(original, original.clone() * 3, tmp_path / "pictures.png")
    draw_reconstructions(original, original.clamp(-1, 1), tmp_path / "equal.png")
    with Image.open(tmp_path / "pictures.png") as image, Image.open(tmp_path / "equal.png") as same:
        assert image.size == same.size
        assert image.tobytes() != same.tobytes()


@pytest.mark.parametrize("angles", [(15.0, 90.0), ("0.0", "90.0")])
def test_rotations_are_drawn_of_any_angles_and_models(tmp_path, angles):
    found = dict(psnr=20.0, encoder_error=0.5, gap_db=0.0, resampling_floor_db=40.0)
    rotations = dict.fromkeys(angles, found)
    worse = dict.fromkeys(angles, found | {"psnr": 10.0})
    for models in ({"one": rotations}, {"one": rotations, "two": rotations}, {"one": worse}):
        draw_rotations(models, tmp_path / f"{len(list(tmp_path.iterdir()))}.png")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 3
