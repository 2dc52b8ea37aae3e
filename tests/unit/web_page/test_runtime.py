"""The page's runtime; the page itself is in integration, in a browser."""

import pytest

from efae.web_page import runtime


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
