"""The comparison of fine-tuning: its budgets, what it keeps, and what it measures."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import compare_fine_tuning
from benchmarks.compare_fine_tuning import (
    ARMS,
    Arguments,
    best_rate,
    compare,
    list_arms,
    print_table,
)
from data_pipelines.build_shards import build_shards
from efae.symmetry import D4, MIRROR, Representation


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of 16 px to train on, and four held out."""
    path = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    (path / "files").mkdir()
    for number in range(16):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((16, 16)).save(path / "files" / f"{number:02d}.png")
    build_shards(f"folder:{path / 'files'}", str(path / "shards"), held_out=4)
    return path / "shards"


@pytest.fixture
def arguments(images, tmp_path, monkeypatch):
    """Options of a tiny comparison, whose results go to a folder of its own."""
    monkeypatch.setattr(compare_fine_tuning, "RESULTS", tmp_path)
    monkeypatch.setattr(compare_fine_tuning, "WIDTHS", (8, 8, 8))
    return Arguments(
        name="tiny",
        train=str(images / "train"),
        held_out=str(images / "held_out"),
        models=tmp_path / "models",
        resolution=16,
        steps=16,
        batch_size=4,
        images=2,
        learning_rates=(1e-3,),
        seeds=1,
        arms=("control", "spatial", "fitted_mirror"),
    )


def test_a_fit_that_finds_the_spatial_action_is_not_trained(arguments):
    arguments.arms = ()
    spatial, turning = Representation(D4, a1=4), Representation(D4, a1=3, b1=1)
    mirror, flipping = Representation(MIRROR, a1=4), Representation(MIRROR, a1=3, a2=1)
    assert list_arms(arguments, {"D4": turning, "mirror": flipping}) == list(ARMS)
    one = list_arms(arguments, {"D4": spatial, "mirror": flipping})
    assert one == ["control", "spatial", "split", "mirror", "fitted_mirror"]
    none = list_arms(arguments, {"D4": spatial, "mirror": mirror})
    assert none == ["control", "spatial", "split", "mirror"]


def test_the_best_rate_is_that_of_the_first_seed():
    runs = [(0, 1e-3, 20.0), (0, 5e-4, 21.0), (1, 1e-3, 22.0)]
    entry = {"runs": [{"seed": s, "learning_rate": r, "psnr": p} for s, r, p in runs]}
    assert best_rate(entry) == 5e-4


@pytest.mark.slow
def test_finished_runs_are_kept_as_long_as_the_autoencoder_is(arguments, tmp_path, capsys):
    said: list[str] = []
    results = compare(arguments, said.append)
    arms = results["arms"]
    # The pair term encodes once more, which costs less than half of a step.
    assert {arm: entry["steps"] for arm, entry in arms.items()} == {
        "control": 3,
        "spatial": 2,
        "fitted_mirror": 2,
    }
    (fitted,) = arms["fitted_mirror"]["runs"]
    assert fitted["representation"] == results["fitted_actions"]["mirror"]["representation"]
    (spatial,) = arms["spatial"]["runs"]
    assert list(results["from_scratch"]["psnr_by_step"]) == list(range(2, 17, 2))
    assert results["before"]["drift"] == 0 < spatial["drift"]
    assert results["before"]["psnr"] == pytest.approx(
        results["from_scratch"]["psnr_by_step"][16], abs=1e-3
    )
    assert spatial["symmetrized"]["worst_gap_db"] < 1e-4 < spatial["worst_gap_db"]
    stored = json.loads((tmp_path / "fine_tuning-tiny-4.json").read_text())
    assert stored == json.loads(json.dumps(results))

    said.clear()
    arguments.seeds, arguments.arms = 2, ("control",)
    again = compare(arguments, said.append)
    assert [line.split(":")[0] for line in said] == ["control, lr 0.001, seed 1"]
    assert again["arms"]["spatial"] == arms["spatial"]
    first, second = again["arms"]["control"]["runs"]
    assert [first] == arms["control"]["runs"]
    assert second["psnr"] != first["psnr"]
    print_table(again)
    printed = capsys.readouterr().out
    assert f"| control | 0.001 | 3 | {(first['psnr'] + second['psnr']) / 2:.2f} ± " in printed
    averaged = spatial["symmetrized"]["psnr"]
    assert f"| spatial, averaged over the group |  |  | {averaged:.2f} |" in printed

    (tmp_path / "models" / "tiny-4" / "diffusion_pytorch_model.safetensors").unlink()
    arguments.seeds, arguments.steps = 0, 1
    anew = compare(arguments, said.append)
    assert list(anew["from_scratch"]["psnr_by_step"]) == [1]
    assert anew["before"] != results["before"]
    assert anew["arms"] == {}
