"""The model card says what the model is and is worth, as a reader of Hugging Face finds it."""

import ast
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.evaluate import evaluate
from efae.evaluation.results import Evaluation
from efae.experiment.facts import describe_preset
from efae.model.autoencoder import Autoencoder
from efae.presets import PRESETS
from efae.report.model_card import render_model_card
from efae.symmetry import D4
from efae.symmetry.representation import irrep_matrix

SIZES = {
    "data.resolution": 16,
    "model.hidden_size": 16,
    "model.encoder_hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 1,
    "flow.sampler_steps": 2,
}
FACTS = {
    "run_name": "drawings-1",
    "preset": "quickstart; model.depth: 4 -> 1",
    "model_uri": "models:/efae/7",
    "steps": 12,
    "images_seen": 1536,
    "commit": "74bd2a3",
    "train_data": "s3://efae-data/openmoji-32/train (3983 images, id d5c4db75)",
    "held_out_data": "s3://efae-data/openmoji-32/held_out (512 images, id 6ff8ea7c)",
    "credits": ["OpenMoji <https://openmoji.org> (CC BY-SA 4.0)"],
}


@pytest.fixture(scope="module")
def config() -> Config:
    return with_overrides(Config(), SIZES)


@pytest.fixture(scope="module")
def evaluation(config) -> Evaluation:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    return evaluate(Autoencoder(config).eval(), images)


@pytest.fixture(scope="module")
def card(config, evaluation) -> str:
    return render_model_card(evaluation.numbers(), config, FACTS)


def section(card: str, name: str) -> str:
    return re.split(r"^## ", card, flags=re.MULTILINE)[1:][headings(card).index(name)]


def headings(card: str) -> list[str]:
    return re.findall(r"^## (.*)$", card, flags=re.MULTILINE)


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_hugging_face_reads_the_header_and_the_numbers(card, evaluation):
    data = ModelCard(card).data
    assert data.library_name == "efae"
    assert "equivariance" in data.tags
    assert data.model_name == FACTS["run_name"]
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert set(values) == {"psnr", "ssim", "worst_gap_db"}
    for name, value in values.items():
        assert value == pytest.approx(getattr(evaluation, name), rel=1e-2)


def test_small_numbers_stay_numbers(config, evaluation):
    """YAML 1.1 takes 3e-07 for a text."""
    numbers = evaluation.numbers() | {"worst_gap_db": 3e-7}
    metrics = header(render_model_card(numbers, config, FACTS))["model-index"][0]["results"][0]
    assert metrics["metrics"][-1]["value"] == 3e-7


def test_it_has_every_section_and_no_gap(card):
    expected = ["Numbers", "The latent", "Use", "Trained on", "Limits", "Training"]
    assert headings(card) == expected
    assert "None" not in card
    assert "\n\n\n" not in card
    assert card.endswith("|\n")
    assert len(card) < 6000  # somebody reads it


def test_numbers_stand_beside_their_protocol(card, evaluation):
    text = section(card, "Numbers")
    assert f"| PSNR | {evaluation.psnr:.2f} dB | torchmetrics" in text
    for name in ("SSIM", "worst gap", "group law error", "encoder error"):
        assert len(re.findall(rf"^\| {name} \| \S+.* \| .{{20,}} \|$", text, re.MULTILINE)) == 1
    assert "4 held-out images" in text
    assert "id 6ff8ea7c" in text
    assert "2 steps of the sampler euler" in text


def test_the_best_linear_map_stands_beside_the_model(card, config, evaluation):
    assert evaluation.linear_psnr is None  # four images are too few
    assert "linear map" not in card
    protocol = evaluation.protocol | {"linear_psnr": "equivariant, fitted to these very images"}
    numbers = evaluation.numbers() | {"linear_psnr": 31.449, "protocol": protocol}
    text = section(render_model_card(numbers, config, FACTS), "Numbers")
    assert "| PSNR of the best linear map | 31.45 dB | equivariant, fitted to these" in text


def test_every_irrep_is_told_by_what_it_does(card, config):
    text = section(card, "The latent")
    representation = Autoencoder(config).representation
    for irrep, channels in representation.blocks.items():
        (line,) = re.findall(rf"^\| (\d+) to (\d+) \| {irrep.upper()} \|.*$", text, re.MULTILINE)
        assert (int(line[0]), int(line[1])) == (channels.start, channels.stop - 1)
        if irrep in ("a2", "b1", "b2"):
            (told,) = re.findall(rf"{irrep.upper()} .*changes sign under (.*) \|", text)
            negative = {g.name for g in D4 if irrep_matrix(irrep, g).item() == -1}
            assert set(told.split(", ")) == negative


def test_the_examples_are_python_and_run(card, tmp_path, config):
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        ast.parse(block)
    assert 'efae.load("models:/efae/7")' in blocks[0]
    model, image = Autoencoder(config).eval(), torch.zeros(1, 3, 16, 16)
    names = {"model": model, "image": image}
    folder = repr(str(tmp_path))
    whole = "".join(blocks).replace('"folder"', folder)
    exec(re.sub(r"model = efae\.load\(.*", "", whole), names)
    assert names["picture"].shape == image.shape


def test_data_and_training_are_told(card):
    trained = section(card, "Trained on")
    assert "id d5c4db75" in trained
    assert "CC BY-SA 4.0" in trained
    training = section(card, "Training")
    for fact in ("quickstart; model.depth: 4 -&gt; 1", "1,536", "74bd2a3", "| 12 |"):
        assert fact in training


def test_limits_are_those_of_the_level(card, config, evaluation):
    assert "turns by other angles are not exact" in section(card, "Limits")
    learned = with_overrides(config, {"model.level": "objective"})
    other = render_model_card(evaluation.numbers(), learned, FACTS)
    assert "by construction" in card
    assert "by construction" not in other
    assert "learned at best (level `objective`)" in section(other, "Limits")


def test_texts_stay_texts_and_secrets_out(config, evaluation):
    facts = {
        "run_name": 'x"\n---\n# <script>alert(1)</script> ![a](http://b) | `',
        "train_data": "s3://user:hunter2@bucket/set",
        "held_out_data": "https://host/set?token=hunter2",
        "steps": 3,
        "commit": "a|b",
    }
    card = render_model_card(evaluation.numbers(), config, facts)
    assert header(card)["model-index"][0]["name"] == facts["run_name"]
    body = card.split("---\n", 2)[2]
    assert len([line for line in body.splitlines() if line.startswith("# ")]) == 1
    assert "<script>" not in body
    assert "![a](" not in body
    assert "| commit | a\\|b |" in body
    assert "hunter2" not in card


def test_what_is_not_known_is_left_out(config, evaluation):
    card = render_model_card(evaluation.numbers(), config, {})
    assert headings(card)[-1] == "Limits"
    assert 'efae.load("models:/efae/VERSION")' in card
    assert "Not recorded here" in card
    measured = render_model_card(evaluation.numbers(), config, {"credits": FACTS["credits"]})
    assert "Not recorded here" in measured
    assert "OpenMoji" not in measured
    assert "None" not in card


def test_the_scale_of_a_fine_tuned_latent_is_told(config):
    architecture = {"_class_name": "AutoencoderKL", "latent_channels": 4, "shift_factor": 0.1}
    settings = {
        "model.kind": "diffusers",
        "model.level": "regularized",
        "model.bottleneck": "posterior",
        "start.model": "diffusers:vae",
        "start.architecture": json.dumps(architecture),
        "representation.dim": 4,
    }

    def read(**changes) -> str:
        return render_model_card(None, with_overrides(config, settings | changes), {})

    spatial = {"representation.multiplicities": (4, 0, 0, 0, 0)}
    split = {"representation.multiplicities": (3, 0, 1, 0, 0)}
    anew = read(**spatial)
    assert "at unit root mean square" in anew
    assert "makes the\nlatents unit scale" in anew
    for kept in ({"start.train": "decoder"}, {"start.anchor_weight": 0.1}):
        cards = [read(**kept, **action) for action in (spatial, split)]
        for card in cards:
            assert "shifted and scaled by the factors of the pretrained" in card
            assert "unit" not in card
        assert ["these have no shift" in card for card in cards] == [False, True]


def test_pixels_that_diffusers_cannot_have_are_told(config, evaluation):
    odd = {"data.resolution": 12, "model.patch_size": 3, "model.downsampling": 6}
    card = render_model_card(evaluation.numbers(), with_overrides(config, odd), {})
    assert "AutoencoderEFAE" not in card
    assert "power of two" in card


def test_a_preset_is_recognised_with_what_was_changed():
    for name, (_, preset) in PRESETS.items():
        moved = with_overrides(preset, {"data.uri": "s3://mine/set", "tracking.commit": "1"})
        assert describe_preset(moved) == name
    changed = with_overrides(PRESETS["quickstart"][1], {"training.steps": 9})
    assert describe_preset(changed) == "quickstart; training.steps: 3000 -> 9"
