"""The comparison of sizes: its shard sets, its models, and what it measures of them."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import compare_sizes
from benchmarks.compare_sizes import Arguments, Stopwatch, choose_data, compare, print_tables
from data_pipelines.build_shards import build_shards
from efae.config.forms import with_overrides
from efae.presets import PRESETS

BASE = with_overrides(
    PRESETS["photographs_64"][1],
    {
        "data.resolution": 16,
        "representation.dim": 8,
        "model.hidden_size": 32,
        "model.depth": 1,
        "model.fine_hidden_size": 8,
        "model.encoder_hidden_size": 32,
        "model.encoder_depth": 1,
        "optimizer.warmup_steps": 1,
        "training.global_batch_size": 4,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sets of 16 and 24 px, of ten images to train on and six held out."""
    path = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for side in (16, 24):
        (path / "images").mkdir(exist_ok=True)
        for number in range(16):
            coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((side, side)).save(path / "images" / f"{number:02d}.png")
        build_shards(f"folder:{path / 'images'}", str(path / str(side)), held_out=6)
    return path


def test_images_come_from_the_smallest_set_that_covers_them_in_batches_of_equal_pixels(folder):
    found = {
        size: choose_data(BASE, folder, size) for size in ((16, 16), (16, 24), (24, 24), (8, 8))
    }
    sets = {size: config.data.held_out_uri for size, config in found.items()}
    small, large = str(folder / "16" / "held_out"), str(folder / "24" / "held_out")
    assert sets == {(16, 16): small, (16, 24): large, (24, 24): large, (8, 8): small}
    assert [config.training.global_batch_size for config in found.values()] == [4, 3, 2, 16]
    with pytest.raises(ValueError, match="no set of 32 px or more"):
        choose_data(BASE, folder, (32, 8))


def test_a_step_takes_what_the_quickest_window_took():
    stopwatch = Stopwatch()
    gaps = [9.0] + 10 * [0.01] + 12 * [3.0] + 12 * [2.0]  # the warm-up is no measurement
    stopwatch.times = np.cumsum(gaps).tolist()
    assert stopwatch.measure_step() == pytest.approx(2.0)


def test_every_model_is_measured_where_the_table_needs_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_sizes, "RESULTS", tmp_path)
    monkeypatch.setattr(compare_sizes, "TRIAL_STEPS", 5)
    monkeypatch.setattr(compare_sizes, "WINDOW", 2)
    arguments = Arguments(
        folder, sizes=((16, 24),), cpu_seconds=0.1, distill_cpu_seconds=0.1, distill_steps=(2,)
    )
    said: list[str] = []
    results = compare(BASE, arguments, said.append)
    assert list(results["linear_map"]) == ["16 x 16", "16 x 24"]
    measured = {name: list(row["psnr"]) for name, row in results["sizes"].items()}
    assert measured == {
        "unet, 16 x 16": ["16 x 16", "16 x 24"],
        "transformer, 16 x 16": ["16 x 16", "16 x 24"],
        "unet, 16 x 24": ["16 x 24"],
    }
    assert list(results["steps"]) == ["teacher", "student of 2 steps"]
    for row in results["steps"].values():
        assert list(row["decodes"]) == [1, 2, 4]
        assert row["decodes"][1]["psnr"] > 10
        speeds = [found["images_per_second"] for found in row["decodes"].values()]
        assert speeds[0] > speeds[2] > 0
    one = results["sizes"]["unet, 16 x 16"]
    assert one["psnr"]["16 x 16"] == results["steps"]["teacher"]["decodes"][1]["psnr"]
    assert len(said) == 5
    stored = json.loads((tmp_path / "sizes-photographs_64-0.json").read_text())
    assert stored == json.loads(json.dumps(results))
    print_tables(stored)
    printed = capsys.readouterr().out
    there = (one["psnr"]["16 x 16"], results["sizes"]["unet, 16 x 24"]["psnr"]["16 x 24"])
    assert f"| unet, that size | {there[0]:.2f} | {there[1]:.2f} |" in printed
    student = results["steps"]["student of 2 steps"]["decodes"][1]["psnr"]
    assert f"| student of 2 steps | 1 | {student:.2f} |" in printed
