"""jobs/promote.py on the local stack: real MLflow, hand-made models, no training."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import ShardDataset, storage
from data_pipelines.build_shards import build_shards
from efae.checkpoints import checkpoint
from efae.config import Config
from efae.config import forms as configuration
from efae.evaluation.evaluate import evaluate
from efae.evaluation.held_out import read_held_out
from efae.experiment.publication import Product, publish
from efae.generation.network import Generator
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import hash_tensors, pack_generator, pack_model
from efae.model.representation import build_representation
from efae.model.stored_files import WEIGHTS
from efae.preflight.driver_checks import RunData
from efae.registry import pull, registration, versions
from efae.registry.promotion import GATES
from efae.registry.versions import RegisteredVersion
from efae.web_page import page
from jobs import generate
from jobs.promote import main
from tests.opened_files import watch_opens
from tests.unit.training.test_generator import configure, latents, model

__all__ = ["latents", "model"]

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]

TINY = configuration.with_overrides(
    Config(),
    {
        "data.resolution": 16,
        "model.hidden_size": 32,
        "model.encoder_hidden_size": 32,
        "model.num_heads": 2,
        "model.depth": 1,
        "flow.sampler_steps": 2,
    },
)
LINEAGE = {
    "train_data": "aaaa",
    "held_out_data": "bbbb",
    "held_out_images": "64",
    "image_shape": "3x16x16",
    "group": "D4",
}
ROOT = Path(__file__).parents[2]

Register = Callable[..., RegisteredVersion]


@pytest.fixture
def register(name, run) -> Register:
    """Registers one more version with this PSNR; `changes` are tags, None leaves one out."""

    def register(psnr: float, gap: float = 2e-6, **changes: str | None) -> RegisteredVersion:
        torch.manual_seed(int(psnr * 1000))
        model = Autoencoder(TINY)
        packed = pack_model(model.state_dict(), TINY, model.representation)
        tags = {key: value for key, value in (LINEAGE | changes).items() if value is not None}
        metrics = {"psnr": psnr, "worst_gap_db": gap}
        return registration.register_model(packed, name, run, metrics, tags)

    return register


@pytest.fixture
def aliases(client, name) -> Callable[[], dict[str, int]]:
    def aliases() -> dict[str, int]:
        found = client.get_registered_model(name).aliases
        return {alias: int(version) for alias, version in found.items()}

    return aliases


def promote(version: RegisteredVersion | str, alias: str = "champion", *options: str) -> int:
    uri = version if isinstance(version, str) else version.uri
    return main(["--model", uri, "--alias", alias, *options])


def test_a_better_version_becomes_champion_and_the_way_back_works(
    register, client, name, aliases, capsys
):
    first, second = register(24.0), register(24.5)
    assert aliases() == {"champion": 1}
    assert promote(second) == 0
    assert aliases() == {"champion": 2}
    output = capsys.readouterr().out
    assert f"models:/{name}@champion is {second.uri} now; it was {first.uri}" in output
    assert [line.split()[:2] for line in output.splitlines() if line.startswith("ok")] == [
        ["ok", gate] for gate in ("integrity", *GATES)
    ]
    tags = client.get_model_version(name, "2").tags
    assert tags["promoted.champion"] == (
        f"replaced: {first.uri}; passed: integrity, {', '.join(GATES)}; skipped: none"
    )
    back = output.split("python jobs/promote.py ")[1].split()
    assert main(back) == 0
    assert aliases() == {"champion": 1}
    skipped = client.get_model_version(name, "1").tags["promoted.champion"]
    assert skipped == (f"replaced: {second.uri}; passed: integrity; skipped: {', '.join(GATES)}")
    assert client.get_registered_model(name).tags == {}


def test_what_is_not_better_is_refused_and_the_gates_are_named(
    register, name, aliases, capsys, client
):
    first, second = register(24.5), register(24.0, gap=0.25, held_out_data="cccc")
    assert promote(second) == 1
    output = capsys.readouterr().out
    assert [line.split()[1] for line in output.splitlines() if line.startswith("FAIL")] == [
        "images",
        "metric",
        "gap",
    ]
    assert f"--model {first.uri} {second.uri}" in output
    assert f"refused: models:/{name}@champion is {first.uri} as before" in output
    assert aliases() == {"champion": 1}
    assert "promoted.champion" not in client.get_model_version(name, "2").tags
    assert promote(second, "champion", "--skip", "images", "metric") == 1
    assert promote(second, "champion", "--skip", "images", "metric", "gap") == 0
    assert aliases() == {"champion": 2}


def test_generators_are_promoted_by_the_fid_that_compare_records(
    latents, name, run, client, aliases, tmp_path, capsys
):
    config = configure(latents)
    for version in (1, 2):
        torch.manual_seed(version)
        network = Generator(config)
        weights = {k: w + 0.05 * torch.randn_like(w) for k, w in network.state_dict().items()}
        tags = {"tokenizer_digest": "aaaa"}
        found = registration.register_model(pack_generator(weights, config), name, run, {}, tags)
        drawn = str(tmp_path / str(version))
        uri = found.uri if version == 1 else f"models:/{name}@sha256:{found.tags['digest']}"
        options = [f"--model={uri}", "--count=8", "--on=here", f"--output={drawn}"]
        assert generate.main(["sample", *options]) == 0
        if version == 2:
            assert promote(found) == 1
            said = capsys.readouterr().out
            assert [line.split()[1] for line in said.splitlines() if line.startswith("FAIL")] == [
                "images",
                "metric",
            ]
        # The first version's samples are the reference, so its FID is 0.
        sets = [f"--samples={drawn}", f"--reference={tmp_path / '1'}"]
        assert generate.main(["compare", *sets, f"--output={tmp_path / 'report'}"]) == 0
        assert f"FID recorded on {found.uri}" in capsys.readouterr().out
        report = json.loads((tmp_path / "report" / "sample_quality.json").read_text())
        tags = client.get_model_version(name, str(version)).tags
        assert tags["metric.fid"] == f"{report['fid']:.6g}"
        assert tags["fid_features"].startswith("untrained network ")
    assert aliases() == {"champion": 1}
    client.set_registered_model_alias(name, "champion", "2")
    assert promote(f"models:/{name}/1") == 0
    assert aliases() == {"champion": 1}


def test_other_aliases_are_compared_only_where_that_is_asked(register, name, aliases, capsys):
    first, second = register(24.5), register(24.0)
    assert promote(second, "candidate") == 0
    assert "named nothing before" in capsys.readouterr().out
    assert promote(first, "candidate") == 0
    assert "--alias candidate\n" in capsys.readouterr().out  # the way back needs no skips
    assert promote(second, "candidate", "--compare") == 1
    assert aliases() == {"champion": 1, "candidate": 1}
    assert promote(f"models:/{name}@champion", "best", "--compare") == 0
    assert aliases()["best"] == 1


def test_a_champion_that_is_one_already_stays_it(register, aliases, capsys):
    version = register(24.0)
    assert promote(version) == 0
    assert "already" in capsys.readouterr().out
    assert aliases() == {"champion": 1}


def test_without_a_champion_the_absolute_gates_remain(register, client, name, aliases, capsys):
    register(24.0)
    client.delete_registered_model_alias(name, "champion")
    assert aliases() == {}
    assert promote(register(25.0, train_data="bbbb")) == 1
    assert promote(register(26.0, train_data=None)) == 1
    assert aliases() == {}
    assert "nothing to compare with" in capsys.readouterr().out
    assert promote(f"models:/{name}/1") == 0
    assert aliases() == {"champion": 1}


def test_a_damaged_model_gets_no_alias_though_the_cache_holds_a_sound_one(
    register, client, run_id, aliases, capsys
):
    register(24.0)
    version = register(25.0)
    pull.pull(version.uri)
    root = client.get_run(run_id).info.artifact_uri.replace(
        "mlflow-artifacts:/", "s3://mlflow/artifacts/"
    )
    source = client.get_model_version(version.name, str(version.version)).source
    address = f"{root}/{source.rsplit('/', 1)[1]}/{WEIGHTS}"
    good = storage.read_bytes(address)
    storage.write_bytes(address, good[:-1] + bytes([good[-1] ^ 1]))
    every = ("--skip", *GATES)
    for arguments in (("champion", *every), ("candidate",)):
        assert promote(version, *arguments) == 1
        assert f"{WEIGHTS} is damaged" in capsys.readouterr().out
    assert aliases() == {"champion": 1}
    storage.write_bytes(address, good)
    client.delete_model_version_tag(version.name, str(version.version), "manifest_digest")
    assert promote(version) == 1
    assert "no tag manifest_digest" in capsys.readouterr().out


def test_a_damaged_champion_is_not_confirmed(register, client, run_id, aliases):
    version = register(24.0)
    root = client.get_run(run_id).info.artifact_uri.replace(
        "mlflow-artifacts:/", "s3://mlflow/artifacts/"
    )
    storage.write_bytes(f"{root}/model/config.json", b"{}")
    assert promote(version) == 1
    assert aliases() == {"champion": 1}


def test_weights_that_are_not_their_configurations_are_refused(register, name, run, capsys):
    register(24.0)
    weights = {"encoder": torch.zeros(2)}
    wrong = pack_model(weights, TINY, build_representation(TINY))
    version = registration.register_model(wrong, name, run, {}, {})
    assert promote(version, "candidate") == 1
    assert "not its configuration's" in capsys.readouterr().out


def test_what_cannot_be_done_is_said(register, name, capsys, monkeypatch, aliases):
    version = register(24.0)
    for arguments, message in (
        ((f"models:/{name}/77",), "has versions 1 and"),
        ((f"models:/{name}@best",), "aliases champion (1)"),
        (("models:/other/1",), "registered models: "),
        (("runs:/0123/model",), "names no version of the registry"),
        ((version, "latest"), "latest"),
        ((version, "best", "--compare", "--metric", "taste"), f"{version.uri} carries psnr"),
        ((version, "best", "--margin", "-1"), "--margin -1"),
    ):
        assert promote(*arguments) == 1
        assert message in capsys.readouterr().err
    assert aliases() == {"champion": 1}
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert promote(version) == 1
    assert "MLFLOW_TRACKING_URI" in capsys.readouterr().err


def test_another_promotion_under_way_is_waited_for_unless_it_was_killed(
    register, client, name, server, aliases, capsys
):
    register(24.0)
    version = register(25.0)
    with versions.promote_alone(name, server):
        assert promote(version) == 1
    assert f"another promotion of '{name}' began" in capsys.readouterr().err
    assert aliases() == {"champion": 1}
    killed = time.time() - versions.ABANDONED_AFTER_SECONDS - 1
    client.set_registered_model_tag(name, "promoting.killed", f"{killed:.0f}")
    assert promote(version) == 0
    assert client.get_registered_model(name).tags == {}


def test_of_promotions_at_the_same_time_one_at_most_goes_on(register, name, server):
    register(24.0)
    inside, most, entered, refused = 0, 0, 0, 0
    lock = Lock()

    def enter(_: int) -> None:
        nonlocal inside, most, entered, refused
        try:
            with versions.promote_alone(name, server):
                with lock:
                    inside, entered = inside + 1, entered + 1
                    most = max(most, inside)
                time.sleep(0.05)
                with lock:
                    inside -= 1
        except ValueError:
            with lock:
                refused += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(24)))
    assert most <= 1
    assert entered + refused == 24
    assert refused > 0  # or nothing was tried


def write_pictures(folder: Path, seed: int) -> str:
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for i in range(6):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    build_shards(f"folder:{folder / 'images'}", str(folder / "shards"))
    return str(folder / "shards")


def test_what_an_experiment_publishes_says_all_that_the_gates_ask(
    tmp_path, name, client, run, register, monkeypatch
):
    def write_page(_models, folder: Path, _credit: str) -> None:
        assert "report/report.html" in [
            file.path for file in client.list_artifacts(run.id, "report")
        ]
        (folder / "index.html").write_text("<p>")

    monkeypatch.setattr(page, "write_page", write_page)
    uris = [write_pictures(tmp_path / role, seed) for seed, role in enumerate(("train", "held"))]
    config = configuration.with_overrides(
        TINY,
        {
            "data.uri": uris[0],
            "data.held_out_uri": uris[1],
            "data.cache_dir": str(tmp_path / "shard-cache"),
            "tracking.run_name": name,
            "tracking.registered_model": name,
            "tracking.portable": False,
            "tracking.page": True,
            "tracking.report_folder": str(tmp_path / "reports"),
        },
    )
    torch.manual_seed(0)
    model = Autoencoder(config).eval()
    final = str(tmp_path / "final")
    checkpoint.write_checkpoint(
        final,
        model={"raw": torch.zeros(2)},
        ema=model.state_dict(),
        optimizer={},
        metadata={"step": 1},
        config=config,
    )
    evaluation = evaluate(model, read_held_out(config.data, 4))
    data = RunData(config.data)
    with watch_opens() as opened:
        weights = checkpoint.read_model(final).weights
        product = Product(pack_model(weights, config, model.representation), (), evaluation)
        summary = publish(config, data, run, product, {"steps": 1, "credits": []})
    assert summary["tensors_sha256"] == hash_tensors(model.state_dict())
    assert client.list_artifacts(run.id, "report/page")[0].path == "report/page/index.html"
    assert (tmp_path / "reports" / name / "page/index.html").exists()
    for path in (f"{final}/ema.safetensors", *(f"{uri}/index.json" for uri in uris)):
        assert opened.count(path) == 1
    tags = client.get_model_version(name, "1").tags
    stored, reported = (
        Path(client.download_artifacts(run.id, path, str(tmp_path))).read_text()
        for path in ("model/README.md", "report/model_card.md")
    )
    assert f'efae.load("models:/{name}@sha256:{tags["digest"][:12]}")' in stored
    assert reported == stored
    assert tags["train_data"] == ShardDataset.open(uris[0]).id
    assert tags["held_out_data"] == ShardDataset.open(uris[1]).id
    assert tags["held_out_uri"] == uris[1]
    assert (tags["held_out_images"], tags["image_shape"]) == ("4", "3x16x16")
    assert (tags["level"], tags["group"]) == ("exact", "D4")
    metrics = {key.removeprefix("metric."): float(tags[key]) for key in tags if "metric." in key}
    certificate = {"worst_gap_db", "group_law_error", "encoder_error"}
    assert metrics.keys() == {"psnr", "ssim", "held_out_loss", *certificate}
    assert 0 < metrics["encoder_error"] <= 1e-9
    assert metrics["psnr"] == pytest.approx(evaluation.psnr, rel=1e-5)
    assert metrics["held_out_loss"] == pytest.approx(np.mean(evaluation.loss_by_time), rel=1e-5)

    assert promote(f"models:/{name}/1", "best", "--compare") == 0  # it passes by itself
    lineage = {key: tags[key] for key in LINEAGE}
    gap = metrics["worst_gap_db"]
    # And as what is to be beaten:
    assert promote(register(metrics["psnr"] + 1, gap, **lineage)) == 0
    assert promote(register(metrics["psnr"] + 2, gap)) == 1  # measured on other images


def test_the_job_is_a_program_that_needs_no_ray(register, name, aliases):
    register(24.0)
    register(25.0)
    script = "import sys, jobs.promote; code = jobs.promote.main(sys.argv[1:]);"
    script += " assert 'ray' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        [*command, "--model", f"models:/{name}/2", "--alias", "champion"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "to go back" in result.stdout.lower()
    assert aliases() == {"champion": 2}
