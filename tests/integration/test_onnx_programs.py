"""ONNX programs do what the model does, without this package, in ONNX Runtime."""

import itertools
import json

import onnx
import onnxruntime
import pytest
import torch

from efae.config import Config
from efae.config import forms as configuration
from efae.exchange import onnx_export
from efae.exchange.diffusers_tokenizer import load_diffusers
from efae.model.autoencoder import Autoencoder
from efae.model.stored_files import sha256
from jobs import export
from tests.clean_environment import make_environment, run_alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # an export takes a minute of CPU

UNET = {
    "data.resolution": (16, 32),
    "data.channels": 1,
    "model.kind": "unet",
    "model.patch_size": 4,
    "model.fine_hidden_size": 8,
    "model.start": "closed_form",
    "model.bottleneck": "running",
    "model.hidden_size": 16,
    "model.encoder_hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 1,
    "representation.dim": 12,
    "flow.sampler": "heun",
    "flow.sampler_steps": 3,
    "flow.condition_drop": 0.1,
    "flow.guidance_scale": 2.0,
    "flow.guidance_interval": (0.3, 0.9),
}

LAWS = """
import importlib.util, json
import numpy as np, onnxruntime
folder, sizes = sys.argv[1], json.loads(sys.argv[2])
assert [n for n in ("efae", "data_pipelines", "torch", "onnx") if importlib.util.find_spec(n)] == []
manifest = json.load(open(folder + "/export.json"))

def run(name, **inputs):
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx")
    return session.run(None, inputs)[0]

def turn(element, x):
    x = np.flip(x, -1) if element["mirrored"] else x
    return np.ascontiguousarray(np.rot90(x, element["quarter_turns"], (-2, -1)))

rng, worst, least = np.random.default_rng(0), 0.0, np.inf
for size in sizes:
    for batch in (1, 5):
        shape = (batch, manifest["image_shape"][0], *size)
        image = rng.uniform(-1, 1, shape).astype(np.float32)
        noise = rng.standard_normal(shape).astype(np.float32)
        latent = run("encode", image=image)
        decoded = run("decode", latent=latent, noise=noise)
        for name, element in manifest["elements"].items():
            acted = run(f"act-{name}", latent=latent)
            again = run("decode", latent=acted, noise=turn(element, noise))
            worst = max(worst, abs(run("encode", image=turn(element, image)) - acted).max(),
                        abs(again - turn(element, decoded)).max())
            if name != "identity" and acted.shape == latent.shape:
                least = min(least, abs(acted - latent).max(), abs(again - decoded).max())
print(json.dumps({"elements": len(manifest["elements"]), "worst": float(worst),
                  "least": float(least)}))
"""


def make(overrides) -> Autoencoder:
    """A model with weights everywhere: a new one's decoder gives zeros."""
    torch.manual_seed(0)
    config = configuration.with_overrides(Config(), overrides)
    model = Autoencoder(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.05 * torch.rand_like(weight)
    return model


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """Model, and the folder of its programs."""
    model, folder = make(UNET), tmp_path_factory.mktemp("unet")
    model.save_pretrained(folder / "model")
    arguments = ["--model", str(folder / "model"), "--output", str(folder / "onnx")]
    assert export.main(arguments) == 0
    return model, folder / "onnx"


def run(folder, name, **inputs):
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


def test_laws_hold_without_this_package(unet, tmp_path):
    folder = unet[1]
    environment = make_environment(tmp_path / "environment", "onnxruntime")
    sizes = json.dumps([(16, 32), (24, 24), (40, 16)])
    found = json.loads(run_alone(environment, LAWS, str(folder), sizes))
    assert found["elements"] == 8
    assert found["worst"] < 1e-4
    assert found["least"] > 1e-2


@pytest.mark.parametrize(("precision", "most_bytes"), [("fp32", 2.5e6), ("fp16", 2.0e6)])
def test_laws_of_the_builtin_transformer_hold_without_this_package(tmp_path, precision, most_bytes):
    arguments = ["--model", "builtin:openmoji-32", "--precision", precision, "--output"]
    assert export.main([*arguments, str(tmp_path / "onnx")]) == 0
    environment = make_environment(tmp_path / "environment", "onnxruntime")
    found = json.loads(run_alone(environment, LAWS, str(tmp_path / "onnx"), "[[32, 32]]"))
    assert found["elements"] == 8
    assert found["worst"] < 1e-4
    assert found["least"] > 1e-2
    # Octic weights, not plain ones.
    assert sum(path.stat().st_size for path in (tmp_path / "onnx").iterdir()) < most_bytes


def test_programs_are_the_model_and_the_manifest_says_so(unet):
    model, folder = unet
    manifest = json.loads((folder / "export.json").read_text())
    for batch, size in itertools.product((1, 4), [(16, 32), (32, 24)]):
        image, noise = torch.rand(batch, 1, *size) * 2 - 1, torch.randn(batch, 1, *size)
        latent = model.encode(image)
        torch.testing.assert_close(run(folder, "encode", image=image), latent, atol=1e-5, rtol=0)
        decoded = model.decode(latent, noise=noise)
        found = run(folder, "decode", latent=latent, noise=noise)
        torch.testing.assert_close(found, decoded, atol=1e-4, rtol=0)
        assert decoded.std() > 1e-2
        x, y, slope = noise, noise, torch.zeros_like(noise)
        for each in manifest["sampler"]["evaluations"]:
            t = torch.full((batch,), each["t"])
            v = run(folder, "velocity", x_t=y, t=t, latent=latent)
            x = x + each["advance"] * v + each["advance_slope"] * slope
            y, slope = x + each["ahead"] * v, v
        torch.testing.assert_close(x, decoded, atol=1e-4, rtol=0)
    assert manifest["image_shape"] == [1, 16, 32]
    assert (manifest["pixels_per_cell"], manifest["least_cells"]) == (8, 2)
    assert set(manifest["greatest_differences"]) == {
        "encode.onnx",
        "velocity.onnx",
        "decode.onnx",
    }
    assert 0 < max(manifest["greatest_differences"].values()) < 1e-4
    files = {path.name: path.read_bytes() for path in folder.glob("*.onnx")}
    assert {name: sha256(data) for name, data in files.items()} == {
        name: entry["sha256"] for name, entry in manifest["files"].items()
    }
    for name, data in files.items():
        assert b"/" + b"site-packages" not in data
        assert b"torch_export.py" not in data
        graph = onnx.load_from_string(data).graph
        assert "CastLike" not in str(graph), name


def test_a_learned_basis_is_a_constant_of_the_programs_alone(tmp_path):
    based = {"model.level": "objective", "representation.learned_basis": True}
    fewer = {"flow.sampler_steps": 1, "flow.guidance_scale": 1.0, "data.resolution": 16}
    model = make(UNET | based | fewer)
    onnx_export.export_onnx(model, tmp_path)
    image = torch.rand(2, 1, 16, 16) * 2 - 1
    found = run(tmp_path, "encode", image=image)
    torch.testing.assert_close(found, model.encode(image), atol=1e-5, rtol=0)
    with torch.no_grad():
        model.basis.angles.mul_(2)
    assert (found - model.encode(image)).abs().max() > 0.1


def test_an_autoencoder_without_flow_decodes_from_its_latent_alone(vae, tmp_path):
    model = load_diffusers(str(vae))
    manifest = onnx_export.export_onnx(model, tmp_path)
    assert manifest["sampler"] is None
    assert not (tmp_path / "velocity.onnx").exists()
    image = torch.rand(3, 3, 16, 24) * 2 - 1
    latent = model.encode(image)
    found = run(tmp_path, "encode", image=image)
    torch.testing.assert_close(found, latent, atol=1e-5, rtol=0)
    found = run(tmp_path, "decode", latent=latent)
    torch.testing.assert_close(found, model.decode(latent), atol=1e-5, rtol=0)
    many = latent[:1].expand(65, -1, -1, -1)  # where diffusers branches
    found = run(tmp_path, "decode", latent=many)
    torch.testing.assert_close(found, model.decode(many), atol=1e-5, rtol=0)


def test_an_export_beyond_its_bound_is_refused(vae, tmp_path, capsys):
    arguments = ["--model", f"diffusers:{vae}", "--precision", "fp16", "--output", str(tmp_path)]
    assert export.main(arguments) == 1
    message = capsys.readouterr().err
    assert "decode.onnx differs from the model by 2.0e-03" in message
    assert "fp16 allows 1e-03: not exported; use fp32" in message
    assert list(tmp_path.iterdir()) == []
