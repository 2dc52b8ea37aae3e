"""Storage over HTTP: retries, refusals, names."""

import os
from http.server import BaseHTTPRequestHandler
from typing import ClassVar
from urllib.parse import unquote

import pytest

from data_pipelines import storage
from data_pipelines.index_shards import list_tars
from data_pipelines.storage import Location
from data_pipelines.storage.retries import StorageError, describe_missing


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
def flaky_server(serve) -> str:
    _Handler.scripts = {
        "/busy": [503, 503, 200],
        "/cut": ["cut", 200],
        "/missing": [404],
        "/forbidden": [403],
        "/closed": [401],
        "/down": [500],
    }
    _Handler.requests = []
    return serve(_Handler)


class _Tagged(BaseHTTPRequestHandler):
    """Answers every request for headers or bytes, of http or S3, with this tag."""

    tag: ClassVar[str | None]

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if self.tag:
            self.send_header("ETag", self.tag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"data")

    do_HEAD = do_GET

    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_the_version_of_an_object_is_its_servers_tag(serve, scheme, monkeypatch):
    address = serve(_Tagged)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
    found = []
    for _Tagged.tag in ('"one"', '"two"', '"one"', None):
        uri = f"{address}/b/x.tar" if scheme == "http" else "s3://b/x.tar"
        found.append(storage.read_version(uri))
    assert "one" in found[0]
    assert found[0] == found[2] != found[1]
    assert "one" not in found[3]
    assert bool(found[3]) == (scheme == "http")  # that one has the time of modification, too


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


def test_a_missing_web_address_is_not_a_bucket(flaky_server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    uri = f"{flaky_server}/missing"
    assert not storage.exists(uri)
    storage.check_readable(uri)  # a folder need not have a page
    assert describe_missing(Location.parse(uri)) == f"{uri} does not exist: check the address"
    with pytest.raises(FileNotFoundError, match=f"^{uri} does not exist$"):
        storage.read_bytes(uri)


def test_a_web_server_that_refuses_does_not_say_that_nothing_is_there(flaky_server):
    for ask in (storage.exists, storage.check_readable):
        with pytest.raises(StorageError, match="access denied; check FSSPEC_HTTP"):
            ask(f"{flaky_server}/closed")
    # A public bucket answers so for what is not there, and many servers for a folder.
    assert not storage.exists(f"{flaky_server}/forbidden")
    storage.check_readable(f"{flaky_server}/forbidden")
    with pytest.raises(StorageError, match="no answer"):
        storage.check_readable(f"{flaky_server}/down")


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


class _Files(BaseHTTPRequestHandler):
    """Serves `files` by their decoded names."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self):
        path, _, query = self.path.partition("?")
        data = self.files.get(unquote(path)) if not query else None
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, format, *args):
        pass


def test_names_below_a_web_address_are_literal(serve, tmp_path):
    names = [
        *(
            "a?b",
            "a#b",
            "a%20b",
            "a b",
            "a+b",
            "a%2Fb",
            "a&b=c;d",
            "[1]",
            "{1}",
            "e\u0301",
            "\u00e9",
        ),
        *("a\\b", "~x", "a?versionId=3", "100%", "a%", "a:b@c", "a'b\"c", "(1)*!,", "a|b", "a\tb"),
    ]
    base = Location.parse(serve(_Files) + "/set one")
    _Files.files = {f"/set one/{name}": name.encode() for name in names}
    for name in names:
        uri = base / name
        assert storage.exists(uri)
        assert storage.read_bytes(uri) == name.encode()
        assert storage.read_range(uri, 1, len(name.encode())) == name.encode()[1:]
        storage.download(uri, tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == name.encode()
        del _Files.files[f"/set one/{name}"]
        assert not storage.exists(uri)


def test_tars_of_a_web_address_are_named_as_they_are():
    base, sizes, _ = list_tars("https://host/a%20set/x%20{0..1}%23.tar")
    assert (str(base), list(sizes)) == ("https://host/a%20set", ["x 0#.tar", "x 1#.tar"])
    assert str(base / "x 0#.tar") == "https://host/a%20set/x%200%23.tar"
