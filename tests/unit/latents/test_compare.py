"""jobs/generate.py compare: what it measures with and without labels, and what it refuses."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset.writer import TarWriter

from data_pipelines import storage
from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import make_index
from data_pipelines.shards.index import write_index
from efae.evaluation.set_distances import Features
from efae.latents import compare, set_features, stored_reference
from efae.latents.compare import FILE
from efae.latents.sample_request import CompareRequest
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


def measure(samples: str, reference: str, output: Path | str, *more: str) -> dict:
    options = [f"--samples={samples}", f"--reference={reference}", f"--output={output}"]
    assert main(["compare", *options, *more]) == 0
    return json.loads(storage.read_bytes(f"{output}/{FILE}"))


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
        options = (f"--reference={other}", f"--output={tmp_path}")
        assert what in refuse(capsys, f"--samples={plain}", *options)


def test_outputs_are_places_that_outlive_the_job_and_devices_exist(
    plain, tmp_path, capsys, monkeypatch
):
    found = measure(plain, plain, f"file://{tmp_path}/report")
    assert found == json.loads((tmp_path / "report" / FILE).read_text())
    sets = (f"--samples={plain}", f"--reference={plain}")
    assert "--device cud: torch cannot compute on 'cud' here" in refuse(
        capsys, *sets, "--device=cud", f"--output={tmp_path}"
    )
    assert "scheme 'ftp' is refused" in refuse(capsys, *sets, "--output=ftp://host/report")
    (folder := tmp_path / "working_dir_files" / "_ray_pkg_1").mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert "--output report: this folder is deleted with the Ray job" in refuse(capsys, *sets)
    assert list(folder.iterdir()) == []


def test_a_stored_reference_needs_weights(plain, tmp_path, capsys):
    options = ("--reference=VIRTUAL_imagenet64.npz", f"--output={tmp_path}")
    said = refuse(capsys, f"--samples={plain}", *options)
    assert "samples are compared with it in Inception's features: give --fid-weights, too" in said


class Means(torch.nn.Module):
    """Stands in for Inception, whose weights tests have not: 3 pooled features, 3 spatial ones."""

    title, description, protocol = "Inception", "Inception's features", {}

    def forward(self, image: torch.Tensor) -> Features:
        pooled = image.float().mean((2, 3))
        return Features(pooled, image[:, :, 0, 0].float(), pooled)


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """Writes a reference: images of these, moments of those, or both."""
    monkeypatch.setattr(compare, "load_inception", lambda weights, device: Means())
    monkeypatch.setattr(stored_reference, "_POOLED", 3)
    monkeypatch.setattr(stored_reference, "_SPATIAL", 3)

    def write(images: np.ndarray | None, of: np.ndarray | None) -> str:
        arrays = {} if images is None else {"arr_0": images}
        if of is not None:
            features = Means()(torch.from_numpy(of).permute(0, 3, 1, 2))
            for end, part in (("", features.pooled), ("_s", features.spatial)):
                arrays[f"mu{end}"] = part.numpy().mean(0)
                arrays[f"sigma{end}"] = np.cov(part.numpy(), rowvar=False)
        np.savez(tmp_path / "reference.npz", **arrays)
        return str(tmp_path / "reference.npz")

    return write


def test_a_stored_reference_counts_as_the_set_of_its_images(plain, stored, tmp_path):
    images, options = draw_images(1), ("--fid-weights=w.pth", "--batch-size=7")
    expected = measure(plain, write_set(tmp_path / "set", images), tmp_path / "report", *options)
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    for arrays in ((images, None), (images, images), (None, images)):
        found = measure(plain, stored(*arrays), tmp_path / "report", *options)
        missing = ("precision", "recall") if arrays[0] is None else ()
        for name in names:
            want = None if name in missing else pytest.approx(expected[name], rel=1e-4)
            assert found[name] == want, name
        assert found["precision_recall_images"] == (0 if missing else COUNT)
    moments_win = measure(plain, stored(images, draw_images(0)), tmp_path / "report", *options)
    assert moments_win["fid"] == pytest.approx(0, abs=1e-4)
    assert moments_win["precision"] == expected["precision"] < 1


def test_precision_and_recall_take_equally_many_images(plain, stored, tmp_path):
    more = np.concatenate([draw_images(seed) for seed in range(3)])
    for reference in (write_set(tmp_path / "more", more), stored(more, more)):
        for option, used in ((), 60), (("--precision-recall-images=20",), 20):
            options = ("--fid-weights=w.pth", "--batch-size=32", *option)
            found = measure(plain, reference, tmp_path / "report", *options)
            assert found["precision_recall_images"] == used
            assert found["reference"]["images"] == 180
            assert 0 < found["precision"] <= 1
    with pytest.raises(ValueError, match="--precision-recall-images 3: must be at least 4"):
        CompareRequest("a", "b", precision_recall_images=3)


def test_images_of_another_size_in_a_stored_reference_are_refused(plain, stored, tmp_path, capsys):
    for images, what in (
        (draw_images(0, (16, 24, 3)), "reference.npz of 3 x 16 x 24 (colours"),
        (draw_images(0, (16, 16)), "arr_0 has type uint8 and shape (60, 16, 16)"),
        (draw_images(0).astype(np.float32), "arr_0 has type float32"),
        (draw_images(0)[:3], "holds 3 images: precision and recall take 4 at least"),
    ):
        reference = stored(images, None)
        options = (f"--samples={plain}", f"--reference={reference}", "--fid-weights=w.pth")
        assert what in refuse(capsys, *options, f"--output={tmp_path}")


@pytest.mark.parametrize(
    "kind", ["pickle", "objects", "images", "other arrays", "other shapes", "infinite"]
)
def test_files_that_are_no_reference_are_refused_and_never_run(plain, tmp_path, capsys, kind):
    path, trap = tmp_path / "reference.npz", Trap(str(tmp_path / "sprung"))
    arrays = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(trap, 2))
    elif kind == "objects":
        np.savez(path, **{**arrays, "mu": np.array([trap])})
    elif kind == "images":
        np.savez(path, **{**arrays, "arr_0": np.array([trap])})
    elif kind == "other arrays":
        np.savez(path, mu=arrays["mu"])
    elif kind == "other shapes":
        np.savez(path, **{**arrays, "mu": np.zeros(64)})
    else:
        np.savez(path, **{**arrays, "mu_s": np.full(2023, np.inf)})
    options = (f"--samples={plain}", f"--reference={path}", f"--fid-weights={tmp_path / 'w.pth'}")
    said = refuse(capsys, *options, f"--output={tmp_path}")
    assert ("not finite" if kind == "infinite" else "not a reference of guided-diffusion") in said
    assert not (tmp_path / "sprung").exists()
