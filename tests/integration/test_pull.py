"""Pulls from a real MLflow and real S3: by digest, offline, and of changed files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import Model

import efae
from data_pipelines import storage
from data_pipelines.storage.retries import StorageError
from efae.model.pretrained import read_folder
from efae.model.stored_files import MODEL_FILES, WEIGHTS, CheckpointError, sha256
from efae.registry import pull, registration, versions
from efae.registry.versions import RegisteredVersion
from efae.tracking import runs
from tests.integration.fault_proxy import FaultProxy
from tests.integration.stored_models import (
    artifact_address,
    make_model,
    write_model,
    write_run,
)
from tests.planted import make_pickle

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("cache")]


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[bytes, Path]:
    """A pickle, and the folder that is there once somebody unpickled it."""
    return make_pickle(tmp_path / "unpickled"), tmp_path / "unpickled"


def flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def change_sampler(data: bytes) -> bytes:
    """Another configuration, as valid, of as many bytes, for the same weights."""
    settings = json.loads(data)
    settings["efae"]["flow"]["distill_steps"] += 1
    return (json.dumps(settings, indent=2) + "\n").encode()


@pytest.mark.parametrize(
    ("file", "change"),
    [(WEIGHTS, flip_last_bit), ("config.json", change_sampler)],
    ids=["weights", "config"],
)
def test_a_file_changed_in_the_store_is_refused(
    register, client, run_id, cache, file: str, change: Callable[[bytes], bytes]
):
    version = register()
    address = artifact_address(client, run_id, f"model/{file}")
    storage.write_bytes(address, change(storage.read_bytes(address)))
    with pytest.raises(CheckpointError, match=f"{version.uri}: {file} is damaged"):
        pull.pull(version.uri)
    assert list((cache / "models").glob("*")) == []


def rewrite_manifest(address: str, changed: dict[str, bytes]) -> None:
    manifest = json.loads(storage.read_bytes(f"{address}/manifest.json"))
    for file, data in changed.items():
        storage.write_bytes(f"{address}/{file}", data)
        manifest["files"][file] = {"bytes": len(data), "sha256": sha256(data)}
    manifest["card"] = {"psnr": 99.0}
    storage.write_bytes(f"{address}/manifest.json", json.dumps(manifest).encode())


@pytest.mark.parametrize("what", ["weights", "config", "manifest", "pickle"])
def test_files_rewritten_together_with_their_manifest_are_refused(
    register, client, run_id, tmp_path, pickled, what
):
    version = register()
    address = artifact_address(client, run_id, "model")
    config = storage.read_bytes(f"{address}/config.json")
    other = write_model(tmp_path / "other", seed=9) / WEIGHTS
    changed = {
        "weights": {WEIGHTS: other.read_bytes()},
        "config": {"config.json": change_sampler(config)},
        "manifest": {},
        "pickle": {WEIGHTS: pickled[0]},
    }
    rewrite_manifest(address, changed[what])
    with pytest.raises(CheckpointError, match=r"manifest\.json is not the one that was registered"):
        efae.load(version.uri)
    if what == "pickle":
        with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not a safetensors file"):
            efae.load(f"runs:/{run_id}/model")
    else:
        efae.load(f"runs:/{run_id}/model")  # a run promises nothing about its files
    assert not pickled[1].exists()


def test_a_pickle_and_code_planted_beside_the_model_are_ignored(
    register, client, run_id, tmp_path, pickled
):
    version = register()
    address = artifact_address(client, run_id, "model")
    data, trace = pickled
    storage.write_bytes(f"{address}/python_model.pkl", data)
    storage.write_bytes(
        f"{address}/code/planted.py", f"import os; os.mkdir({str(trace)!r})".encode()
    )
    flavour = {"loader_module": "planted", "code": "code", "python_model": "python_model.pkl"}
    text = Model(flavors={"python_function": flavour}).to_yaml()
    storage.write_bytes(f"{address}/MLmodel", text.encode())
    efae.load(version.uri)
    assert not trace.exists()
    files = {path.name for path in pull.pull(version.uri).iterdir()}
    assert files == {*MODEL_FILES, "manifest.json"}


def read_digest(client: MlflowClient, version: RegisteredVersion) -> str:
    return client.get_model_version(version.name, str(version.version)).tags["digest"]


def test_a_digest_names_a_version_by_its_weights(register, client, name, server):
    first, second = register(seed=0), register(seed=1)
    digest = read_digest(client, first)
    for uri in (f"models:/{name}@sha256:{digest}", f"models:/{name}@sha256:{digest[:12]}"):
        assert pull.pull(uri) == pull.pull(first.uri)
        assert versions.read_version(uri, server) == first
    newest = f"2 \\({read_digest(client, second)}\\), 1 \\({digest}\\)"
    with pytest.raises(
        ValueError, match=f"no version of {name} has the digest {'0' * 64}; .*{newest}"
    ):
        efae.load(f"models:/{name}@sha256:{'0' * 64}")
    with pytest.raises(ValueError, match=f"registered models: .*{name}"):
        efae.load(f"models:/other@sha256:{digest}")
    for digits in (digest[:11], digest + "0", digest.upper()):
        with pytest.raises(ValueError, match="12 to 64 digits"):
            efae.load(f"models:/{name}@sha256:{digits}")


def test_versions_of_one_digest_are_one_model_and_of_two_are_told_apart(
    register, client, name, server, tmp_path
):
    first = register()
    again = runs.find_or_create_run(server, "registry", f"{name}-again", {})[0]
    folder = tmp_path / "model-0"
    second = registration.register_model(read_folder(folder), name, again, {}, {})
    assert (first.version, second.version) == (1, 2)
    digest = read_digest(client, first)
    assert pull.pull(f"models:/{name}@sha256:{digest}") == pull.pull(first.uri)
    client.set_model_version_tag(name, "2", "digest", digest[:20] + "0" * 44)
    with pytest.raises(ValueError, match=f"names several models: write more digits of .*{digest}"):
        pull.pull(f"models:/{name}@sha256:{digest[:12]}")


def test_a_version_that_only_claims_a_digest_is_refused(register, client, name):
    first, second = register(seed=0), register(seed=1)
    wanted = read_digest(client, first)
    client.delete_model_version(name, "1")
    client.set_model_version_tag(name, "2", "digest", wanted)
    actual = sha256((pull.pull(second.uri) / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=f"the weights of version 2 are {actual}"):
        pull.pull(f"models:/{name}@sha256:{wanted}")


def test_offline_nobody_is_asked_and_what_was_pulled_is_used(
    register, client, name, run_id, server, monkeypatch, cache
):
    version = register()
    champion, digest = f"models:/{name}@champion", read_digest(client, version)
    with FaultProxy(server.uri) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        folder = pull.pull(champion)
        of_run = pull.pull(f"runs:/{run_id}/model/")
        proxy.drop("*")
        with pytest.raises(ValueError, match=r"does not answer.*a copy .*: EFAE_OFFLINE=1 uses it"):
            pull.pull(champion)
        with pytest.raises(ValueError, match="does not answer") as error:
            pull.pull(f"models:/{name}/2")
        assert "EFAE_OFFLINE" not in str(error.value)
        proxy.clear()
        monkeypatch.setenv("EFAE_OFFLINE", "1")
        by_digest = [f"models:/{name}@sha256:{digest[:length]}" for length in (12, 64)]
        for uri in (champion, version.uri, *by_digest):
            assert pull.pull(uri) == folder
        assert pull.pull(f"runs:/{run_id}/model") == of_run
        expected = make_model().state_dict()
        loaded = efae.load(champion).state_dict()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
        with pytest.raises(ValueError, match=f"/2 of {proxy.url} was not pulled before") as error:
            pull.pull(f"models:/{name}/2")
        for part in (str(cache), f"{champion} of {proxy.url}", "pull it once without EFAE_OFFLINE"):
            assert part in str(error.value)
        assert proxy.requests("*") == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)  # another server, for all we know
    with pytest.raises(ValueError, match=f"{champion} of {server} was not pulled before"):
        pull.pull(champion)
    monkeypatch.setenv("EFAE_OFFLINE", "0")
    assert pull.pull(champion) == folder


def test_a_checkpoint_on_s3_is_used_offline(local_stack, monkeypatch):
    uri = "s3://efae-runs/registry/offline/step-00000005"
    write_run(uri.rpartition("/")[0], (5,))
    folder = pull.pull(f"{uri}/")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"a copy .*: EFAE_OFFLINE=1 uses it"):
        pull.pull(uri)
    monkeypatch.setenv("EFAE_OFFLINE", "1")
    assert pull.pull(uri) == folder
    with pytest.raises(ValueError, match=r"step-00000006 of .* was not pulled before"):
        pull.pull(uri.replace("5", "6"))
