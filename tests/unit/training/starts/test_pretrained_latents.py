"""The scale of pretrained latents: that of pipelines where they stay, and what depends on it."""

import json

import diffusers
import pytest
import torch

import efae
from efae.config import forms
from efae.evaluation.evaluate import measure_drift
from efae.evaluation.fitted_action import fit_action
from efae.evaluation.held_out import read_images
from efae.evaluation.measures import to_float
from efae.evaluation_task import _fit
from efae.exchange.diffusers_adapter import AutoencoderEFAE
from efae.exchange.diffusers_tokenizer import load_diffusers
from efae.model.autoencoder import Autoencoder
from efae.model.networks.diffusers_vae import CLASSES
from efae.symmetry import D4
from efae.training.starts.source import copy_source
from tests.unit.training.test_fine_tuning import (
    IMAGE,
    NOWHERE,
    change,
    configure,
    folders,
    restore,
    shards,
)

__all__ = ["folders", "shards"]

MEAN, STD = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 4.0]
PIPELINES = {
    "SD3": ({"shift_factor": 0.3}, lambda z: (z - 0.3) * 0.5),
    "SDXL": (
        {"latents_mean": MEAN, "latents_std": STD},
        lambda z: (z - torch.tensor(MEAN)[:, None, None]) * 0.5 / torch.tensor(STD)[:, None, None],
    ),
    "SD": ({"scaling_factor": None}, lambda z: z),
}


@pytest.mark.parametrize(
    "kept",
    [
        {"start.train": "decoder"},
        {"start.anchor_weight": 0.1},
        {"start.train": "decoder", "model.kind": "unet", "model.level": "exact"},
    ],
    ids=["frozen", "anchored", "flow decoder"],
)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_latents_that_stay_are_those_of_the_pipelines(folders, tmp_path, kept, pipeline):
    """Whatever the running power is by now; and the folder keeps the factors."""
    settings, arithmetic = PIPELINES[pipeline]
    folder = change(folders / "AutoencoderKL", tmp_path / "before", **settings)
    small = {"model.hidden_size": 32, "model.encoder_hidden_size": 32, "model.fine_hidden_size": 8}
    config = configure(folder, **kept, **small, **{"start.action": "spatial"})
    start = restore(config)
    model = Autoencoder(config)
    model.encoder.load_state_dict(start.encoder.state_dict())
    model.bottleneck.power.fill_(9.0)
    network = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        expected = arithmetic(network.encode(IMAGE).latent_dist.mode())
        for each in (model, start):
            torch.testing.assert_close(each.encode(IMAGE), expected)
            bounded = each.bounded(IMAGE)
            torch.testing.assert_close(each.denormalize(each.normalize(bounded)), bounded)
    model.save_pretrained(tmp_path / "after")
    if config.model.kind == "diffusers":
        found, before = (
            json.loads((tmp_path / name / "config.json").read_text())
            for name in ("after", "before")
        )
        assert found == before
    with torch.no_grad():
        torch.testing.assert_close(efae.load(tmp_path / "after").encode(IMAGE), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_an_encoder_that_did_not_move_has_no_drift(folders, tmp_path, name):
    """Whatever scale its latents have by now, and on either side of fine-tuning."""
    shifted = {"shift_factor": 0.5, "scaling_factor": 0.3} if name == "AutoencoderKL" else {}
    folder = change(folders / name, tmp_path / "before", **shifted)
    original, model = load_diffusers(str(folder)), restore(configure(folder))
    model.bottleneck.power.fill_(9.0)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert measure_drift(model, original, images) == 0
    model.save_pretrained(tmp_path / "after")
    assert measure_drift(load_diffusers(str(tmp_path / "after")), original, images) == 0
    with torch.no_grad():
        raw = original.bounded(to_float(images)).double()
        variance = (raw.square().mean() - raw.mean(0).square().mean()).item()
        for parameter in list(model.encoder.parameters())[-1:]:
            parameter.add_(0.5)  # the bias of all channels
    if name == "AutoencoderKL":
        assert measure_drift(model, original, images) == pytest.approx(0.25 / variance)


def test_the_adapter_decodes_in_fp16_what_overflows_there(folders, tmp_path):
    """As SDXL's activations do, which config.json says by force_upcast."""
    network = diffusers.AutoencoderKL.from_pretrained(
        folders / "AutoencoderKL", low_cpu_mem_usage=False
    )
    with torch.no_grad():
        for parameter in network.decoder.conv_in.parameters():
            parameter.mul_(3e5)
    network.register_to_config(force_upcast=True)
    network.save_pretrained(tmp_path / "before")
    restore(configure(tmp_path / "before")).save_pretrained(tmp_path / "after")
    images = []
    for dtype in (torch.float32, torch.float16):
        vae = AutoencoderEFAE.from_pretrained(tmp_path / "after", torch_dtype=dtype)
        with torch.no_grad():
            latent = vae.encode(IMAGE.to(dtype)).latent_dist.mode()
            images.append(vae.decode(latent).sample.float())
    torch.testing.assert_close(*images, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", CLASSES)
def test_the_adapter_has_the_posterior_of_the_autoencoder(folders, tmp_path, name):
    model = restore(configure(folders / name, **{"start.anchor_weight": 0.1}))
    model.save_pretrained(tmp_path)
    vae = AutoencoderEFAE.from_pretrained(tmp_path)
    found = vae.encode(IMAGE).latent_dist
    assert torch.equal(found.mean, model.encode(IMAGE))
    network = getattr(diffusers, name).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    with torch.no_grad():
        if name != "AutoencoderKL":
            assert found.deterministic
            return
        own = network.encode(IMAGE).latent_dist
        torch.testing.assert_close(found.std, own.std * 0.5)
        sample = found.sample(torch.Generator().manual_seed(0))
        expected = own.sample(torch.Generator().manual_seed(0)) * 0.5
        torch.testing.assert_close(sample, expected)
        turned = vae.decode(vae.act(D4["rot90"], sample)).sample
        torch.testing.assert_close(turned, network.decode(vae.act(D4["rot90"], expected) / 0.5)[0])
    based = restore(configure(folders / name, **{"representation.learned_basis": True}))
    with torch.no_grad():
        _, spread = based.encode_posterior(IMAGE)
        basis, deviation = based.basis.matrix().float(), own.std.movedim(1, -1) * 0.5
        whole = basis.T @ torch.diag_embed(deviation**2) @ basis
    torch.testing.assert_close(spread.movedim(1, -1) ** 2, whole.diagonal(dim1=-2, dim2=-1))


def test_channels_that_change_keep_no_shift_and_share_a_scale(folders, tmp_path):
    """A shift would not commute with a change of sign, nor scales with a change of basis."""
    factors = {"latents_mean": MEAN, "latents_std": STD}
    folder = change(folders / "AutoencoderKL", tmp_path / "before", **factors)
    kept = {"start.anchor_weight": 0.1, "representation.multiplicities": (3, 0, 1, 0, 0)}
    scale = 0.5 / (sum(std**2 for std in STD) / 4) ** 0.5
    for based in (False, True):
        model = restore(configure(folder, **kept, **{"representation.learned_basis": based}))
        with torch.no_grad():
            bounded = model.bounded(IMAGE)
            shift = model.to_irreps(torch.tensor(MEAN).view(1, 4, 1, 1))
            shift[:, 3] = 0
            torch.testing.assert_close(model.normalize(bounded), (bounded - shift) * scale)
            torch.testing.assert_close(model.denormalize(model.normalize(bounded)), bounded)
            for g in D4:
                turned = model.act(g, bounded)
                expected = model.act(g, model.normalize(bounded))
                torch.testing.assert_close(model.normalize(turned), expected)
    spatial = {"start.action": "spatial", "representation.learned_basis": True}
    model = restore(configure(folder, **spatial, **{"start.train": "decoder"}))
    with torch.no_grad():
        own = model.from_irreps(model.encode(IMAGE))
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        expected = (model.encoder(IMAGE) - mean) * 0.5 / std
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


def test_an_action_is_fitted_to_what_the_encoder_returns(folders, shards, tmp_path):
    """Training acts on that, whether or not the latents have a shift afterwards."""
    folder = change(folders / "AutoencoderKL", tmp_path / "before", shift_factor=0.5)
    images = read_images(configure(folder).data, shards, 256)
    found = [fit_action(load_diffusers(str(folder)), images, 16, invariant=3)]
    for weight in (0.0, 0.1):
        where = {"ray.storage_uri": f"{tmp_path}/{weight}", "start.action": "fitted"}
        config = configure(folder, **where, **{"data.uri": shards, "start.anchor_weight": weight})
        copy_source(config, NOWHERE)
        found.append(_fit(forms.to_json(config)))
    for each in found[1:]:
        assert each.representation.multiplicities == found[0].representation.multiplicities
        torch.testing.assert_close(each.matrices, found[0].matrices)
        torch.testing.assert_close(
            torch.tensor([*each.spatial_error.values()]),
            torch.tensor([*found[0].spatial_error.values()]),
        )
