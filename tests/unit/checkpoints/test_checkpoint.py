import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from efae.checkpoints import checkpoint
from efae.checkpoints.checkpoint import CheckpointError
from efae.config import Config, TrainingConfig
from efae.model.autoencoder import Autoencoder

ALL_FILES = (*checkpoint.CHECKPOINT_FILES, checkpoint.MANIFEST)
CONFIG = replace(Config(), training=TrainingConfig(seed=7))


def make_state(step: int = 12) -> dict:
    generator = torch.Generator().manual_seed(step)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "model": {"weight": draw(4, 6).T, "bias": draw(3).to(torch.bfloat16)},
        "ema": {"weight": draw(6, 4), "bias": draw(3)},
        "optimizer": {"step": torch.tensor(step), "weight.exp_avg": draw(4, 6), "none": draw(0)},
        "metadata": {"step": step, "images_seen": 2**60, "scaler": {"scale": 65536.0}, "rng": [1]},
        "config": CONFIG,
    }


def write(run: Path, step: int) -> Path:
    folder = run / checkpoint.checkpoint_name(step)
    checkpoint.write_checkpoint(folder, **make_state(step))
    return folder


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_bit_of_the_state_comes_back(tmp_path):
    state = make_state()
    checkpoint.write_checkpoint(tmp_path, **state)
    found = checkpoint.read_checkpoint(tmp_path)
    for part in ("model", "ema", "optimizer"):
        tensors = getattr(found, part)
        assert tensors.keys() == state[part].keys()
        for name, tensor in state[part].items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name], tensor)
    assert found.metadata == state["metadata"]
    assert found.config == CONFIG
    assert checkpoint.read_origin(str(tmp_path)) == (state["metadata"], CONFIG)


def test_equal_state_gives_equal_bytes(tmp_path):
    one, two = write(tmp_path / "a", 5), write(tmp_path / "b", 5)
    for name in ALL_FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_what_was_read_does_not_depend_on_the_files_any_more(tmp_path):
    checkpoint.write_checkpoint(tmp_path, **make_state())
    found = checkpoint.read_checkpoint(tmp_path)
    for name in ALL_FILES:
        (tmp_path / name).write_bytes(b"")
    assert torch.equal(found.ema["weight"], make_state()["ema"]["weight"])


@pytest.mark.parametrize("name", checkpoint.CHECKPOINT_FILES)
def test_one_flipped_bit_is_found(tmp_path, name):
    folder = write(tmp_path, 3)
    damage(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is damaged") as caught:
        checkpoint.read_checkpoint(folder)
    assert caught.value.uri == str(folder)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file_is_named(tmp_path, name):
    folder = write(tmp_path, 3)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        checkpoint.read_checkpoint(folder)


def test_the_manifest_cannot_name_other_files(tmp_path):
    folder = write(tmp_path, 3)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"]["../secret"] = manifest["files"].pop(checkpoint.MODEL)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"lists .*\.\./secret"):
        checkpoint.read_checkpoint(folder)


def test_another_format_version_is_refused(tmp_path):
    folder = write(tmp_path, 3)
    path = folder / checkpoint.MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(CheckpointError, match="format version 99"):
        checkpoint.read_checkpoint(path.parent)


def test_state_that_is_not_json_is_refused_before_the_folder_is_touched(tmp_path):
    state = make_state()
    state["metadata"]["loss"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_checkpoint(tmp_path / "new", **state)
    assert not (tmp_path / "new").exists()


def test_names_sort_as_steps_do():
    steps = [0, 9, 10, 99_999_999]
    names = [checkpoint.checkpoint_name(step) for step in steps]
    assert names == sorted(names)
    assert names[1] == "step-00000009"


@pytest.mark.parametrize("name", checkpoint.CHECKPOINT_FILES)
def test_a_write_that_fails_midway_leaves_no_manifest_not_even_an_old_one(tmp_path, name):
    folder = write(tmp_path, 10)
    (folder / name).unlink()
    (folder / name).mkdir()  # so that this file cannot be written
    with pytest.raises(IsADirectoryError):
        checkpoint.write_checkpoint(folder, **make_state(10))
    assert not (folder / checkpoint.MANIFEST).exists()


def test_a_model_is_no_checkpoint_to_go_on_from(tmp_path):
    Autoencoder(CONFIG).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="it is a model"):
        checkpoint.read_checkpoint(tmp_path)


def test_a_checkpoint_read_as_a_model_gives_the_ema(tmp_path):
    folder = write(tmp_path, 3)
    (folder / checkpoint.OPTIMIZER).unlink()  # not needed, so not read
    model = checkpoint.read_model(str(folder))
    assert torch.equal(model.weights["weight"], make_state(3)["ema"]["weight"])
    assert model.config == CONFIG


def test_the_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(CheckpointError("s3://bucket/run", "model is missing")))
    assert (error.uri, error.reason) == ("s3://bucket/run", "model is missing")
    assert str(error) == "s3://bucket/run: model is missing"
