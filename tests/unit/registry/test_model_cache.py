"""What is done with model files that are not what they claim to be, and what is used offline."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier

import pytest
import torch

import efae
from efae.config import Config
from efae.config import forms as configuration
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import pack_model
from efae.model.representation import build_representation
from efae.model.stored_files import MANIFEST, MODEL_FILES, WEIGHTS, CheckpointError, sha256
from efae.registry import pull
from efae.registry.cache import fetch_model, read_copy
from efae.registry.offline_names import mention_copy, recall, remember
from tests.opened_files import watch_opens
from tests.planted import make_pickle

SERVER = "http://127.0.0.1:5000"
TINY = configuration.with_overrides(
    Config(),
    {
        "data.resolution": 16,
        "model.hidden_size": 32,
        "model.encoder_hidden_size": 32,
        "model.depth": 1,
    },
)


@pytest.fixture
def payload(tmp_path) -> tuple[bytes, Path]:
    """A pickle, and the folder that is there once somebody unpickled it."""
    return make_pickle(tmp_path / "unpickled"), tmp_path / "unpickled"


def write_model(folder: Path, seed: int = 0, config: Config = TINY) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": torch.randn(5, generator=generator)}
    pack_model(weights, config, build_representation(config)).write(folder)
    return folder


def write_loadable(folder: Path) -> Path:
    Autoencoder(TINY).save_pretrained(folder)
    return folder


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file, and the manifest with it, as a careful forger does."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def fetch(source: Path, cache: Path, manifest_digest: str | None = None) -> Path:
    folder, _ = fetch_model(
        "models:/m/1", lambda name: (source / name).read_bytes(), cache, manifest_digest
    )
    assert folder is not None
    return folder


def other_config() -> bytes:
    """Valid, and of a wider model."""
    changed = configuration.with_overrides(TINY, {"model.hidden_size": 64})
    return pack_model({}, changed, build_representation(changed)).files["config.json"]


def exchange_files(ours: Path, theirs: Path) -> None:
    shutil.copytree(theirs, ours, dirs_exist_ok=True)


def flip_last_bit(ours: Path, theirs: Path) -> None:
    data = (ours / WEIGHTS).read_bytes()
    (ours / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("harm", "reason"), [(exchange_files, "was exchanged"), (flip_last_bit, "is damaged")]
)
def test_a_copy_that_changed_is_fetched_again_and_offline_refused(tmp_path, harm, reason):
    cache, source = tmp_path / "cache", write_model(tmp_path / "source")
    folder = fetch(source, cache)
    remember(cache, SERVER, ["models:/m/1"], folder.name)
    harm(folder, write_model(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match=f"models:/m/1: the copy in .* {reason}"):
        read_copy("models:/m/1", recall(cache, SERVER, "models:/m/1"))
    assert fetch(source, cache, manifest_digest=folder.name) == folder
    for name in (*MODEL_FILES, MANIFEST):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert read_copy("models:/m/1", recall(cache, SERVER, "models:/m/1")).files


def test_other_users_can_read_what_one_has_downloaded(tmp_path):
    before = os.umask(0o022)
    try:
        folder = fetch(write_model(tmp_path / "source"), tmp_path / "cache")
    finally:
        os.umask(before)
    assert [oct(p.stat().st_mode & 0o777) for p in (folder.parent, folder)] == ["0o755"] * 2
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())
    assert list(folder.parent.iterdir()) == [folder]  # nothing of the download is left


def test_several_that_find_a_damaged_copy_replace_it_with_one_good_copy(tmp_path):
    """Threads, since they start at once; what processes share is the same files."""
    cache, source = tmp_path / "cache", write_model(tmp_path / "source")
    folder, together = fetch(source, cache), Barrier(4)

    def pull_together(_: int) -> Path:
        together.wait()
        return fetch(source, cache, folder.name)

    for _ in range(5):
        flip_last_bit(folder, source)
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(pull_together, range(4))) == [folder] * 4
        assert read_copy("models:/m/1", folder).files
        assert list(cache.iterdir()) == [folder]


def test_a_model_is_loaded_where_the_cache_cannot_be_written(tmp_path, monkeypatch, caplog):
    """A file in the way stands for a read-only disk, which the superuser could write."""
    source = write_loadable(tmp_path / "source")
    monkeypatch.setenv("EFAE_CACHE_DIR", str(source / WEIGHTS))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever)
        uri = f"http://127.0.0.1:{server.server_port}/source"
        try:
            assert efae.load(uri).config == TINY
            assert "is not kept" in caplog.text
            assert "set EFAE_CACHE_DIR to a folder that can be written" in caplog.text
            assert efae.load(pull.pull(uri, tmp_path / "mine")).config == TINY
            with pytest.raises(ValueError, match=f"{uri} has no folder.*set EFAE_CACHE_DIR"):
                pull.pull(uri)
        finally:
            server.shutdown()


def test_a_manifest_digest_never_becomes_a_path_out_of_the_cache(tmp_path):
    keep = tmp_path / "mine"
    keep.mkdir()
    with pytest.raises(CheckpointError, match="manifest_digest is no sha256"):
        fetch(write_model(tmp_path / "source"), tmp_path / "cache", manifest_digest="../mine")
    assert keep.exists()


def test_a_pickle_in_place_of_the_weights_is_refused_and_not_kept(tmp_path, payload):
    data, trace = payload
    source = write_model(tmp_path / "source")
    rewrite(source, WEIGHTS, data)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not a safetensors file"):
        fetch(source, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is not a safetensors file"):
        efae.load(str(source))
    assert not trace.exists()


def test_a_pickle_beside_the_weights_is_never_opened(tmp_path, payload):
    data, trace = payload
    source = write_loadable(tmp_path / "source")
    (source / "python_model.pkl").write_bytes(data)
    with watch_opens() as opened:
        fetch(source, tmp_path / "cache")
        with pytest.raises(CheckpointError, match=r"python_model\.pkl.*may be a pickle"):
            efae.load(str(source))
    assert str(source / WEIGHTS) in opened
    assert [name for name in opened if name.endswith(".pkl")] == []
    assert not trace.exists()


def test_another_valid_config_is_refused(tmp_path):
    source = write_loadable(tmp_path / "source")
    efae.load(str(source))
    (source / "config.json").write_bytes(other_config())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        efae.load(str(source))
    rewrite(source, "config.json", other_config())
    with pytest.raises(CheckpointError, match="its weights are not its configuration's"):
        efae.load(str(source))


def test_a_name_is_recalled_for_its_own_server_only(tmp_path):
    folder = fetch(write_model(tmp_path / "source"), tmp_path)
    remember(tmp_path, f"{SERVER}/", ["models:/m@champion"], folder.name)
    assert recall(tmp_path, SERVER, "models:/m@champion") == folder
    assert "EFAE_OFFLINE=1" in mention_copy(tmp_path, SERVER, "models:/m@champion")
    other = "http://127.0.0.1:5001"
    assert mention_copy(tmp_path, other, "models:/m@champion") == ""
    for server, uri in ((other, "models:/m@champion"), (SERVER, "models:/m@best")):
        with pytest.raises(ValueError, match=f"{uri} of {server} was not pulled") as error:
            recall(tmp_path, server, uri)
        for part in (str(tmp_path), f"holds models:/m@champion of {SERVER}:", "EFAE_CACHE_DIR"):
            assert part in str(error.value)


def test_a_name_follows_what_the_server_said_last(tmp_path):
    first, second = (fetch(write_model(tmp_path / f"{n}", n), tmp_path / "cache") for n in (0, 1))
    for folder in (first, second, first):
        remember(tmp_path / "cache", SERVER, ["models:/m@champion"], folder.name)
        assert recall(tmp_path / "cache", SERVER, "models:/m@champion") == folder


def test_first_digits_of_a_digest_suffice_where_they_mean_one_model(tmp_path):
    first, second = (fetch(write_model(tmp_path / f"{n}", n), tmp_path / "cache") for n in (0, 1))
    known = f"models:/m@sha256:{'a' * 12}"
    remember(tmp_path / "cache", SERVER, [known + "b" * 52], first.name)
    remember(tmp_path / "cache", SERVER, [known + "c" * 52], second.name)
    assert recall(tmp_path / "cache", SERVER, known + "b") == first
    with pytest.raises(ValueError, match="names 2 models"):
        recall(tmp_path / "cache", SERVER, known)
    remember(tmp_path / "cache", SERVER, ["models:/m/31"], first.name)
    with pytest.raises(ValueError, match="was not pulled"):  # digits of a version mean another one
        recall(tmp_path / "cache", SERVER, "models:/m/3")


def test_passwords_are_not_written(tmp_path):
    folder = fetch(write_model(tmp_path / "source"), tmp_path)
    remember(tmp_path, "http://user:hunter2@host:5000", ["models:/m/1"], folder.name)
    assert all("hunter2" not in path.read_text() for path in (tmp_path / "refs").iterdir())
    assert recall(tmp_path, "http://user:hunter2@host:5000", "models:/m/1") == folder


def test_answers_that_are_damaged_or_whose_model_is_gone_are_as_if_never_given(tmp_path, caplog):
    folder = fetch(write_model(tmp_path / "source"), tmp_path)
    remember(tmp_path, SERVER, ["models:/m/1"], folder.name)
    remember(tmp_path, SERVER, ["models:/m/2"], "../source")
    (tmp_path / "refs" / f"{'0' * 64}.json").write_text("{")
    with pytest.raises(ValueError, match=f"holds models:/m/1 of {SERVER}: pull"):
        recall(tmp_path, SERVER, "models:/m/2")
    assert "efae did not write it" in caplog.text
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="holds nothing"):
        recall(tmp_path, SERVER, "models:/m/1")


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    """Threads, since they start at once; what processes share is the same files."""
    cache = tmp_path / "cache"
    folders = [fetch(write_model(tmp_path / f"{n}", n), cache) for n in (0, 1)]

    def pull_often(writer: int) -> None:
        for number in range(10):
            uri = f"models:/m/{writer}{number}"
            remember(cache, SERVER, ["models:/m@shared"], folders[number % 2].name)
            remember(cache, SERVER, [uri], folders[writer % 2].name)
            assert recall(cache, SERVER, uri) == folders[writer % 2]
            assert recall(cache, SERVER, "models:/m@shared") in folders  # never half-written

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(pull_often, range(1, 5)))
    for writer in range(1, 5):
        for number in range(10):
            assert recall(cache, SERVER, f"models:/m/{writer}{number}") == folders[writer % 2]
    assert len(list((cache / "refs").iterdir())) == 41
