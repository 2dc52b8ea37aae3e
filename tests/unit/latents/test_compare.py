"""jobs/generate.py compare: what it measures with and without labels, and what it refuses."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from webdataset.writer import TarWriter

from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import make_index
from data_pipelines.shards.index import write_index
from efae.latents import set_features
from efae.latents.compare import FILE
from jobs.generate import main
from tests.unit.evaluation.test_networks import Trap

COUNT = 60
SHAPES = {"mu": 2048, "sigma": (2048, 2048), "mu_s": 2023, "sigma_s": (2023, 2023)}


def write_set(folder: Path, images: np.ndarray, labels: list[str] | None = None) -> str:
    folder.mkdir()
    with (folder / "00.tar").open("wb") as file, TarWriter(file, mtime=0) as writer:
        for number, image in enumerate(images):
            members = {"cls": labels[number].encode()} if labels else {}
            writer.write({"__key__": f"n{number:03}", "png": encode_png(image), **members})
    write_index(str(folder), make_index(str(folder)))
    return str(folder)


def draw_images(seed: int, shape: tuple[int, ...] = (16, 16, 3)) -> np.ndarray:
    """Even numbers are dark, odd ones bright."""
    images = np.random.default_rng(seed).integers(0, 100, (COUNT, *shape), dtype=np.uint8)
    images[1::2] += 120
    return images


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(set_features, "_STEPS", 25)


@pytest.fixture
def plain(tmp_path) -> str:
    return write_set(tmp_path / "plain", draw_images(0))


def measure(samples: str, reference: str, output: Path) -> dict:
    options = [f"--samples={samples}", f"--reference={reference}", f"--output={output}"]
    assert main(["compare", *options]) == 0
    return json.loads((output / FILE).read_text())


def refuse(capsys, *options: str) -> str:
    assert main(["compare", *options]) == 1
    return capsys.readouterr().err


def test_with_labels_the_features_are_a_classifiers(plain, tmp_path, capsys):
    labels = ["shoe", "coat"] * (COUNT // 2)
    reference = write_set(tmp_path / "reference", draw_images(0), labels)
    found = measure(plain, reference, tmp_path / "report")
    printed = capsys.readouterr().out
    assert "training a classifier of 2 classes on 60 images" in printed
    assert "a classifier of the reference's 2 classes (100.0% right on other" in printed
    assert "FID                    0.000  classifier" in printed
    assert found["fid"] == pytest.approx(0, abs=1e-4)
    assert found["sfid"] == pytest.approx(0, abs=1e-4)
    assert (found["precision"], found["recall"]) == (1, 1)
    assert found["inception_score"] == pytest.approx(2, abs=0.1)
    assert found["protocol"]["steps"] == 25
    assert found["samples"]["images"] == COUNT
    assert found["samples"]["uri"] == plain
    assert found["samples"]["id"] != found["reference"]["id"]
    assert measure(plain, reference, tmp_path / "again") == found
    one_mode = draw_images(1)
    one_mode[1::2] -= 120
    collapsed = measure(write_set(tmp_path / "dark", one_mode), reference, tmp_path / "report")
    assert collapsed["fid"] > 0.01
    assert collapsed["inception_score"] == pytest.approx(1, abs=0.1)
    assert collapsed["recall"] < 0.6


def test_without_labels_the_network_is_untrained(plain, tmp_path, capsys):
    distances = []
    for name, images in (("like", draw_images(1)), ("far", 255 - draw_images(1) // 4)):
        found = measure(write_set(tmp_path / name, images), plain, tmp_path / "report")
        distances.append(found["fid"])
        printed = capsys.readouterr()
        assert "features of an untrained convolutional network, not Inception's" in printed.out
        assert "Inception score            -  untrained network" in printed.out
        assert "warning: samples: 60 images for 112 features: a covariance" in printed.err
        assert found["inception_score"] is None
    assert distances[1] > 3 * distances[0]
    assert found["recall"] == 0


def test_sets_that_cannot_be_compared_are_refused(plain, tmp_path, capsys):
    larger = write_set(tmp_path / "larger", draw_images(0, (16, 24, 3)))
    grey = write_set(tmp_path / "grey", draw_images(0, (16, 16)))
    few = write_set(tmp_path / "few", draw_images(0)[:3])
    for other, what in (
        (larger, "larger of 3 x 16 x 24 (colours"),
        (grey, "grey of 1 x 16 x 16"),
        (few, "holds 3 images: precision and recall take 4 at least"),
        (str(tmp_path / "none"), "none"),
    ):
        assert what in refuse(capsys, f"--samples={plain}", f"--reference={other}")


def test_a_stored_reference_needs_weights(plain, capsys):
    said = refuse(capsys, f"--samples={plain}", "--reference=VIRTUAL_imagenet64.npz")
    assert "holds moments of Inception's features: give --fid-weights, too" in said


@pytest.mark.parametrize("kind", ["pickle", "objects", "other arrays", "other shapes", "infinite"])
def test_files_that_are_no_reference_are_refused_and_never_run(plain, tmp_path, capsys, kind):
    path, trap = tmp_path / "reference.npz", Trap(str(tmp_path / "sprung"))
    arrays = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(trap, 2))
    elif kind == "objects":
        np.savez(path, **{**arrays, "mu": np.array([trap])})
    elif kind == "other arrays":
        np.savez(path, mu=arrays["mu"])
    elif kind == "other shapes":
        np.savez(path, **{**arrays, "mu": np.zeros(64)})
    else:
        np.savez(path, **{**arrays, "mu_s": np.full(2023, np.inf)})
    options = (f"--samples={plain}", f"--reference={path}", f"--fid-weights={tmp_path / 'w.pth'}")
    said = refuse(capsys, *options)
    assert ("not finite" if kind == "infinite" else "not a reference of guided-diffusion") in said
    assert not (tmp_path / "sprung").exists()
