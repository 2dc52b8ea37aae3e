"""What the page needs to be written; the page itself is in integration, in a browser."""

import base64
import hashlib
import sys
import tarfile

import pytest

from efae.config import Config
from efae.config.forms import with_overrides
from efae.experiment.publication import send_report_page
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import pack_model
from efae.preflight.driver_checks import RunData, list_checks
from efae.tracking.server import Server
from efae.web_page import page, runtime


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFAE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_a_damaged_archive_is_refused(cache, tmp_path):
    (cache / runtime.ARCHIVE).write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"onnxruntime-web-.*tgz is damaged: its sha512"):
        runtime.copy_runtime(tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_without_npm_the_message_says_what_to_do(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=f"install npm, or copy .*tgz to {cache}"):
        runtime.copy_runtime(tmp_path / "page")


def test_a_failing_npm_is_one_sentence(cache, tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'no network' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"could not download onnxruntime-web .*: no network$"):
        runtime.copy_runtime(tmp_path / "page")
    assert list(cache.iterdir()) == []


def test_only_a_runtime_for_gpus_has_their_files(cache, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "archive", "w:gz") as archive:
        for name in (*runtime.FILES, *runtime.GPU_FILES):
            archive.addfile(tarfile.TarInfo(f"package/dist/{name}"))
    data = (tmp_path / "archive").read_bytes()
    (cache / runtime.ARCHIVE).write_bytes(data)
    digest = hashlib.sha512(data).digest()
    monkeypatch.setattr(runtime, "SHA512", base64.b64encode(digest).decode())
    runtime.copy_runtime(tmp_path / "small")
    runtime.copy_runtime(tmp_path / "large", with_gpu=True)
    assert {path.name for path in (tmp_path / "small").iterdir()} == {*runtime.FILES}
    found = {path.name for path in (tmp_path / "large").iterdir()}
    assert found == {*runtime.FILES, *runtime.GPU_FILES}


@pytest.mark.parametrize("missing", ["npm", "onnxscript"])
def test_what_the_page_needs_is_missed_before_work_starts(cache, tmp_path, monkeypatch, missing):
    monkeypatch.setenv("PATH", str(tmp_path))
    remedy = "install npm, or copy"
    if missing == "onnxscript":
        monkeypatch.setitem(sys.modules, missing, None)
        remedy = r"needs the package onnxscript: in the checkout of efae, pip install '\.\[onnx\]'"
    config = with_overrides(Config(), {"tracking.page": True})
    checks = dict(list_checks(config, RunData(config.data), Server("")))
    with pytest.raises(ValueError, match=remedy):
        checks["page"]()
    assert "page" not in dict(list_checks(Config(), RunData(config.data), Server("")))


def test_a_page_that_cannot_be_written_costs_no_registered_model(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = with_overrides(Config(), {"data.resolution": 16, "model.depth": 1})
    model = Autoencoder(config)
    stored = pack_model(model.state_dict(), config, model.representation)
    sent = []
    send_report_page(stored, "models:/efae/1", [], sent.append)
    assert "the report card has no page: the page needs onnxruntime-web" in caplog.text

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(page, "write_page", fail)  # as ONNX Runtime, torch or protobuf can
    send_report_page(stored, "models:/efae/1", [], sent.append)
    assert "the report card has no page: AssertionError" in caplog.text
    assert sent == []
    monkeypatch.setattr(page, "write_page", lambda *_: None)
    send_report_page(stored, "models:/efae/1", [], fail)
    assert caplog.text.count("AssertionError") == 2
