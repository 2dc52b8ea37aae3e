"""A folder in the style of diffusers gives back the very model, or says which file is not right."""

import hashlib
import json
import pickle
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from efae.config import Config
from efae.config_forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import CARD, CONFIG, WEIGHTS, write_pretrained
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
    assert settings["group"] == "D4"
    planes = settings["representation"].pop("e")
    assert sum(settings["representation"].values()) + 2 * planes == 16
    assert 2 ** (len(settings["block_out_channels"]) - 1) == 8


def test_the_folder_holds_two_files_and_a_card_if_there_is_one(folder, model):
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
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
    with pytest.raises(ValueError, match=str(folder)) as caught:
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
    (folder / WEIGHTS).write_bytes(pickle.dumps(Planted()))
    refuse(folder, WEIGHTS, "not a complete safetensors file")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refuse(folder, f"{name} is missing")


def test_no_folder_is_not_downloaded(tmp_path):
    refuse(tmp_path / "user" / "model", "not downloaded")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_weights_that_are_cut_off_are_refused(folder, share):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(len(whole) * share)])
    refuse(folder, WEIGHTS, "not a complete safetensors file")


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
    refuse(folder, CONFIG, "another model")


def test_an_edited_configuration_is_refused(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"scaling_factor": 1.0', '"scaling_factor": 0.5'))
    refuse(folder, CONFIG, "was changed")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "AutoencoderKL"}, "class AutoencoderKL, not AutoencoderEFAE"),
        ({"surprise": 1}, "unknown settings surprise"),
        ({"efae": None}, "not valid for efae"),
        (None, "has no _efae_version"),
    ],
)
def test_other_settings_are_named(folder, change, said):
    settings = json.loads((folder / CONFIG).read_text())
    if change is None:
        del settings["_efae_version"]
    sign(folder, settings | (change or {}))
    refuse(folder, CONFIG, said)


def test_settings_of_a_newer_efae_are_named(folder):
    settings = json.loads((folder / CONFIG).read_text()) | {"_efae_version": "9.9"}
    settings["efae"]["model"]["telepathy"] = True
    sign(folder, settings)
    refuse(folder, CONFIG, "efae 9.9", "telepathy")


@pytest.mark.parametrize("text", ["[]", "{", "", "\x80\x04"])
def test_what_is_no_configuration_is_refused(folder, text):
    (folder / CONFIG).write_text(text, encoding="latin-1")
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
        write_pretrained(tmp_path / name, weights, model.config, model.representation)
        refuse(tmp_path / name, WEIGHTS, said)


def test_a_foreign_safetensors_file_is_refused(folder, model):
    safetensors.torch.save_file(model.state_dict(), folder / WEIGHTS)
    refuse(folder, WEIGHTS, "config_sha256", "not written by efae")


def sign(folder, settings) -> None:
    """Replace the configuration, and its hash in the header of the weights."""
    text = json.dumps(settings)
    (folder / CONFIG).write_text(text)
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    metadata["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata)
