"""The studies of generators: their images, arms, measures and resumption, at tiny sizes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.downstream import generators, prediction, symmetry
from benchmarks.downstream.images import CLASSES, build_images, read_images, tell_class
from benchmarks.downstream.study import Settings, Study
from benchmarks.downstream.tokenizers import configure, select_shards
from data_pipelines import ShardDataset
from efae.model.representation import check_model
from efae.symmetry import D4
from efae.training.tasks.generator import read_labels

TINY = {
    "generator.hidden_size": 32,
    "generator.depth": 1,
    "flow.sampler_steps": 1,
    "training.global_batch_size": 8,
}
SMALL = {"model.hidden_size": 32, "model.encoder_hidden_size": 32, "model.depth": 1}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> Path:
    """Idx files of few images, two sloping ramps by label."""
    folder = tmp_path_factory.mktemp("fashion")
    for part, count in (("train", 72), ("t10k", 40)):
        rng = np.random.default_rng(count)
        labels = rng.integers(0, 2, count).astype(np.uint8)
        ramp = np.linspace(0, 200, 28).astype(np.uint8)
        images = np.where(labels[:, None, None], ramp, ramp[:, None]) + rng.integers(
            0, 50, (count, 28, 28), dtype=np.uint8
        )
        header = np.array([count, 28, 28], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + header + images.astype(np.uint8).tobytes()
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + header[:4] + labels.tobytes()
        )
    return folder


@pytest.fixture
def tiny(fashion, tmp_path_factory, monkeypatch):
    """Settings of a study of a few seconds; all calls share images, models and results."""
    monkeypatch.setattr("benchmarks.downstream.generators.NETWORK", generators.NETWORK | TINY)
    monkeypatch.setattr("benchmarks.downstream.symmetry.EQUIVARIANT", symmetry.EQUIVARIANT | TINY)
    monkeypatch.setattr("benchmarks.downstream.tokenizers.BASE", SMALL)
    monkeypatch.setattr("benchmarks.downstream.study.FIRST_HALF", 36)
    monkeypatch.setattr("benchmarks.downstream.study.TIMED_STEPS", 3)
    monkeypatch.setattr("benchmarks.downstream.study.TIMED_ROUNDS", 1)
    monkeypatch.setattr("efae.latents.set_features._STEPS", 10)
    folder = tmp_path_factory.getbasetemp() / "downstream"
    return Settings(
        fashion,
        folder,
        folder / "results",
        seeds=1,
        sizes=(8, 16),
        upright_size=16,
        generator_seconds=1e-9,
        tokenizer_seconds=1e-9,
        samples=12,
        evaluated=8,
    )


@pytest.fixture
def studied(tiny):
    """A study of every arm on both kinds of images, with what it said."""
    said: list[str] = []
    study = Study("symmetry", tiny, said.append)
    return study, said, symmetry.compare(study)


class TestImages:
    def test_images_in_any_pose_are_turned_once(self, fashion, tmp_path):
        build_images(fashion, tmp_path)
        upright, labels = read_images(tmp_path / "train", "upright")
        turned, same_labels = read_images(tmp_path / "train", "any")
        again, _ = read_images(tmp_path / "train", "any")
        assert torch.equal(turned, again)
        assert torch.equal(labels, same_labels)
        is_view = torch.stack([(g.act_on_image(upright) == turned).flatten(1).all(1) for g in D4])
        assert is_view.any(0).all()
        assert len(is_view.float().argmax(0).unique()) > 4

    def test_a_folder_without_the_images_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="holds no train-images"):
            build_images(tmp_path, tmp_path / "set")

    def test_seeds_have_images_of_their_own(self, studied):
        study, _, _ = studied
        sets = [ShardDataset.open(str(study.generator_images("any", seed))) for seed in (0, 1)]
        first, second = (torch.cat([b.image for b in s.loader(8, shuffle=False)]) for s in sets)
        assert len(first) == len(second) == 16
        assert not (first[:, None] == second[None]).flatten(2).all(2).any()
        with pytest.raises(ValueError, match="use fewer --seeds"):
            study.generator_images("any", 2)


class TestSymmetry:
    def test_every_arm_has_its_runs_and_none_is_repeated(self, studied, tiny, capsys):
        _, _, results = studied
        keys = [(run["pose"], run["size"], run["arm"]) for run in results["runs"]]
        any_pose = [name for name, arm in symmetry.ARMS.items() if "any" in arm.poses]
        upright = [name for name, arm in symmetry.ARMS.items() if "upright" in arm.poses]
        assert len(keys) == len(set(keys)) == 2 * len(any_pose) + len(upright)
        by_arm = {run["arm"]: run for run in results["runs"] if run["size"] == 16}
        assert by_arm["plain, eight stored copies"]["stored_latents"] == 8 * 16
        assert by_arm["plain, as stored"]["largest_difference"] > 0.01
        assert by_arm["exact, as stored"]["largest_difference"] < 1e-4
        assert not results["settings"].keys() & {"images", "folder", "results"}
        symmetry.print_tables(json.loads(json.dumps(results)))
        assert all(f"| {name} |" in capsys.readouterr().out for name in any_pose[:1])
        said: list[str] = []
        assert symmetry.compare(Study("symmetry", tiny, said.append)) == results
        assert said == []

    def test_stored_copies_tell_their_element(self, studied):
        study, _, _ = studied
        uri = study.folder / "any" / "plain-latents-0"
        latents = select_shards(ShardDataset.open(str(uri)), 8, copies=True)
        batches = list(latents.loader(8, shuffle=False, members=("cls",)))
        told = {
            key: int(c) for b in batches for key, c in zip(b.key, b.members["cls"], strict=True)
        }
        assert len(told) == 64
        assert all(D4[key[7:]] == D4[c % 8] for key, c in told.items())
        labels = torch.cat([read_labels(batch, CLASSES * len(D4)) for batch in batches])
        assert int(labels.max()) < CLASSES * len(D4)
        assert {tell_class(0), tell_class(1)} == {c for key, c in told.items() if "ident" in key}

    def test_naive_flips_move_cells_alone(self, studied):
        study, _, _ = studied
        latents = ShardDataset.open(str(study.folder / "any" / "plain-latents-0"))
        config = symmetry.claim_views(generators.configure(latents, {}), latents, 1.0)
        model = generators.Generator(config)
        latent = torch.randn(1, *latents.format.shape)
        for g in D4:
            assert torch.equal(model.representation.act(g, latent), g.act_on_image(latent))

    def test_results_of_other_settings_are_refused(self, studied, tiny):
        with pytest.raises(ValueError, match="holds runs with the settings"):
            Study("symmetry", replace(tiny, samples=13), print)


class TestPrediction:
    def test_a_tokenizer_is_measured_with_its_generator(self, tiny, monkeypatch, capsys):
        monkeypatch.setattr(prediction, "TOKENIZERS", {"none": prediction.NONE | SMALL})
        results = prediction.compare(Study("prediction", tiny, print))
        (run,) = results["runs"]
        assert set(prediction.PREDICTORS) < run.keys()
        assert run["encoder_error"] > 0.1
        prediction.print_tables(results)
        assert "| none |" in capsys.readouterr().out

    def test_correlation(self):
        runs = [{"x": x, "fid": y, "fid_of_decodes": 3 * x} for x, y in enumerate([1, 2, 4, 8, 9])]
        whole, low, high, p = prediction.correlate(runs, "x", excess=False)
        assert [whole, low, high] == pytest.approx([1, 1, 1])
        assert p < 1e-6
        excess, low, high, _ = prediction.correlate(runs, "x", excess=True)
        assert excess == pytest.approx(-8 / 95**0.5)  # of 1, -1, -2, -1, -3
        assert low < excess < high


def test_every_tokenizer_can_be_built():
    shapes = set()
    for overrides in prediction.TOKENIZERS.values():
        config = configure(Path("images"), prediction.GRID | overrides)
        shapes.add(check_model(config).dim)
    assert len(prediction.TOKENIZERS) >= 12
    assert shapes == {4, 8, 16}
