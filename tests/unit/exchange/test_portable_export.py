"""Exported programs, and the script that travels with them; the other process is in integration."""

import itertools
import json
import re
import shutil
import zipfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel

from efae.config import Config
from efae.config import forms as configuration
from efae.exchange import torch_export
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import pack_model
from efae.model.sampler import EVALUATIONS, integrate, time_grid

ROOT = Path(__file__).parents[3]
TINY = configuration.with_overrides(
    Config(),
    {
        "model.hidden_size": 16,
        "model.encoder_hidden_size": 16,
        "model.num_heads": 2,
        "model.depth": 1,
        "representation.dim": 12,
    },
)
# Between them: unet and transformer, exact and dense, a subgroup, a learned basis, oblong images,
# a vector latent, both predictions, every sampler's kind of step, with and without guidance.
CASES = {
    "oblong": {
        "data.resolution": (16, 32),
        "data.channels": 1,
        "model.kind": "unet",
        "model.patch_size": 8,
        "model.fine_hidden_size": 8,
        "model.start": "closed_form",
        "model.bottleneck": "running",
        "flow.sampler": "heun",
        "flow.sampler_steps": 3,
    },
    "vector": {
        "data.resolution": 8,
        "model.level": "objective",
        "representation.group": "C4",
        "representation.learned_basis": True,
        "flow.prediction": "velocity",
        "flow.sampler": "midpoint",
        "flow.sampler_steps": 2,
        "flow.condition_drop": 0.1,
        "flow.guidance_scale": 2.0,
        "flow.guidance_interval": (0.5, 0.9),
        "model.bottleneck": "kl",
    },
}


CASES["grids"] = CASES["oblong"] | {"model.patch_size": 4}  # half a minute


@pytest.fixture(
    scope="module",
    params=[
        "oblong",
        pytest.param("vector", marks=pytest.mark.slow),
        pytest.param("grids", marks=pytest.mark.slow),
    ],
)
def exported(request, tmp_path_factory) -> tuple[Autoencoder, Path]:
    """A model with weights everywhere, and the folder that holds it and its portable files."""
    config = configuration.with_overrides(TINY, CASES[request.param])
    torch.manual_seed(0)
    model = Autoencoder(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.05 * torch.rand_like(weight)
    folder = tmp_path_factory.mktemp("model")
    torch_export.export_portable(
        pack_model(model.state_dict(), config, model.representation), folder
    )
    described = Model()
    torch_export.describe_portable(described)
    described.save(str(folder / "MLmodel"))
    return model, folder


@pytest.fixture(scope="module")
def loaded(exported) -> PyFuncModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        return mlflow.pyfunc.load_model(str(exported[1]))


def draw(model: Autoencoder, batch: int, size=None) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (batch, model.config.data.channels, *(size or model.config.data.image_size))
    return torch.rand(shape) * 2 - 1, torch.randn(shape)


def list_sizes(model: Autoencoder) -> list[tuple[int, int]]:
    """Sizes that the programs take: the trained one, and others if the model is a unet."""
    others = [(16, 16), (24, 40), (40, 24), (64, 16)] if model.config.model.kind == "unet" else []
    return [model.config.data.image_size, *others]


def test_programs_do_what_the_model_does_at_any_batch_and_size(exported):
    model, folder = exported
    encode = torch.export.load(folder / "encode.pt2").module()
    decode = torch.export.load(folder / "decode.pt2").module()
    for batch, size in itertools.product((1, 2, 5), list_sizes(model)):
        image, noise = draw(model, batch, size)
        latent = model.encode(image)
        torch.testing.assert_close(encode(image), latent, atol=1e-5, rtol=0)
        decoded = model.decode(latent, noise=noise)
        torch.testing.assert_close(decode(latent, noise), decoded, atol=1e-5, rtol=0)
        assert decoded.std() > 1e-2
        assert not torch.allclose(decode(latent, noise + 1), decoded, atol=1e-3)


def test_pyfunc_encodes_acts_and_decodes_as_the_model_does(exported, loaded):
    model, _ = exported
    image, _ = draw(model, 2, list_sizes(model)[-1])
    latent = model.encode(image)
    np.testing.assert_allclose(loaded.predict(image.numpy()), latent, atol=1e-5)
    for element in model.group:
        params = {"task": "act", "element": element.name}
        turned = loaded.predict(latent.numpy(), params=params)
        np.testing.assert_array_equal(turned, model.act(element, latent))
        decoded = loaded.predict(turned, params={"task": "decode", "seed": 3})
        expected = model.decode(model.act(element, latent), seed=3)
        np.testing.assert_allclose(decoded, expected, atol=1e-5)


def test_wrong_params_and_arrays_are_refused_with_what_is_right(exported, loaded):
    model, _ = exported
    image = draw(model, 1)[0].numpy()
    latent = model.encode(torch.from_numpy(image)).numpy()
    with pytest.raises(ValueError, match="task='embed': use one of encode, act, decode"):
        loaded.predict(image, params={"task": "embed"})
    names = ", ".join(element.name for element in model.group)
    with pytest.raises(ValueError, match=f"element='rot45': this model's group has {names}"):
        loaded.predict(latent, params={"task": "act", "element": "rot45"})
    with pytest.raises(ValueError, match=r"encode takes \(batch, "):
        loaded.predict(latent)
    with pytest.raises(ValueError, match=r"shape \(0, .*one example or more"):
        loaded.predict(image[:0])
    kind = model.config.model.kind
    expected = "in multiples of 8, at least 16" if kind == "unet" else ", 8, 8), one example"
    for size in ((8, 16), (16, 20)):
        with pytest.raises(ValueError, match=f"encode takes .*{re.escape(expected)}"):
            loaded.predict(draw(model, 1, size)[0].numpy())
    with pytest.raises(ValueError, match="decode takes "):
        loaded.predict(latent[..., :1].repeat(3, -2), params={"task": "decode"})
    script = loaded.unwrap_python_model()  # past MLflow's own check of the signature
    with pytest.raises(ValueError, match=r"float32 array \(batch, .*not float64: use np.asarray"):
        script.predict(None, image.astype(np.float64))
    with pytest.raises(ValueError, match=r"not list: use np.asarray"):
        script.predict(None, image.tolist())


def test_a_damaged_program_is_refused_by_name(exported, tmp_path):
    _, folder = exported
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    data = bytearray((folder / "decode.pt2").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "decode.pt2").write_bytes(data)
    with pytest.raises(ValueError, match=r"decode\.pt2 is damaged"):
        mlflow.pyfunc.load_model(str(tmp_path))


RAW = re.compile(
    r"[^/]+/(data/(weights/weight_\d+|constants/tensor_\d+|(weights|constants)/model_\w+\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|archive_(format|version)|byteorder"
    r"|\.data/(version|serialization_id))"
)


@pytest.mark.parametrize("name", ["encode.pt2", "decode.pt2"])
def test_programs_hold_no_pickle_no_path_and_no_weights_of_the_other(exported, name):
    model, folder = exported
    with zipfile.ZipFile(folder / name) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    assert [member for member in members if not RAW.fullmatch(member)] == []
    texts = {member.split("/")[-1]: data for member, data in members.items()}
    assert texts["model.pt"] == b""  # example inputs
    assert str(ROOT).encode() not in texts["model.json"]
    payloads = [json.loads(texts[f"model_{kind}_config.json"]) for kind in ("weights", "constants")]
    entries = [entry for payload in payloads for entry in payload["config"].items()]
    assert [key for key, entry in entries if entry["use_pickle"]] == []
    own, other = ("encoder", "decoder") if name == "encode.pt2" else ("decoder", "encoder")
    weights = {key.removeprefix("model.") for key in payloads[0]["config"]}
    named = {key for key, _ in model.named_parameters()}
    assert {key for key in named if key.startswith(own)} <= weights
    assert [key for key in weights if key.startswith(other)] == []


@pytest.mark.parametrize("method", EVALUATIONS)
def test_the_table_of_evaluations_is_the_sampler(method):
    times = time_grid(5, power=2.0, shift=1.5)
    noise = torch.randn(3, 2, dtype=torch.float64)

    def field(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(3 * x) + t * x

    x, y, slope = noise, noise, torch.zeros_like(noise)
    evaluations = torch_export.list_evaluations([float(t) for t in times], method)
    for t, advance, advance_slope, ahead in evaluations:
        v = field(y, t)
        x = x + advance * v + advance_slope * slope
        y, slope = x + ahead * v, v
    torch.testing.assert_close(x, integrate(field, noise, times, method), rtol=1e-12, atol=1e-12)
    assert len(evaluations) == 5 * EVALUATIONS[method] - (method == "heun")
