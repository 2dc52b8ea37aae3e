"""LPIPS and FID: what is refused before any work, and what they measure where they can."""

import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation import lpips_fid
from efae.evaluation.lpips_fid import Inception, Lpips, load_fid, load_inception
from efae.preflight.cluster_checks import Node, list_node_checks
from efae.tracking.server import Server
from efae.training.tasks.tokenizer import choose_perceptual
from tests.unit.evaluation.test_evaluation import colour_fid

ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


@pytest.fixture(scope="module")
def alexnet() -> dict[str, torch.Tensor]:
    """Random weights by torchvision's names, with what LPIPS does not need."""
    generator = torch.Generator().manual_seed(0)
    found = {"classifier.6.bias": torch.zeros(1000)}
    for place, (out, into, side) in ALEXNET.items():
        weight = torch.randn(out, into, side, side, generator=generator)
        found[f"features.{place}.weight"] = weight / (into * side * side) ** 0.5
        found[f"features.{place}.bias"] = 0.1 * torch.randn(out, generator=generator)
    return found


@pytest.fixture(scope="module")
def lpips(alexnet, tmp_path_factory) -> Lpips:
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(alexnet, path)
    network = Lpips(path)
    network.path = path
    return network


def draw(seed: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lpips_is_a_training_loss_with_the_weights_that_the_configuration_names(lpips, tmp_path):
    config = with_overrides(Config(), {"loss.lpips_weights": str(tmp_path / "alexnet.pth")})
    with pytest.raises(ValueError, match=r"alexnet\.pth"):
        choose_perceptual(config, torch.device("cpu"))
    shutil.copy(lpips.path, tmp_path / "alexnet.pth")
    perceptual = choose_perceptual(config, torch.device("cpu"))
    predicted, image = draw(0).requires_grad_(), draw(1)
    loss = perceptual(predicted, image)
    assert torch.equal(loss, lpips(predicted, image))
    loss.sum().backward()
    assert predicted.grad.abs().max() > 0
    with pytest.raises(ValueError, match="choose one perceptual loss"):
        with_overrides(config, {"loss.perceptual": "package.module:name"})


def test_lpips_is_a_distance_per_pair_that_grows_with_the_error(lpips):
    image, other = draw(0), draw(1)
    assert lpips(image, image).tolist() == [0, 0]
    assert torch.allclose(lpips(image, other), lpips(other, image))
    near, far = (lpips(image, image + s * (other - image)) for s in (0.1, 1.0))
    assert (near > 0).all()
    assert (far > near).all()
    assert torch.allclose(lpips(image, other)[1:], lpips(image[1:], other[1:]), atol=1e-6)
    grey, grey_other = draw(0, 1), draw(1, 1)
    repeated = lpips(grey.repeat(1, 3, 1, 1), grey_other.repeat(1, 3, 1, 1))
    assert torch.equal(lpips(grey, grey_other), repeated)


def test_lpips_of_safetensors_is_the_same(lpips, alexnet, tmp_path):
    safetensors.torch.save_file(alexnet, tmp_path / "alexnet.safetensors")
    again = Lpips(tmp_path / "alexnet.safetensors")
    assert torch.equal(again(draw(0), draw(1)), lpips(draw(0), draw(1)))
    assert len(lpips.protocol["weights_sha256"]) == 64


def test_lpips_refuses_small_images(lpips):
    lpips.check_size(32, 40)
    with pytest.raises(ValueError, match="31 x 40 pixels: LPIPS needs 32"):
        lpips.check_size(31, 40)


def test_lpips_is_checked_on_every_node_that_trains_before_a_run(lpips):
    node, overrides = Node("id", "name", {"CPU": 2.0}), {"loss.lpips_weights": str(lpips.path)}

    def check(**more: object) -> str:
        config = with_overrides(Config(), overrides | more)
        server = Server("http://127.0.0.1:1")
        checks = dict(list_node_checks(node, config, server, set(), None, 0))
        return checks["LPIPS"]()

    assert str(lpips.path) in check()
    with pytest.raises(ValueError, match="has 8 pixels, and LPIPS needs 32: raise"):
        check(**{"loss.scaling_probability": 0.5})
    with pytest.raises(ValueError, match=r"loss\.lpips_weights=/no/such\.pth: no such file"):
        check(**{"loss.lpips_weights": "/no/such.pth"})


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("name", ["missing.pth", "trap.pth", "text.safetensors", "other.pth"])
def test_files_that_are_not_the_weights_are_refused_and_never_run(tmp_path, name):
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung")), 2))
    (tmp_path / "text.safetensors").write_text("not a file of tensors")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"{name}: .*alexnet-owt-7be5be79.pth"):
        Lpips(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_fid_names_the_packages_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(lpips_fid, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torch-fidelity and torchvision"):
        load_fid(tmp_path / "inception.pth")
    with pytest.raises(ValueError, match="torch-fidelity and torchvision"):
        load_inception(tmp_path / "inception.pth")


def test_fid_names_the_file_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(lpips_fid, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=r"no such file; FID needs torch-fidelity's Inception"):
        load_fid(tmp_path / "inception.pth")


@pytest.mark.parametrize("channels", [1, 3])
def test_fid_is_zero_for_equal_images_and_the_shift_of_the_mean_else(channels):
    image = torch.randint(0, 200, (9, channels, 8, 8)) / 127.5 - 1
    for shift, expected in ((0, 0.0), (20, 3 * 20.0**2)):
        fid = colour_fid()
        fid.add(image[:4], image[:4] + shift / 127.5)
        fid.add(image[4:], image[4:] + shift / 127.5)
        assert fid.compute() == (pytest.approx(expected, abs=0.05), None)
        fid.add_interpolated(image + 2 * shift / 127.5)
        found = pytest.approx(expected, abs=0.05), pytest.approx(4 * expected, abs=0.05)
        assert fid.compute() == found


def test_fid_of_one_image_is_refused():
    fid = colour_fid()
    fid.add(draw(0)[:1], draw(1)[:1])
    with pytest.raises(ValueError, match="two images"):
        fid.compute()


class SmallInception(torch.nn.Module):
    """The parts of Inception that features of sets are taken from."""

    def __init__(self):
        super().__init__()
        self.Mixed_6d = torch.nn.ModuleDict({"branch1x1": torch.nn.Conv2d(3, 9, 1)})
        self.fc = torch.nn.Linear(3, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.Mixed_6d["branch1x1"](pixels.float())
        return pixels.float().mean((2, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_features_of_sets_lie_as_guided_diffusion_stores_them(channels):
    network = SmallInception()
    pixels = torch.randint(0, 256, (2, channels, 4, 6), dtype=torch.uint8)
    found = Inception(network, "none")(pixels)
    colours = pixels.expand(-1, 3, -1, -1).float()
    layer = network.Mixed_6d["branch1x1"](colours)
    assert found.spatial.shape == (2, 4 * 6 * 7)
    for row, column in ((0, 0), (2, 5), (3, 1)):
        place = 7 * (6 * row + column)
        assert torch.equal(found.spatial[:, place : place + 7], layer[:, :7, row, column])
    assert torch.equal(found.pooled, colours.mean((2, 3)))
    assert torch.allclose(found.logits, network.fc(found.pooled) - network.fc.bias, atol=1e-4)
