"""The report card says what was measured, shows it, and stands alone."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.evaluate import evaluate
from efae.model.autoencoder import Autoencoder
from efae.report.card import (
    Card,
    advise_on_linear_map,
    explain_fitted_action,
    summarize,
    write_comparison,
    write_report,
)
from efae.report.model_card import render_model_card
from efae.symmetry import D4

# Written here once more on purpose: outside scripts rely on exactly these.
SUMMARY = (
    *("run_name", "mlflow_run_id", "model_uri", "steps", "images_seen", "images_per_second"),
    *("data_wait_fraction", "bad_samples", "psnr", "linear_psnr", "gap_db", "worst_gap_db"),
    *("group_law_error", "checkpoints", "checkpoint_stall_seconds", "recoveries"),
    *("world_size", "precision", "device", "wall_seconds", "events"),
    *("tflops_per_second", "flop_utilization", "flop_utilization_as_dense"),
    *("preset", "commit", "train_data", "held_out_data", "data", "credits", "tensors_sha256"),
)
FIGURES = ("orbit", "reconstructions", "gap", "rotations", "energy", "steps", "loss_by_time")
FACTS = {
    "run_name": "a <script>alert(1)</script> & b",
    "mlflow_run_id": "1f2e3d",
    "model_uri": "models:/efae/7",
    "steps": 12,
    "images_seen": 1536,
    "images_per_second": 812.5,
    "data_wait_fraction": 0.01,
    "bad_samples": 0,
    "checkpoints": 3,
    "checkpoint_stall_seconds": 0.25,
    "recoveries": 1,
    "events": ["12:00:00  2 workers begin", "12:00:07  rank 1 was lost: <killed>"],
    "world_size": 2,
    "precision": "fp32",
    "device": "cpu",
    "wall_seconds": 9.5,
    "dataset_uri": "s3://user:hunter2@bucket/set",
    "credits": ["OpenMoji <https://openmoji.org>, CC BY-SA 4.0"],
}


class Page(HTMLParser):
    """Tags with attributes, and the text outside of style."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data if self.tags and self.tags[-1][0] != "style" else ""


@pytest.fixture(scope="module")
def config() -> Config:
    sizes = {"data.resolution": 16, "model.hidden_size": 16, "model.num_heads": 2}
    sizes |= {"model.depth": 1, "model.encoder_hidden_size": 16, "flow.sampler_steps": 2}
    sizes |= {"model.downsampling": 4, "representation.dim": 12}
    return with_overrides(Config(), sizes)


@pytest.fixture(scope="module")
def evaluation(config):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    return evaluate(Autoencoder(config).eval(), images, angles_degrees=(15, 45, 90))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config, evaluation) -> Path:
    folder = tmp_path_factory.mktemp("report") / "made" / "here"
    page = write_report(
        folder,
        numbers=evaluation.numbers(),
        pictures=evaluation.pictures,
        config=config,
        facts=FACTS,
        curves=[(step, 1 / (1 + step)) for step in range(100)],
    )
    assert page == folder / "report.html"
    return folder


def test_the_folder_holds_every_figure_and_nothing_unexpected(folder):
    figures = {f"{name}.png" for name in (*FIGURES, "curves")}
    others = {"report.html", "summary.json", "evaluation.json", "trajectory.gif", "filmstrip.png"}
    others.add("model_card.md")
    assert {path.name for path in folder.iterdir()} == figures | others
    for name in figures:
        with Image.open(folder / name) as image:
            assert image.format == "PNG"
            assert image.convert("L").getextrema()[0] < 128  # something dark is drawn on white
            assert image.getpixel((0, image.height - 1))[:3] == (255, 255, 255)


def test_the_model_card_lies_beside_the_page(folder, evaluation, config):
    card = (folder / "model_card.md").read_text(encoding="utf-8")
    assert card == render_model_card(evaluation.numbers(), config, FACTS)


def test_the_page_shows_the_very_figures_of_the_folder(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    shown = [base64.b64decode(source.partition(";base64,")[2]) for source in sources]
    order = ("orbit.png", "gap.png", "rotations.png", "reconstructions.png", "trajectory.gif")
    order += ("filmstrip.png", "energy.png", "loss_by_time.png", "steps.png", "curves.png")
    assert shown == [(folder / name).read_bytes() for name in order]
    kinds = [source.partition(";")[0] for source in sources]
    assert kinds == [f"data:image/{name[-3:]}" for name in order]
    for data in shown:
        Image.open(io.BytesIO(data)).verify()


def test_the_page_loads_nothing_and_runs_nothing(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "@import" not in html
    assert "url(" not in html


def test_text_is_escaped_and_passwords_are_left_out(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert FACTS["run_name"] in page.text
    assert FACTS["credits"][0] in page.text
    assert all(event in page.text for event in FACTS["events"])
    assert "https" not in [tag for tag, _ in page.tags]
    assert "hunter2" not in html
    assert "s3://***@bucket/set" in page.text


def test_the_page_says_what_was_measured(folder, evaluation, config):
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert f"{evaluation.psnr:.2f} dB" in text
    assert f"{evaluation.psnr_by_element['rot90']:.3f}" in text
    assert 'efae.load("models:/efae/7")' in text
    assert "is g applied to x" in text  # a random octic model is exact already
    for element in D4:
        assert f"{evaluation.psnr_by_element[element.name]:.3f}" in text
        assert element.name in text
    assert "images made exactly symmetric" in text
    assert "SSIM" in text
    assert "Gaussian window 11" in text
    assert "optimizer.learning_rate" in text
    assert str(config.optimizer.learning_rate) in text


def test_a_small_gap_alone_is_not_called_exact_and_facts_may_be_missing(
    tmp_path, evaluation, config
):
    numbers = evaluation.numbers()
    numbers["encoder_error"] = {**numbers["encoder_error"], "rot90": 0.5}
    numbers["gap_db"] = dict.fromkeys(numbers["gap_db"], 0.0)
    numbers["worst_gap_db"] = 0.0
    numbers["psnr_by_steps"] = {str(k): v for k, v in numbers["psnr_by_steps"].items()}  # JSON's
    numbers["linear_psnr"] = evaluation.psnr - 1
    numbers["closed_form_split"] = {"multiplicities": numbers["multiplicities"], "linear_psnr": 3.0}
    pictures = SimpleNamespace(**vars(evaluation.pictures))  # taken by shape, not by class
    config = with_overrides(config, {"data.buckets": ((16, 16), (16, 24))})
    page = write_report(tmp_path, numbers=numbers, pictures=pictures, config=config, facts={})
    text = Page(page.read_text(encoding="utf-8")).text
    assert "is not exactly g applied to x" in text
    assert not (tmp_path / "curves.png").exists()
    assert "Data credits" not in text
    assert "EFAE report card: one model" in text
    flowing = " ".join(text.split())
    assert "was trained on images of 16 \u00d7 16, 16 \u00d7 24;" in flowing
    assert "1.00 dB more" in flowing
    assert "3.00 dB, that of this model" in flowing
    assert "does not beat the best linear map" not in flowing


def test_the_page_compares_the_model_with_the_best_linear_map(folder, evaluation):
    text = " ".join(Page((folder / "report.html").read_text(encoding="utf-8")).text.split())
    assert evaluation.psnr < evaluation.linear_psnr  # it is not trained
    assert f"best linear map: {evaluation.linear_psnr:.2f}" in text
    assert f"The model, {evaluation.psnr:.2f} dB, does not beat the best linear map" in text
    split = evaluation.closed_form_split
    best, own = (
        "+".join(str(n[irrep]) for irrep in ("a1", "a2", "b1", "b2", "e"))
        for n in (split["multiplicities"], evaluation.multiplicities)
    )
    assert f"split is {best}, {split['linear_psnr']:.2f} dB; this model's is {own}," in text
    assert "has 2 invariant channels, 4 that change sign and 6 that turn" in text


def test_advice_names_the_settings_that_are_not_set_yet(config):
    numbers = {"psnr": 29.0, "linear_psnr": 31.45}
    advice = advise_on_linear_map(numbers, config)
    assert "29.00 dB, does not beat" in advice
    assert "(--model.start closed_form --model.bottleneck running)" in advice
    start = {"model.start": "closed_form", "model.bottleneck": "running"}
    assert "closed_form" not in advise_on_linear_map(numbers, with_overrides(config, start))
    velocity = with_overrides(config, {"flow.prediction": "velocity"})
    assert "--flow.prediction image" in advise_on_linear_map(numbers, velocity)
    assert "--" not in advise_on_linear_map(numbers, None)
    for fine in ({"psnr": 32.0}, {"psnr": None}, {"linear_psnr": None}):
        assert advise_on_linear_map(numbers | fine, config) == ""


@pytest.fixture(scope="module")
def deterministic(evaluation):
    """The numbers and pictures of a tokenizer without noise, flow or irreps."""
    numbers = evaluation.numbers()
    protocol = {k: v for k, v in numbers["protocol"].items() if not k.startswith("sampler")}
    protocol["linear_psnr"] = "not measured: too large"
    numbers |= {
        **{
            "protocol": protocol,
            "deterministic": True,
            "noise_floor_db": None,
            "sampler_steps": None,
        },
        **{"psnr_by_steps": {}, "ssim_by_steps": {}, "sharpness_by_steps": {}},
        **{"loss_by_time": None, "velocity_error_by_time": None, "rotations": {}},
        **{"energy_by_irrep": {"a1": 1.0}, "worst_gap_db": 7.25},
        **{"linear_psnr": None, "linear_ssim": None, "closed_form_split": None},
        # A latent without a grid.
        "diffusability": dict.fromkeys(numbers["diffusability"])
        | {"velocity_irreducible_variance": 1.234},
    }
    pictures = SimpleNamespace(**vars(evaluation.pictures) | {"states": []})
    return numbers, pictures


def test_a_deterministic_tokenizer_has_no_empty_boxes(tmp_path, deterministic):
    numbers, pictures = deterministic
    facts = {"model_uri": "/models/vae"}
    page = write_report(tmp_path, numbers=numbers, pictures=pictures, config=None, facts=facts)
    read = Page(page.read_text(encoding="utf-8"))
    drawn = {path.stem for path in tmp_path.iterdir() if path.suffix in {".png", ".gif"}}
    assert drawn == {"orbit", "gap", "reconstructions"}
    assert not (tmp_path / "model_card.md").exists()  # that of others is theirs to write
    assert len([tag for tag, _ in read.tags if tag == "img"]) == 3
    absents = (
        "None",
        "unknown",
        "sampler steps",
        "Loss by time",
        "Noise floor",
        "any angle",
        "slope of the spectrum",
    )
    for absent in absents:
        assert absent not in read.text
    assert "Configuration" not in read.text
    assert "this decoder draws no noise" in read.text
    assert "The best linear map was not measured: too large." in read.text
    assert 'load_diffusers("/models/vae")' in read.text
    assert "1.234" in read.text


def test_several_models_stand_side_by_side(tmp_path, evaluation, deterministic, config):
    numbers, pictures = deterministic
    mirror = ("identity", "flip_h")  # the second model's group; the first has all eight
    names = ("gap_db", "psnr_by_element", "ssim_by_element", "encoder_error", "decoder_error_db")
    numbers = numbers | {name: {g: numbers[name][g] for g in mirror} for name in names}
    numbers["gap_db"]["flip_h"] = 7.25
    pictures = SimpleNamespace(**vars(pictures) | {"acted": {g: pictures.acted[g] for g in mirror}})
    errors = dict.fromkeys(evaluation.gap_db, 0.75) | {"identity": 0.0, "flip_h": 0.0625}
    fitted: dict[str, Any] = {f"{k}_error": errors for k in ("spatial", "own", "fitted")}
    fitted["representation_error"] = errors | {"rot90": 0.5, "flip_h": 0.03125}
    fitted |= {"multiplicities": evaluation.multiplicities, "images": 4}
    fitted["variance_by_irrep"] = evaluation.energy_by_irrep
    measured = evaluation.numbers() | {"fitted_action": fitted}
    measured["encoder_error"] = measured["encoder_error"] | {"flip_h": 0.1797, "rot90": 0.2891}
    first = Card(measured, evaluation.pictures, config, {"model_uri": "models:/a/1"})
    second = Card(numbers, pictures, None, {"model_uri": "/models/vae"})
    cards = {"models:/a/1": first, "diffusers:<vae>": second}
    page = write_comparison(tmp_path, cards, {"data": "s3://set", "credits": FACTS["credits"]})
    html = page.read_text(encoding="utf-8")
    read = Page(html)
    assert "diffusers:<vae>" in read.text
    assert "<vae>" not in html
    assert "7.25" in read.text
    assert "deterministic" in read.text
    text = " ".join(read.text.split())
    assert "over the elements that all of them have, identity, flip_h;" in text
    # What the worst element is depends on those.
    for one, other in (("0.1797", "0.2891"), ("0.03125; 0.0625", "0.75")):
        assert one in text
        assert other not in text
    split = r"\+".join(str(count) for count in evaluation.multiplicities.values())
    assert re.search(rf"explains encode\(g·x\) best\s*{split}\s*not fitted", text)
    assert re.search(r"passes\s*1 per encode and decode", text)
    assert f"models:/a/1: {evaluation.protocol['sampler']}" in text
    assert "diffusers:<vae>: none" in text
    assert f"{min(found['psnr'] for found in first.numbers['rotations'].values()):.2f}" in read.text
    # The other one's angles, linear map, its protocol, and three measures of a grid.
    assert read.text.count("not measured") == 7
    assert f"{evaluation.diffusability.local_distant_similarity:.3f}" in read.text
    assert f"{evaluation.linear_psnr:.2f}" in read.text
    assert FACTS["credits"][0] in read.text
    sources = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
    shown = [base64.b64decode(source.partition(";base64,")[2]) for source in sources]
    folders = ("1-models-a-1", "2-diffusers-vae")
    order = ["gaps.png", "rotations.png"]
    order += [*(f"{f}/{n}.png" for n in ("orbit", "reconstructions") for f in folders)]
    assert shown == [(tmp_path / name).read_bytes() for name in order]
    assert all((tmp_path / folder / "report.html").is_file() for folder in folders)
    models = json.loads((tmp_path / "summary.json").read_text())["models"]
    assert list(models) == list(cards)
    assert models["diffusers:<vae>"]["worst_gap_db"] == 7.25


def test_every_number_is_there_for_machines(folder, evaluation):
    written = json.loads((folder / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(evaluation.numbers()))
    assert list(written["rotations"]) == ["0.0", "15.0", "45.0", "90.0"]
    assert written["rotations"]["45.0"]["psnr"] == evaluation.rotations[45.0]["psnr"]


def test_the_card_shows_the_worst_angle(folder, evaluation):
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    worst = min(found["psnr"] for found in evaluation.rotations.values())
    assert f"At the worst angle\n{worst:.2f} dB" in text


def test_the_card_shows_diffusability(folder, evaluation):
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    shown = evaluation.diffusability.scores() | {"slope": evaluation.diffusability.spectral_slope}
    shown |= evaluation.diffusability.spectral_energy_concentration_by_irrep
    for name in shown.keys() - {"spectral_slope_gap", "slope"}:
        assert f"{shown[name]:.3f}" in text, name
    assert f"{shown['slope']:.2f}" in text
    assert "0.30 of the interpolated FID" in text
    assert "We have not measured" in text


@pytest.mark.parametrize(
    ("found", "spatial", "said"),
    [
        (1e-12, 1.5, "the channels carry the representation 2+1+0+0+3 (A1+A2+B1+B2+E): with it"),
        (0.4, 1.5, "in part: with it, the error is 0.4 for the worst element, 1.5 if only the"),
        (1.4, 1.5, "no representation of the channels explains this encoder: with the best one"),
    ],
)
def test_a_fitted_action_is_explained(found, spatial, said):
    fitted = {
        "multiplicities": {"a1": 2, "a2": 1, "b1": 0, "b2": 0, "e": 3},
        "representation_error": {"identity": 0.0, "flip_h": found},
        "spatial_error": {"identity": 0.0, "flip_h": spatial},
    }
    assert said in explain_fitted_action(fitted)


def test_summary_has_the_agreed_keys_and_values(folder, evaluation):
    summary = json.loads((folder / "summary.json").read_text())
    assert tuple(summary) == SUMMARY
    for name in ("psnr", "linear_psnr", "gap_db", "worst_gap_db", "group_law_error"):
        assert summary[name] == getattr(evaluation, name)
    assert set(summary["gap_db"]) == {element.name for element in D4}
    for name in set(SUMMARY) & set(FACTS):
        assert summary[name] == FACTS[name]


def test_summary_is_json_when_something_is_unknown_or_not_finite(evaluation):
    numbers = evaluation.numbers() | {"psnr": float("nan"), "gap_db": {"rot90": float("inf")}}
    summary = summarize(numbers, {"steps": 3})
    assert summary["psnr"] is None
    assert summary["gap_db"] == {"rot90": None}
    assert (summary["steps"], summary["recoveries"]) == (3, None)
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    "broken",
    [
        {"psnr": float("nan")},
        {"gap_db": {"rot90": float("inf")}},
        {"loss_by_time": [1, float("nan")]},
    ],
)
def test_a_broken_model_is_named_before_anything_is_drawn(tmp_path, evaluation, config, broken):
    numbers = evaluation.numbers() | broken
    with pytest.raises(ValueError, match=f"not finite in {next(iter(broken))}:"):
        write_report(
            tmp_path, numbers=numbers, pictures=evaluation.pictures, config=config, facts={}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
