"""jobs/evaluate.py on shards in a folder: one model, two side by side, and refusals."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import efae
from data_pipelines import storage
from data_pipelines.build_shards import build_shards
from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.any_angle import ANGLES
from efae.exchange.diffusers_tokenizer import WEIGHTS, load_diffusers, read_pretrained
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import hash_tensors
from efae.training.starts.source import adopt_pretrained
from efae.web_page import page
from jobs.evaluate import main

OURS = {
    "data.resolution": 16,
    "representation.dim": 12,
    "representation.multiplicities": (4, 0, 2, 2, 2),
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 1,
    "flow.sampler_steps": 2,
}


def write_shards(folder, size: tuple[int, int], mode: str, *others: tuple[int, int]) -> str:
    """Twelve images that are not symmetric, of one size or of several in turn."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for i in range(12):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        sizes = (size, *others)
        coarse.convert(mode).resize(sizes[i % len(sizes)]).save(folder / "images" / f"{i}.png")
    build_shards(f"folder:{folder / 'images'}", str(folder / "shards"))
    return str(folder / "shards")


def write_ours(folder, channels: int, **changes) -> str:
    torch.manual_seed(0)
    config = with_overrides(Config(), OURS | {"data.channels": channels} | changes)
    Autoencoder(config).save_pretrained(folder)
    return str(folder)


def write_foreign(folder, channels: int) -> str:
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return f"diffusers:{folder}"


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("evaluate")
    return {
        "colour": write_shards(folder / "colour", (16, 16), "RGB"),
        "grey": write_shards(folder / "grey", (16, 16), "L"),
        "odd": write_shards(folder / "odd", (15, 15), "RGB"),
        "ours": write_ours(folder / "ours", 3),
        "ours unet": write_ours(
            folder / "ours-unet", 3, **{"model.kind": "unet", "model.fine_hidden_size": 8}
        ),
        "ours grey": write_ours(folder / "ours-grey", 1),
        "unpaired": write_ours(
            folder / "unpaired", 3, **{"representation.multiplicities": (4, 1, 2, 1, 2)}
        ),
        "wide": write_shards(folder / "wide", (24, 16), "RGB"),
        "mixed": write_shards(folder / "mixed", (24, 24), "RGB", (48, 40)),
        "ours wide": write_ours(
            folder / "ours-wide",
            3,
            **{
                "data.resolution": (16, 24),
                "representation.group": "flips",
                "representation.multiplicities": (4, 4, 2, 2, 0),
            },
        ),
        "foreign": write_foreign(folder / "foreign", 3),
        "foreign grey": write_foreign(folder / "foreign-grey", 1),
    }


def read_rotations(folder) -> list[float]:
    """The angles that were measured."""
    return list(map(float, json.loads((folder / "evaluation.json").read_text())["rotations"]))


def test_one_model_that_was_trained_on_angles(paths, tmp_path, capsys):
    """It is measured at them without being asked."""
    model = write_ours(tmp_path / "model", 3, **{"loss.rotation_probability": 0.5})
    report = tmp_path / "report"
    rest = [f"--data={paths['colour']}", f"--output={report}", "--images=8"]
    assert main([f"--model={model}", *rest]) == 0
    summary = json.loads((report / "summary.json").read_text())
    assert summary["model_uri"] == model
    assert f"{summary['psnr']:.2f} dB" in capsys.readouterr().out
    html = (report / "report.html").read_text(encoding="utf-8")
    assert "measured on\n8 held-out images" in html
    assert "an equivariant flow autoencoder" in html
    assert read_rotations(report) == [0.0, *ANGLES]


@pytest.mark.parametrize(
    ("data", "options", "angles"),
    [("colour", ["--angles", "15", "-30"], [0.0, 15.0, -30.0]), ("grey", ["--fit-action"], [])],
)
def test_ours_beside_a_foreign_one(paths, tmp_path, capsys, data, options, angles):
    models = [paths["ours"], paths["foreign"]]
    arguments = ["--model", *models, "--data", paths[data], "--output", str(tmp_path)]
    assert main([*arguments, "--images=4", *options]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())["models"]
    assert list(found) == models
    assert found[models[0]]["worst_gap_db"] < 1e-3 < found[models[1]]["worst_gap_db"]
    printed = capsys.readouterr().out
    for model in models:
        assert f"{found[model]['psnr']:.2f} dB" in printed
    assert str(tmp_path / "report.html") in printed
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 2
    for folder in folders:
        assert read_rotations(folder) == angles
        assert (folder / "rotations.png").exists() == bool(angles)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("Rotations by any angle" in html) == bool(angles)
    for model, folder in zip(models, sorted(folders), strict=True):
        card = (folder / "report.html").read_text(encoding="utf-8")
        fitted = json.loads((folder / "evaluation.json").read_text()).get("fitted_action")
        assert bool(fitted) == ("The action that the channels carry" in card) == (not angles)
        summarized = found[model].get("fitted_action")
        assert summarized == (fitted and {k: v for k, v in fitted.items() if k != "basis"})
        if model == models[0] and fitted:
            assert tuple(fitted["multiplicities"].values()) == OURS["representation.multiplicities"]
            assert f"{model}: the channels carry the representation 4+0+2+2+2" in printed
            assert "The channels carry the representation 4+0+2+2+2" in card
        elif fitted:
            assert f"{model}: no representation of the channels explains this encoder" in printed


def test_a_foreign_model_before_and_after_stands_on_one_page(paths, tmp_path):
    """After: the same weights, saved by us and averaged over the group."""
    settings = {
        "data.resolution": 16,
        "model.kind": "diffusers",
        "model.level": "exact",
        "model.bottleneck": "posterior",
        "start.symmetrize": True,
        "start.model": paths["foreign"],
        "ray.storage_uri": str(tmp_path / "runs"),
        "tracking.run_name": "after",
    }
    config = adopt_pretrained(with_overrides(Config(), settings))
    averaged = Autoencoder(config)
    averaged.load_state_dict(dict(read_pretrained(config).weights))
    averaged.save_pretrained(tmp_path / "after")
    models = [paths["foreign"], str(tmp_path / "after")]
    report = tmp_path / "report"
    rest = ["--data", paths["colour"], "--output", str(report), "--images=4"]
    assert main(["--model", *models, *rest]) == 0
    before, after = (
        json.loads((folder / "evaluation.json").read_text())
        for folder in sorted(path for path in report.iterdir() if path.is_dir())
    )
    assert max(before["encoder_error"].values()) > 0.1 > 1e-6 > max(after["encoder_error"].values())
    assert abs(after["worst_gap_db"]) < 1e-3 < abs(before["worst_gap_db"])
    assert "drift" not in before
    assert after["drift"] > 0.01
    assert after["half_scale_psnr"] > 0
    assert "drift of the latents" in (report / "report.html").read_text(encoding="utf-8")


def test_quarter_turns_of_images_that_are_not_square_or_of_the_trained_size(paths, tmp_path):
    found: dict[str, dict] = {}
    for models, options in (
        ([paths["ours"], paths["ours unet"]], ["--tile=96"]),
        ([paths["foreign"]], ["--symmetrize"]),
    ):
        output = tmp_path / str(len(models))
        arguments = ["--model", *models, "--data", paths["mixed"], "--output", str(output)]
        assert main([*arguments, "--images=1", "--resolution", "16", "24", *options]) == 0
        folders = sorted(output.glob("*/")) if len(models) > 1 else [output]
        for model, folder in zip(models, folders, strict=True):
            found[model] = json.loads((folder / "evaluation.json").read_text())
            assert (folder / "orbit.png").exists()
    assert all("rot90" in numbers["gap_db"] for numbers in found.values())
    assert max(abs(numbers["worst_gap_db"]) for numbers in found.values()) < 1e-3
    assert {tuple(numbers["image_shape"]) for numbers in found.values()} == {(3, 16, 24)}
    protocols = [numbers["protocol"] for numbers in found.values()]
    assert [protocol["tile"] for protocol in protocols] == [96, 96, None]
    assert [protocol["symmetrize"] for protocol in protocols] == [False, False, True]


@pytest.mark.parametrize(
    ("model", "data", "options", "parts"),
    [
        ("foreign", "odd", [], ["foreign: images of 15 x 15 pixels", "multiples of 2"]),
        ("ours", "odd", [], ["ours: ", "images of 15 x 15", "model.downsampling=8"]),
        ("ours", "mixed", [], ["differ in size", "set --resolution"]),
        ("ours", "wide", ["--resolution", "24"], ["--resolution 24 24", "16 x 24", "enlarged"]),
        ("ours", "colour", ["--resolution", "0", "8"], ["--resolution 0 8", "positive"]),
        ("ours grey", "colour", [], ["takes images of 1 colours", "have 3"]),
        ("foreign grey", "colour", [], ["takes images of 1 colours", "have 3"]),
        ("ours", "colour", ["--lpips-weights=missing.pth"], ["alexnet-owt-7be5be79.pth"]),
        ("ours", "colour", ["--fid-weights=missing.pth"], ["FID needs"]),
        ("ours", "colour", ["--images=0"], ["--images", "positive"]),
        ("ours", "colour", ["--images=1", "--fit-action"], ["--fit-action", "two images"]),
        ("ours unet", "colour", ["--tile=8"], ["--tile: ", "ours-unet: tile=8: ", "at least"]),
        ("foreign", "colour", ["--tile=8"], ["--tile 8: ", "foreign: ", "without --tile"]),
        ("ours", "colour", ["--angles", "nan"], ["--angles", "numbers of degrees"]),
        ("unpaired", "colour", ["--angles", "15"], ["unpaired: ", "b1=2 and b2=1", "as many B1"]),
        ("ours wide", "wide", ["--angles", "15"], ["ours-wide: images of 16 x 24", "only square"]),
    ],
)
def test_what_cannot_be_measured_is_refused(paths, tmp_path, capsys, model, data, options, parts):
    output = tmp_path / "report"
    arguments = [f"--model={paths[model]}", f"--data={paths[data]}", f"--output={output}"]
    assert main([*arguments, *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    for part in parts:
        assert part in said
    assert not output.exists()


def test_a_page_without_npm_is_refused_before_work_starts(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFAE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["--model", paths["ours"], "--data", paths["colour"]]
    assert main([*arguments, "--output", str(tmp_path / "report"), "--page"]) == 1
    assert "install npm, or copy onnxruntime-web" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_page_that_fails_costs_no_measurement(paths, tmp_path, monkeypatch, capsys):
    def fail(_models, _folder, credit: str = "") -> None:
        assert credit == ""  # that of the measured images says nothing about the model
        raise RuntimeError("no such operator")

    monkeypatch.setattr(page, "check_page", lambda: "")
    monkeypatch.setattr(page, "write_page", fail)
    arguments = ["--model", paths["ours"], "--data", paths["colour"], "--page", "--images=4"]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.err.endswith("error: the page was not written: no such operator\n")
    assert f"report: {tmp_path / 'report.html'}" in told.out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tensors_sha256"] == hash_tensors(efae.load(paths["ours"]).state_dict())
    assert summary["data"].startswith(f"{paths['colour']} (12 images, id ")
    assert (tmp_path / "report.html").exists()


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_lies_beside_the_report_card(paths, tmp_path):
    """Needs npm, for the first page."""
    arguments = ["--model", paths["ours"], paths["foreign"], "--data", paths["colour"], "--page"]
    assert main([*arguments, "--images=4", "--output", str(tmp_path)]) == 0
    settings = json.loads((tmp_path / "page/page.json").read_text())
    assert [model["name"] for model in settings["models"]] == [paths["ours"], paths["foreign"]]
    for number in (0, 1):
        assert (tmp_path / f"page/models/{number}/encode.onnx").exists()
    assert (tmp_path / "page/index.html").exists()
    assert (tmp_path / "report.html").exists()


def test_a_hub_name_and_a_model_named_twice_are_refused(paths, tmp_path, capsys):
    rest = [f"--data={paths['colour']}", f"--output={tmp_path / 'report'}"]
    assert main(["--model=diffusers:stabilityai/sd-vae-ft-mse", *rest]) == 1
    assert "not downloaded" in capsys.readouterr().err
    assert main(["--model", paths["ours"], paths["ours"], *rest]) == 1
    assert "each once" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.s3
def test_a_report_goes_to_the_bucket_that_output_names(
    paths, tmp_path, monkeypatch, capsys, local_stack
):
    monkeypatch.chdir(tmp_path)
    uri = "s3://efae-data/a report"
    rest = [f"--data={paths['colour']}", f"--output={uri}", "--images=4"]
    assert main([f"--model={paths['ours']}", *rest]) == 0
    assert f"report: {uri}/report.html" in capsys.readouterr().out
    summary = json.loads(storage.read_bytes(f"{uri}/summary.json"))
    assert summary["model_uri"] == paths["ours"]
    assert storage.exists(f"{uri}/report.html")
    assert not list(tmp_path.iterdir())
    storage.delete(uri)


@pytest.mark.s3
def test_a_foreign_model_on_object_storage_is_the_one_that_was_uploaded(paths, local_stack):
    """Only its two files are fetched; what is no model is refused before weights are."""
    uri = "s3://efae-data/foreign/vae"
    local = paths["foreign"].removeprefix("diffusers:")
    storage.upload_folder(local, uri)
    storage.write_bytes(f"{uri}/diffusion_pytorch_model.bin", b"a pickle")
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_diffusers(uri).encode(image), load_diffusers(local).encode(image))
    with pytest.raises(ValueError, match=f"did you mean diffusers:{uri}"):
        load_diffusers("s3://efae-data/foreign")
    storage.write_bytes(f"{uri}/config.json", b'{"_class_name": "VQModel"}')
    storage.write_bytes(f"{uri}/{WEIGHTS}", b"")
    with pytest.raises(ValueError, match="describes the class VQModel"):
        load_diffusers(uri)
    storage.delete("s3://efae-data/foreign")
