import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from data_pipelines import storage, uris
from data_pipelines.retries import StorageError


@pytest.mark.parametrize("uri", ["pipe:cat /etc/passwd", "ftp://host/x", "memory://x", "S3X://b"])
def test_other_schemes_are_refused(uri):
    for operation in (storage.read_bytes, storage.exists, storage.list_files, storage.delete):
        with pytest.raises(
            ValueError, match="is refused; use a file path, file://, s3://"
        ) as error:
            operation(uri)
        assert repr(uri) in str(error.value)


@pytest.mark.parametrize("scheme", ["s3", "https", "ftp", "file"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(scheme):
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as error:
        storage.read_bytes(f"{scheme}://someone:hunter2@host/x")
    assert "hunter2" not in str(error.value)
    assert "someone" not in str(error.value)


def test_local_files_round_trip(tmp_path):
    for root in (str(tmp_path / "plain"), f"file://{tmp_path}/scheme"):
        uri = uris.join(root, "a/b.bin")
        assert not storage.exists(uri)
        storage.write_bytes(uri, b"x")
        storage.write_bytes(uri, b"content")
        assert storage.read_bytes(uri) == b"content"
        storage.write_bytes(uris.join(root, "c"), b"")
        assert storage.list_files(root) == {"a/b.bin": 7, "c": 0}
        storage.upload_folder(tmp_path / root.rsplit("/")[-1], f"{root}-copy")
        storage.download_folder(f"{root}-copy", tmp_path / "back")
        assert (tmp_path / "back/a/b.bin").read_bytes() == b"content"
        storage.check_readable(root)
        storage.check_writable(root)
        assert storage.list_files(root) == {"a/b.bin": 7, "c": 0}
        storage.delete(root)
        storage.delete(root)
        assert storage.list_files(root) == {}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(str(path), "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_download_appears_whole_or_not_at_all(tmp_path):
    source, target = tmp_path / "source", tmp_path / "folder/target"
    source.write_bytes(b"content")
    for wrong in ({"expected_bytes": 8}, {"sha256": "0" * 64}):
        with pytest.raises(StorageError, match="expected"):
            storage.download(str(source), target, deadline_seconds=0.05, **wrong)
        assert list(target.parent.iterdir()) == []
    sha256 = hashlib.sha256(b"content").hexdigest()
    storage.download(str(source), target, expected_bytes=7, sha256=sha256)
    assert target.read_bytes() == b"content"


def test_a_range_of_a_file_is_all_of_it_or_an_error(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    for uri in (str(tmp_path / "file"), f"file://{tmp_path}/file"):
        assert storage.read_range(uri, 0, 100) == bytes(range(100))
        assert storage.read_range(uri, 3, 9) == bytes(range(3, 9))
        assert storage.read_range(uri, 100, 100) == b""
        with pytest.raises(StorageError, match="file: 10 bytes arrived, 11 expected from 90 on"):
            storage.read_range(uri, 90, 101)
        for start, end in ((-1, 5), (5, 4)):
            with pytest.raises(ValueError, match="no range"):
                storage.read_range(uri, start, end)


def test_a_scheme_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for read in (storage.read_bytes, lambda uri: storage.read_range(uri, 0, 9)):
        with pytest.raises(StorageError, match="gs:// needs `pip install gcsfs`"):
            read("gs://bucket/x")


def test_missing_things_are_named(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        storage.read_range(missing, 0, 9)
    with pytest.raises(FileNotFoundError, match="missing"):
        storage.read_bytes(missing)
    with pytest.raises(StorageError, match="missing does not exist"):
        storage.check_readable(missing)
    with pytest.raises(FileNotFoundError, match="missing does not exist or is empty"):
        storage.download_folder(missing, tmp_path / "x")


def test_a_folder_that_cannot_be_made_is_not_writable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/x cannot be written"):
        storage.check_writable(str(tmp_path / "file/x"))


class _Handler(BaseHTTPRequestHandler):
    """Answers each path with its script of statuses, the last one for ever; "cut" ends the body."""

    scripts: ClassVar[dict[str, list]] = {}
    requests: ClassVar[list[str]] = []

    def do_GET(self):
        self.requests.append(self.path)
        script = self.scripts[self.path.split("?")[0]]
        step = script.pop(0) if len(script) > 1 else script[0]
        status = 200 if step == "cut" else step
        self.send_response(status)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"da" if step == "cut" else b"data")

    def log_message(self, format, *args):
        pass


@pytest.fixture
def flaky_server() -> Iterator[str]:
    _Handler.scripts = {
        "/busy": [503, 503, 200],
        "/cut": ["cut", 200],
        "/missing": [404],
        "/forbidden": [403],
        "/down": [500],
    }
    _Handler.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["busy", "cut"])
def test_transient_errors_are_retried(flaky_server, tmp_path, name):
    storage.download(f"{flaky_server}/{name}", tmp_path / "x", expected_bytes=4)
    assert (tmp_path / "x").read_bytes() == b"data"
    assert len(_Handler.requests) > 1


@pytest.mark.parametrize(
    ("name", "error"), [("missing", FileNotFoundError), ("forbidden", StorageError)]
)
def test_permanent_errors_are_not_retried(flaky_server, name, error):
    with pytest.raises(error, match=f"{flaky_server}/{name}"):
        storage.read_bytes(f"{flaky_server}/{name}?signature=secret")
    assert len(_Handler.requests) == 1


def test_retries_end_with_the_deadline_and_hide_the_query(flaky_server, tmp_path):
    uri = f"{flaky_server}/down?signature=secret"
    with pytest.raises(StorageError, match="no answer") as error:
        storage.download(uri, tmp_path / "x", deadline_seconds=0.5)
    assert len(_Handler.requests) > 1
    assert "secret" not in str(error.value)


def test_http_is_read_only():
    with pytest.raises(ValueError, match="cannot be written over http"):
        storage.write_bytes("http://127.0.0.1/x", b"")
    with pytest.raises(ValueError, match="cannot be listed over http"):
        storage.list_files("http://127.0.0.1/x")


def test_a_forked_process_gets_a_client_of_its_own(flaky_server):
    uri = f"{flaky_server}/busy"
    assert storage.read_bytes(uri) == b"data"
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if storage.read_bytes(uri) == b"data" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
