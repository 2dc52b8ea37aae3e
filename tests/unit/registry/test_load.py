"""efae.load reads every folder that we write, and the models that come with the package."""

import json
import subprocess
import sys

import pytest
import torch

import efae
from efae.checkpoints import checkpoint
from efae.config import Config
from efae.config_forms import with_overrides
from efae.model import pretrained
from efae.registry import pull
from efae.registry.cache import fetch_model

TINY = with_overrides(
    Config(),
    {
        "data.resolution": 16,
        "model.hidden_size": 32,
        "model.encoder_hidden_size": 32,
        "model.depth": 1,
    },
)


@pytest.fixture(scope="module")
def model() -> efae.Autoencoder:
    torch.manual_seed(0)
    return efae.Autoencoder(TINY)


def save_pretrained(model, folder):
    model.save_pretrained(folder, card="# mine")
    return folder


def write_checkpoint(model, folder):
    weights = model.state_dict()
    checkpoint.write_checkpoint(
        folder,
        model={"raw": torch.zeros(2)},
        ema=weights,
        optimizer={},
        metadata={"step": 1},
        config=TINY,
    )
    return folder


def pull_to_cache(model, folder):
    """What the registry's cache holds of a version."""
    stored = folder / "stored"
    checkpoint.write_model(stored, model.state_dict(), TINY, {})
    return fetch_model("models:/tiny/1", lambda name: (stored / name).read_bytes(), folder)


WRITERS = {
    "save_pretrained": save_pretrained,
    "checkpoint": write_checkpoint,
    "registry's cache": pull_to_cache,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_folder_of_a_model_loads(write, model, tmp_path):
    folder = write(model, tmp_path)
    loaded = efae.load(folder)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config == TINY
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_is_pulled_as_the_files_that_a_model_needs(write, model, tmp_path):
    folder = write(model, tmp_path / "here")
    copy = pull.pull(str(folder), tmp_path / "there")
    assert {path.name for path in copy.iterdir()} - {checkpoint.MANIFEST} == {
        *pull.find_files(copy)
    }
    weights, config = pull.read(copy)
    assert config == TINY
    assert set(weights) == set(model.state_dict())
    assert efae.load(copy).config == TINY


def test_a_damaged_folder_of_save_pretrained_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with (tmp_path / pretrained.WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ValueError, match="damaged"):
        efae.load(tmp_path)
    with pytest.raises(ValueError, match="damaged"):
        pull.pull(str(tmp_path))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        efae.load(tmp_path)


@pytest.mark.parametrize(
    "uri", ["builtin:", "builtin:openmoji", "builtin:../report", "builtin:a/b"]
)
def test_an_unknown_builtin_model_is_refused_with_the_list(uri):
    with pytest.raises(ValueError, match=f"{uri}'.*use builtin:openmoji-32"):
        efae.load(uri)
    with pytest.raises(ValueError, match=f"{uri}'.*use builtin:openmoji-32"):
        pull.pull(uri)


def test_the_builtin_model_loads_without_mlflow_ray_and_network():
    script = (
        "import socket, sys\n"
        "def refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "import efae\n"
        "model = efae.load('builtin:openmoji-32')\n"
        "print(sorted({'mlflow', 'ray', 's3fs', 'fsspec', 'webdataset'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


def test_the_builtin_model_is_small_credited_and_exactly_equivariant():
    model = efae.load("builtin:openmoji-32")
    folder = pull.pull("builtin:openmoji-32")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
    assert "OpenMoji" in (folder / pretrained.CARD).read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in (folder / pretrained.CARD).read_text(encoding="utf-8")
    assert json.loads((folder / pretrained.CONFIG).read_text())["group"] == "D4"
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(2, 3, 32, 32, generator=generator)
    latent = model.encode(image)
    for g in efae.D4:
        turned = model.encode(g.act_on_image(image))
        assert (turned - model.act(g, latent)).abs().max() < 1e-4
        one = model.decode(model.act(g, latent), noise=g.act_on_image(noise))
        other = g.act_on_image(model.decode(latent, noise=noise))
        assert (one - other).abs().max() < 1e-4
