"""A registered model in processes with only mlflow and torch, loaded from the real server."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

import efae
from efae.config import forms as configuration
from efae.exchange.diffusers_adapter import AutoencoderEFAE
from efae.exchange.torch_export import PORTABLE_FILES
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import pack_model
from efae.model.stored_files import MODEL_FILES, sha256
from efae.registry import pull, registration
from efae.symmetry import D4
from efae.tracking import runs
from efae.tracking.server import Server
from tests.clean_environment import make_environment, run_alone
from tests.integration.stored_models import TINY, make_model

pytestmark = pytest.mark.s3

ABSENT = ("efae", "data_pipelines", "ray", "safetensors", "jaxtyping", "s3fs", "boto3")

WITH_MLFLOW = """
import importlib.util, os
import numpy as np
folder, absent = sys.argv[1], sys.argv[2].split(",")
assert [name for name in absent if importlib.util.find_spec(name)] == []
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
import mlflow
model = mlflow.pyfunc.load_model("models:/portable@champion")
latent = model.predict(np.load(folder + "/image.npy"), params={"task": "encode"})
np.save(folder + "/latent.npy", latent)
for name in sys.argv[3].split(","):
    turned = model.predict(latent, params={"task": "act", "element": name})
    np.save(f"{folder}/act-{name}.npy", turned)
    decoded = model.predict(turned, params={"task": "decode", "seed": 7})
    np.save(f"{folder}/decode-{name}.npy", decoded)
assert [name for name in absent if name in sys.modules] == []
"""

WITH_TORCH = """
import importlib.util, warnings
folder, absent = sys.argv[1], [*sys.argv[2].split(","), "mlflow", "numpy"]
assert [name for name in absent if importlib.util.find_spec(name)] == []
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
given = torch.load(folder + "/given.pt", weights_only=True)
encode = torch.export.load(folder + "/encode.pt2").module()
decode = torch.export.load(folder + "/decode.pt2").module()
latent = encode(given["image"])
torch.save({"latent": latent, "decoded": decode(latent, given["noise"])}, folder + "/made.pt")
"""


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    """With weights everywhere: a new model's decoder gives zeros."""
    made = make_model().requires_grad_(False).eval()
    for weight in made.parameters():
        weight += 0.05 * torch.rand_like(weight)
    return made


@pytest.fixture(scope="module")
def stored(model, local_stack, tmp_path_factory) -> Iterator[Path]:
    """A folder with the files of a registered model, downloaded from the server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFAE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        server = Server(local_stack["MLFLOW_TRACKING_URI"])
        run, _ = runs.find_or_create_run(server, "portable", "portable", {})
        packed = pack_model(model.state_dict(), TINY, model.representation)
        programs = registration.export_programs(packed, tmp_path_factory.mktemp("programs"))
        registration.register_model(packed, "portable", run, {}, {}, programs=programs)
        stored = tmp_path_factory.mktemp("stored")
        yield Path(server.client().download_artifacts(run.id, "model", str(stored)))


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def test_mlflow_and_torch_alone_encode_act_and_decode_as_we_do(stored, tmp_path, image):
    np.save(tmp_path / "image.npy", image.numpy())
    environment = make_environment(tmp_path / "environment", "mlflow", "torch")
    names = [element.name for element in D4]
    run_alone(environment, WITH_MLFLOW, str(tmp_path), ",".join(ABSENT), ",".join(names))

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(tmp_path / f"{name}.npy"))

    model = efae.load("models:/portable@champion")
    latent = model.encode(image)
    assert largest(read("latent"), latent) < 1e-5
    for element in D4:
        turned = model.act(element, latent)
        assert largest(read(f"act-{element}"), turned) < 1e-5
        assert largest(read(f"decode-{element}"), model.decode(turned, seed=7)) < 1e-5
    assert largest(read("act-rot90"), read("latent")) > 0.1
    assert largest(read("decode-rot90"), read("decode-identity")) > 1e-3


def test_torch_alone_runs_the_programs(model, stored, tmp_path, image):
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    torch.save({"image": image, "noise": noise}, tmp_path / "given.pt")
    for name in ("encode.pt2", "decode.pt2"):
        (tmp_path / name).symlink_to(stored / name)
    environment = make_environment(tmp_path / "environment", "torch")
    run_alone(environment, WITH_TORCH, str(tmp_path), ",".join(ABSENT))
    made = torch.load(tmp_path / "made.pt", weights_only=True)
    latent = model.encode(image)
    assert largest(made["latent"], latent) < 1e-5
    assert largest(made["decoded"], model.decode(latent, noise=noise)) < 1e-5
    assert largest(made["decoded"], model.decode(latent, seed=3)) > 1e-3


def test_tags_of_the_version_say_what_the_portable_files_were(stored, local_stack):
    client = MlflowClient(local_stack["MLFLOW_TRACKING_URI"])
    tags = client.get_model_version("portable", "1").tags
    for name in PORTABLE_FILES:
        assert tags[f"sha256.{name}"] == sha256((stored / name).read_bytes())


def test_our_own_load_takes_nothing_of_the_portable_files(stored):
    files = {path.name for path in pull.pull("models:/portable@champion").iterdir()}
    assert files == {*MODEL_FILES, "manifest.json"}


def test_the_stored_folder_is_the_one_that_every_reader_opens(model, stored, image):
    expected = model.encode(image)
    assert torch.equal(efae.load(stored).encode(image), expected)
    assert torch.equal(Autoencoder.from_pretrained(stored).encode(image), expected)
    vae = AutoencoderEFAE.from_pretrained(stored)
    assert torch.equal(vae.encode(image).latent_dist.mode(), expected)


def test_what_cannot_be_exported_is_registered_with_a_warning(server, caplog, tmp_path):
    other = configuration.with_overrides(TINY, {"model.depth": 2})
    shallow = make_model()
    packed = pack_model(shallow.state_dict(), other, shallow.representation)
    run, _ = runs.find_or_create_run(server, "portable", "unportable", {})
    with caplog.at_level(logging.WARNING, "efae"):
        programs = registration.export_programs(packed, tmp_path)
    version = registration.register_model(packed, "unportable", run, {}, {}, programs=programs)
    assert version.version == 1
    assert "registered without its portable programs" in caplog.text
    files = {file.path for file in server.client().list_artifacts(run.id, "model")}
    stored = ("MLmodel", "manifest.json", *MODEL_FILES)
    assert files == {f"model/{name}" for name in stored}
