import hashlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_pipelines import storage

pytestmark = pytest.mark.s3
BUCKET = "s3://efae-data"


def test_every_operation_round_trips(s3_endpoint, tmp_path):
    uri = f"{BUCKET}/storage/a.bin"
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    assert storage.exists(uri)
    storage.write_bytes(uri, b"three")
    assert storage.read_bytes(uri) == b"three"
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/b.txt").write_bytes(b"bb")
    (tmp_path / "in/c.txt").write_bytes(b"")
    storage.upload_folder(tmp_path / "in", f"{BUCKET}/storage/folder")
    assert storage.list_files(f"{BUCKET}/storage") == {
        "a.bin": 5,
        "folder/c.txt": 0,
        "folder/deep/b.txt": 2,
    }
    storage.download_folder(f"{BUCKET}/storage/folder", tmp_path / "out")
    assert (tmp_path / "out/deep/b.txt").read_bytes() == b"bb"
    digest = hashlib.sha256(b"three").hexdigest()
    storage.download(uri, tmp_path / "a.bin", expected_bytes=5, sha256=digest)
    assert (tmp_path / "a.bin").read_bytes() == b"three"
    storage.delete(f"{BUCKET}/storage")
    storage.delete(f"{BUCKET}/storage")
    assert storage.list_files(f"{BUCKET}/storage") == {}
    assert not storage.exists(f"{BUCKET}/storage")


def test_a_download_of_other_content_is_refused_and_leaves_no_file(s3_endpoint, tmp_path):
    uri = f"{BUCKET}/damaged.bin"
    storage.write_bytes(uri, b"other")
    with pytest.raises(storage.StorageError, match="sha256 is"):
        storage.download(uri, tmp_path / "x", sha256="0" * 64, deadline_seconds=0.5)
    with pytest.raises(storage.StorageError, match="5 bytes arrived, 6 expected"):
        storage.download(uri, tmp_path / "x", expected_bytes=6, deadline_seconds=0.5)
    assert list(tmp_path.iterdir()) == []


def test_many_threads_share_the_client(s3_endpoint):
    uris = [f"{BUCKET}/threads/{i}" for i in range(32)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda uri: storage.write_bytes(uri, uri.encode()), uris))
        assert list(threads.map(storage.read_bytes, uris)) == [uri.encode() for uri in uris]


class TestPreflight:
    def test_passes_where_it_should(self, s3_endpoint):
        storage.check_writable(f"{BUCKET}/new-folder")
        storage.write_bytes(f"{BUCKET}/preflight/x", b"x")
        storage.check_readable(f"{BUCKET}/preflight")
        assert storage.list_files(f"{BUCKET}/new-folder") == {}

    @pytest.mark.parametrize("check", [storage.check_readable, storage.check_writable])
    def test_missing_bucket(self, s3_endpoint, check):
        self.expect(check, "s3://no-such-bucket/x", s3_endpoint, "create bucket 'no-such-bucket'")

    @pytest.mark.parametrize("check", [storage.check_readable, storage.check_writable])
    def test_wrong_secret(self, s3_endpoint, check, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        self.expect(check, f"{BUCKET}/x", s3_endpoint, "check AWS_ACCESS_KEY_ID")

    @pytest.mark.parametrize("check", [storage.check_readable, storage.check_writable])
    def test_nobody_listens(self, s3_endpoint, check, monkeypatch):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        self.expect(check, f"{BUCKET}/x", endpoint, "is AWS_ENDPOINT_URL right")

    @pytest.mark.parametrize("check", [storage.check_readable, storage.check_writable])
    def test_listens_but_never_answers(self, s3_endpoint, check, monkeypatch):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            self.expect(check, f"{BUCKET}/x", endpoint, "is AWS_ENDPOINT_URL right")

    @staticmethod
    def expect(check, uri, endpoint, remedy):
        started = time.monotonic()
        with pytest.raises(storage.StorageError) as caught:
            check(uri)
        assert time.monotonic() - started < 8
        message = str(caught.value)
        assert "\n" not in message
        for part in (uri, endpoint, remedy):
            assert part in message
        assert "wrong-secret" not in message
