"""A folder in the style of diffusers gives back the very model, or says which file is not right."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import CARD, StoredModel, pack_model
from efae.model.stored_files import (
    CONFIG,
    MANIFEST,
    MODEL_FILES,
    WEIGHTS,
    CheckpointError,
    dump_manifest,
)
from efae.symmetry import D4

SIZES = {
    "data.resolution": 16,
    "model.hidden_size": 16,
    "model.encoder_hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 1,
    "representation.dim": 16,
    "flow.sampler_steps": 2,
}
VARIANTS = {
    "exact": {},
    "kl": {"model.bottleneck": "kl"},
    "not square": {"data.resolution": (16, 32), "representation.group": "flips"},
    "learned basis": {"model.level": "objective", "representation.learned_basis": True},
    "three pixels": {"data.resolution": 12, "model.patch_size": 3, "model.downsampling": 6},
}


def build(seed: int = 0, **overrides) -> Autoencoder:
    torch.manual_seed(seed)
    model = Autoencoder(with_overrides(Config(), SIZES | overrides)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # a new decoder's output is zero
            weight.add_(0.1 * torch.randn_like(weight))
        model.bottleneck.power.uniform_(0.5, 2)  # as training leaves it, not 1
    return model


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    return build()


@pytest.fixture
def folder(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_every_tensor_and_every_setting_comes_back(tmp_path, overrides):
    model = build(**overrides)
    model.save_pretrained(tmp_path)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert loaded.config == model.config
    weights, expected = loaded.state_dict(), model.state_dict()
    assert list(weights) == list(expected)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor), name


def test_it_is_for_inference_and_works_alike(folder, model):
    loaded = Autoencoder.from_pretrained(folder)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    latent = loaded.encode(image)
    assert torch.equal(latent, model.encode(image))
    turned = loaded.act(D4["rot90"], latent)
    assert torch.equal(loaded.decode(turned, seed=0), model.decode(turned, seed=0))


def test_half_precision_stays_as_it_was_saved(tmp_path):
    model = build().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for name, tensor in Autoencoder.from_pretrained(tmp_path).state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, model.state_dict()[name])


def test_the_configuration_says_what_latent_diffusion_reads(tmp_path):
    build().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["_class_name"] == "AutoencoderEFAE"
    assert (settings["latent_channels"], settings["sample_size"]) == (16, 16)
    assert (settings["scaling_factor"], settings["shift_factor"]) == (1.0, 0.0)
    assert settings["force_upcast"] is False
    assert settings["group"] == "D4"
    planes = settings["representation"].pop("e")
    assert sum(settings["representation"].values()) + 2 * planes == 16
    assert 2 ** (len(settings["block_out_channels"]) - 1) == 8


def test_the_folder_holds_three_files_and_a_card_if_there_is_one(folder, model):
    assert {path.name for path in folder.iterdir()} == {*MODEL_FILES, MANIFEST}
    model.save_pretrained(folder, card="# mine é")
    assert (folder / CARD).read_text(encoding="utf-8") == "# mine é"
    model.save_pretrained(folder)  # does not take it away
    assert (folder / CARD).exists()


def test_weights_do_not_follow_a_file_that_changes(folder, model):
    loaded = Autoencoder.from_pretrained(folder)
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(bytes((folder / WEIGHTS).stat().st_size))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def refuse(folder, *parts):
    with pytest.raises(CheckpointError, match=str(folder)) as caught:
        Autoencoder.from_pretrained(folder)
    for part in parts:
        assert part in str(caught.value)


class Planted:
    """Would leave a trace if it were unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "x.pt", "old.CKPT", "a.pkl"])
def test_a_planted_pickle_is_named_and_not_opened(folder, name, capsys):
    (folder / name).write_bytes(pickle.dumps(Planted()))
    refuse(folder, name, "pickle")
    assert not capsys.readouterr().out


def test_a_pickle_under_our_name_is_no_safetensors_file(folder, capsys):
    rewrite(folder, WEIGHTS, pickle.dumps(Planted()))
    refuse(folder, WEIGHTS, "not a safetensors file")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", [*MODEL_FILES, MANIFEST])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refuse(folder, f"{name} is missing")


def test_no_folder_is_not_downloaded(tmp_path):
    refuse(tmp_path / "user" / "model", "not downloaded")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_weights_that_are_cut_off_are_refused(folder, share):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(len(whole) * share)])
    refuse(folder, WEIGHTS, f"bytes, not {len(whole)}")
    rewrite(folder, WEIGHTS, whole[: int(len(whole) * share)])
    refuse(folder, WEIGHTS, "not a safetensors file")


def test_one_flipped_bit_is_noticed(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    refuse(folder, WEIGHTS, "damaged")


def test_the_configuration_of_another_model_is_refused(tmp_path, folder, model):
    """The weights would fit: only the sampler differs."""
    other = build()
    other.config = replace(model.config, flow=replace(model.config.flow, sampler_steps=7))
    other.save_pretrained(tmp_path / "other")
    (folder / CONFIG).write_bytes((tmp_path / "other" / CONFIG).read_bytes())
    refuse(folder, CONFIG, "its sha256 is not the manifest's")


def test_an_edited_configuration_is_refused(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"scaling_factor": 1.0', '"scaling_factor": 0.5'))
    refuse(folder, CONFIG, "its sha256 is not the manifest's")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "AutoencoderKL"}, "class AutoencoderKL, not AutoencoderEFAE"),
        ({"efae": None}, "not valid for this efae"),
        (None, "not valid for this efae"),
    ],
)
def test_other_settings_are_named(folder, change, said):
    settings = json.loads((folder / CONFIG).read_text())
    if change is None:
        del settings["efae"]
    rewrite(folder, CONFIG, json.dumps(settings | (change or {})).encode())
    refuse(folder, CONFIG, said)


def test_settings_of_a_newer_efae_are_named(folder):
    settings = json.loads((folder / CONFIG).read_text()) | {"_efae_version": "9.9"}
    settings["efae"]["model"]["telepathy"] = True
    rewrite(folder, CONFIG, json.dumps(settings).encode())
    refuse(folder, CONFIG, "efae 9.9", "telepathy")


@pytest.mark.parametrize("text", ["[]", "{", "", "\x80\x04"])
def test_what_is_no_configuration_is_refused(folder, text):
    rewrite(folder, CONFIG, text.encode("latin-1"))
    refuse(folder, CONFIG, "not the configuration of a model")


def test_tensors_that_do_not_fit_are_named(tmp_path, model):
    for name, change, said in (
        ("missing", lambda w: w.pop("bottleneck.power"), "bottleneck.power is missing"),
        ("unknown", lambda w: w.update(extra=torch.zeros(1)), "extra is unknown"),
        (
            "shape",
            lambda w: w.update({"bottleneck.power": torch.ones(2)}),
            "bottleneck.power has shape (2,), not (5,)",
        ),
    ):
        weights = dict(model.state_dict())
        change(weights)
        pack_model(weights, model.config, model.representation).write(tmp_path / name)
        refuse(tmp_path / name, WEIGHTS, said)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_write_that_fails_midway_leaves_no_manifest_not_even_an_old_one(folder, model, name):
    (folder / name).unlink()
    (folder / name).mkdir()  # so that this file cannot be written
    with pytest.raises(IsADirectoryError):
        model.save_pretrained(folder)
    refuse(folder)
    assert not (folder / MANIFEST).exists()


def test_equal_models_give_equal_bytes_and_the_digest_of_the_weights(folder, model):
    packed = pack_model(model.state_dict(), model.config, model.representation)
    for name in (*MODEL_FILES, MANIFEST):
        assert (folder / name).read_bytes() == packed.files[name]
    assert packed.digest == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def save_before_manifests(model: Autoencoder, folder: Path) -> StoredModel:
    """Write the folder as save_pretrained did before format version 3."""
    packed = pack_model(model.state_dict(), model.config, model.representation)
    digest = hashlib.sha256()
    for name in sorted(packed.weights):
        tensor = packed.weights[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    folder.mkdir()
    (folder / CONFIG).write_bytes(packed.files[CONFIG])
    metadata = {
        "format": "pt",
        "config_sha256": hashlib.sha256(packed.files[CONFIG]).hexdigest(),
        "tensors_sha256": digest.hexdigest(),
    }
    safetensors.torch.save_file(dict(packed.weights), folder / WEIGHTS, metadata)
    return packed


def test_a_folder_without_a_manifest_is_read_if_the_header_of_its_weights_vouches(tmp_path, model):
    save_before_manifests(model, tmp_path / "old")
    loaded = Autoencoder.from_pretrained(tmp_path / "old")
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_changed_file_beside_such_a_header_is_named(tmp_path, model, name):
    folder = tmp_path / "old"
    save_before_manifests(model, folder)
    data = (folder / name).read_bytes()
    changed = data.replace(b'"scaling_factor": 1.0', b'"scaling_factor": 0.5')
    (folder / name).write_bytes(changed if name == CONFIG else data[:-1] + bytes([data[-1] ^ 1]))
    refuse(folder, name, "was changed" if name == CONFIG else "damaged")


def test_a_foreign_safetensors_file_is_refused(folder, model):
    safetensors.torch.save_file(model.state_dict(), folder / WEIGHTS)
    (folder / MANIFEST).unlink()
    refuse(folder, f"{MANIFEST} is missing")


def test_the_folder_of_another_library_is_named_as_such(folder):
    settings = json.loads((folder / CONFIG).read_text()) | {"_class_name": "AutoencoderKL"}
    (folder / CONFIG).write_text(json.dumps(settings))
    (folder / MANIFEST).unlink()
    refuse(folder, "class AutoencoderKL, not AutoencoderEFAE")


def rewrite(folder, name: str, data: bytes) -> None:
    """Replace a file, and the manifest with it."""
    (folder / name).write_bytes(data)
    contents = {name: (folder / name).read_bytes() for name in MODEL_FILES}
    (folder / MANIFEST).write_bytes(dump_manifest(contents, {}))
