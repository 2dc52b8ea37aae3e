"""efae.load reads every folder that we write, and the models that come with the package."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import safetensors.torch
import torch

import efae
from efae.checkpoints import checkpoint
from efae.config import Config
from efae.config.forms import with_overrides
from efae.model import pretrained
from efae.model.stored_files import CONFIG, WEIGHTS, read_from
from efae.registry import pull
from efae.registry.cache import fetch_model
from jobs import export
from tests.opened_files import watch_opens

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
    stored = save_pretrained(model, folder / "stored")
    read = read_from(stored)
    return fetch_model("models:/tiny/1", read, folder)[0]


def register_before_version_3(model, folder):
    """What the registry stored before a version was what save_pretrained writes."""
    files = {
        "model.safetensors": safetensors.torch.save(model.state_dict()),
        "config.json": json.dumps(asdict(TINY)).encode(),
    }
    hashes = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    manifest = {"format_version": 2, "card": {"psnr": 24.5}, "files": hashes}
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


WRITERS = {
    "save_pretrained": save_pretrained,
    "checkpoint": write_checkpoint,
    "registry's cache": pull_to_cache,
    "registered before version 3": register_before_version_3,
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
    stored = pull.read(str(copy))
    assert {path.name for path in copy.iterdir()} == {*stored.files}
    assert {*stored.files} == {stored.weights_file, "config.json", "manifest.json"}
    for name, data in stored.files.items():
        assert (folder / name).read_bytes() == data
    assert stored.config == TINY
    assert set(stored.weights) == set(model.state_dict())
    assert efae.load(copy).config == TINY


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_an_export_is_what_save_pretrained_writes(write, model, tmp_path, capsys):
    folder = write(model, tmp_path / "here")
    there = tmp_path / "there"
    arguments = ["--model", str(folder), "--format"]
    assert export.main([*arguments, "diffusers", "--output", str(there)]) == 0
    model.save_pretrained(tmp_path / "saved")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == saved
    capsys.readouterr()
    dry = ["hub", "--output", "me/drawings", "--hub.dry-run", "--hub.no-onnx"]
    assert export.main([*arguments, *dry]) == 0
    sizes = dict(
        re.findall(r"^  me/drawings  (\S+) +([\d,]+) bytes$", capsys.readouterr().out, re.M)
    )
    assert sizes.pop("README.md")
    assert sizes == {name: f"{len(data):,}" for name, data in saved.items()}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_load_opens_each_file_once(write, model, tmp_path):
    folder = write(model, tmp_path / "here")
    efae.load(folder)  # imports are done
    with watch_opens() as opened:
        efae.load(folder)
    of_the_model = sorted(path for path in opened if path.startswith(f"{folder}/"))
    stored = pull.read(str(folder))
    assert of_the_model == sorted(str(folder / name) for name in stored.files)


def test_a_damaged_folder_of_save_pretrained_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with (tmp_path / WEIGHTS).open("r+b") as file:
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
    assert json.loads((folder / CONFIG).read_text())["group"] == "D4"
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
