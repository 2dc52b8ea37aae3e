"""The registry on the local stack: real MLflow, artifacts on real S3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow.models import Model

import efae
from data_pipelines import storage
from efae.checkpoints import run_folder
from efae.config import forms as configuration
from efae.model.pretrained import read_folder
from efae.model.stored_files import MODEL_FILES, CheckpointError
from efae.registry import pull, registration
from efae.registry.versions import RegisteredVersion
from tests.integration.fault_proxy import FaultProxy
from tests.integration.stored_models import (
    TINY,
    artifact_address,
    make_model,
    write_model,
    write_run,
)
from tests.opened_files import watch_opens

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]

NEEDED = ("ema.safetensors", "config.json", "manifest.json")
"""Of a checkpoint's files, those that a model needs."""


def test_a_registered_model_gives_the_same_numbers_in_another_process(register, name):
    register()
    script = (
        "import sys, torch, efae;"
        f"model = efae.load('models:/{name}@champion');"
        "assert not model.training;"
        "print(model.encode(torch.linspace(-1, 1, 768).view(1, 3, 16, 16)).double().sum().item())"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    image = torch.linspace(-1, 1, 768).view(1, 3, 16, 16)
    expected = make_model().eval().encode(image).double().sum().item()
    assert float(output) == pytest.approx(expected, rel=1e-6)


def test_the_first_version_becomes_the_champion_and_stays_it(register, client, name, run_id):
    first, second = register(seed=0), register(seed=1)
    assert (first, second) == (RegisteredVersion(name, 1), RegisteredVersion(name, 2))
    assert first.uri == f"models:/{name}/1"
    assert client.get_registered_model(name).aliases == {"champion": "1"}
    version = client.get_model_version(name, "1")
    assert version.run_id == run_id
    assert version.status == "READY"
    assert version.tags["metric.psnr"] == "24.125"
    assert version.tags["preset"] == "quickstart"
    assert version.tags["config_digest"] == configuration.digest(TINY)


def test_weights_of_one_run_do_not_overwrite_each_other(register):
    versions = [register(seed) for seed in (0, 1)]
    for seed, version in enumerate(versions):
        weights = pull.read(version.uri).weights
        expected = make_model(seed).state_dict()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_registering_twice_gives_one_version(register, client, name):
    assert register() == register()
    assert len(client.search_model_versions(f"name = '{name}'")) == 1


def test_what_is_stored_is_data_that_mlflow_can_show(register, client, run_id, tmp_path):
    register()
    files = {file.path for file in client.list_artifacts(run_id, "model")}
    stored = {"MLmodel", "manifest.json", *MODEL_FILES}
    assert files == {f"model/{file}" for file in stored}
    path = client.download_artifacts(run_id, "model/MLmodel", str(tmp_path))
    assert list(Model.load(path).flavors) == ["efae"]


def test_the_card_is_the_description_and_a_file_that_no_pull_reads(client, name, run, tmp_path):
    card = "# Title\n\n" + "Latents that turn. " * 400
    folder = write_model(tmp_path / "model")
    version = registration.register_model(read_folder(folder), name, run, {}, {}, card=card)
    path = client.download_artifacts(run.id, "model/README.md", str(tmp_path))
    assert Path(path).read_text() == card
    described = client.get_model_version(name, str(version.version)).description
    assert described[:4900] == card[:4900]
    assert len(described) == 5000
    assert described.endswith("README.md, beside the files.)")
    assert not (pull.pull(version.uri) / "README.md").exists()


def test_a_second_pull_downloads_nothing(register, client, run_id, cache):
    version = register()
    folder = pull.pull(version.uri)
    assert folder.is_relative_to(cache)
    storage.delete(artifact_address(client, run_id, "model"))
    assert pull.pull(version.uri) == folder
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        pull.pull(version.uri)


def test_pull_copies_the_model_to_a_destination(register, tmp_path):
    folder = pull.pull(register().uri, tmp_path / "mine")
    assert folder == tmp_path / "mine"
    assert {path.name for path in folder.iterdir()} == {*MODEL_FILES, "manifest.json"}
    read_folder(folder)


def test_what_does_not_exist_is_named_beside_what_does(register, name, run_id):
    register()
    with pytest.raises(ValueError, match=f"{name}@best.*versions 1 and aliases champion \\(1\\)"):
        pull.pull(f"models:/{name}@best")
    with pytest.raises(ValueError, match=f"{name}/77.*versions 1 and"):
        pull.pull(f"models:/{name}/77")
    with pytest.raises(ValueError, match=f"other@champion'; registered models: .*{name}"):
        pull.pull("models:/other@champion")
    with pytest.raises(ValueError, match="no run '0123'"):
        pull.pull("runs:/0123/model")
    with pytest.raises(ValueError, match="no model at 'weights'; it has model"):
        pull.pull(f"runs:/{run_id}/weights")
    with pytest.raises(ValueError, match="use models:/NAME@ALIAS"):
        pull.pull(f"models:/{name}")


def test_without_a_server_pull_says_so_and_makes_no_database(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        pull.pull("models:/efae@champion")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["s3", "folder"])
def test_a_checkpoint_loads_as_a_model_of_its_ema(where, local_stack, tmp_path):
    run_uri = "s3://efae-runs/registry/load" if where == "s3" else str(tmp_path / "run")
    write_run(run_uri, (3, 7))
    newest = run_folder.find_newest_checkpoint(run_uri)
    assert newest == f"{run_uri}/step-00000007"
    model = efae.load(newest)
    expected = make_model(seed=7).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"newest checkpoint is .*step-00000007"):
        efae.load(run_uri)
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        efae.load(f"{run_uri}/nothing")


def test_a_checkpoint_on_s3_is_fetched_once_and_then_read_once_from_the_cache(
    local_stack, cache, monkeypatch
):
    write_run("s3://efae-runs/registry/once", (5,))
    uri = "s3://efae-runs/registry/once/step-00000005"
    with FaultProxy(local_stack["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        efae.load(uri)
        sizes = {name: size for name, size in storage.list_files(uri).items() if name in NEEDED}
        for name, size in sizes.items():
            assert proxy.bytes_sent(f"*/step-00000005/{name}") == size
        assert proxy.bytes_sent("*/step-00000005/*") == sum(sizes.values())
        proxy.clear()
        with watch_opens() as opened:
            efae.load(uri)
        assert proxy.bytes_sent("*/step-00000005/*") == sizes["manifest.json"]
    check_opened(opened, cache, NEEDED)


def test_a_version_is_downloaded_once_and_then_read_once_from_the_cache(
    register, cache, server, monkeypatch
):
    version = register()
    with FaultProxy(server.uri) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        efae.load(version.uri)
        for name in (*MODEL_FILES, "manifest.json"):
            assert proxy.requests(f"*/artifacts/model/{name}") == 1
        proxy.clear()
        with watch_opens() as opened:
            efae.load(version.uri)
        assert proxy.requests("*/model/*") == 0
    check_opened(opened, cache, (*MODEL_FILES, "manifest.json"))


def test_a_folder_of_save_pretrained_loads_from_s3_too(local_stack, tmp_path):
    uri = "s3://efae-runs/registry/saved"
    storage.upload_folder(write_model(tmp_path / "saved"), uri)
    expected = make_model().state_dict()
    for _ in range(2):
        loaded = efae.load(uri).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def check_opened(opened: list[str], cache: Path, names: tuple[str, ...]) -> None:
    """The cached model's files, each opened once."""
    (folder,) = (path for path in (cache / "models").iterdir() if path.name != "refs")
    found = sorted(path for path in opened if path.startswith(f"{folder}/"))
    assert found == sorted(str(folder / name) for name in names)


def test_only_what_a_model_needs_is_cached_of_a_checkpoint(local_stack):
    write_run("s3://efae-runs/registry/cached", (5,))
    folder = pull.pull("s3://efae-runs/registry/cached/step-00000005")
    assert {path.name for path in folder.iterdir()} == {*NEEDED}


def test_a_half_uploaded_or_damaged_checkpoint_on_s3_gives_way_to_the_one_before(
    local_stack, tmp_path, caplog
):
    run_uri = "s3://efae-runs/registry/damaged"
    write_run(run_uri, (1, 2, 3))
    storage.delete(f"{run_uri}/step-00000003/optimizer.safetensors")
    manifest = json.loads(storage.read_bytes(f"{run_uri}/step-00000002/manifest.json"))
    size = manifest["files"]["ema.safetensors"]["bytes"]
    storage.write_bytes(f"{run_uri}/step-00000002/ema.safetensors", os.urandom(size))
    found = run_folder.read_newest_checkpoint(run_uri, run_folder.warn_of_damage)
    assert found is not None
    assert found[0] == f"{run_uri}/step-00000001"
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
