import contextlib
import email.utils
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote

import pytest

from data_pipelines import storage
from data_pipelines.index_shards import list_tars
from data_pipelines.storage import Location
from data_pipelines.storage.retries import StorageError, describe_missing


@pytest.mark.parametrize("uri", ["pipe:cat /etc/passwd", "ftp://host/x", "memory://x", "S3X://b"])
def test_other_schemes_are_refused(uri):
    for operation in (storage.read_bytes, storage.exists, storage.list_files, storage.delete):
        with pytest.raises(
            ValueError, match="is refused; use a file path, file://, s3://"
        ) as error:
            operation(uri)
        assert repr(uri) in str(error.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("S3://bucket/x", r"'S3://bucket/x': write s3: in lower case"),
        ("HTTPS://host/x", r"write https: in lower case"),
        ("s3:/bucket/x", r"'s3:/bucket/x': write s3:// with two slashes"),
        ("s3:bucket/x", r"write s3:// with two slashes"),
        ("photos:2024/x", r"a file of this name is './photos:2024/x'"),
        ("s3://bucket/a/../x", r"take \. and \.\. out of it"),
        ("s3://bucket/" + "n" * 1025, r"the name has 1025 bytes, s3:// takes 1024"),
        ("s3://bucket/caf\udce9", r"not UTF-8: rename it"),
        ("a\0b", r"zero byte"),
    ],
)
def test_what_no_storage_takes_is_refused_with_a_remedy(uri, message):
    for operation in (storage.read_bytes, storage.exists, storage.list_files, storage.delete):
        with pytest.raises(ValueError, match=message):
            operation(uri)


def test_a_whole_bucket_is_not_deleted():
    for uri in ("s3://bucket", "gs://bucket/"):
        with pytest.raises(ValueError, match="is a whole bucket: name a folder in it"):
            storage.delete(uri)


def test_a_long_name_has_room_for_its_temporary_neighbour(tmp_path):
    for name in ("x" * 255, "\u00e9" * 127):
        storage.write_bytes(str(tmp_path / name), b"x")
        assert storage.list_files(str(tmp_path)) == {name: 1}
        storage.delete(str(tmp_path / name))


@pytest.mark.parametrize("scheme", ["s3", "https", "ftp", "file"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(scheme):
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as error:
        storage.read_bytes(f"{scheme}://someone:hunter2@host/x")
    assert "hunter2" not in str(error.value)
    assert "someone" not in str(error.value)


def test_local_files_round_trip(tmp_path):
    for root in (str(tmp_path / "plain"), f"file://{tmp_path}/scheme"):
        uri = Location.parse(root) / "a/b.bin"
        assert not storage.exists(uri)
        storage.write_bytes(uri, b"x")
        storage.write_bytes(uri, b"content")
        assert storage.read_bytes(uri) == b"content"
        storage.write_bytes(Location.parse(root) / "c", b"")
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
        "/closed": [401],
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
def test_the_version_of_an_object_is_its_servers_tag(scheme, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Tagged)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
    found = []
    try:
        for _Tagged.tag in ('"one"', '"two"', '"one"', None):
            uri = f"{address}/b/x.tar" if scheme == "http" else "s3://b/x.tar"
            found.append(storage.read_version(uri))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
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


@pytest.fixture
def serve() -> Iterator[Callable[[type[BaseHTTPRequestHandler]], str]]:
    """Starts a server; returns its address."""
    with contextlib.ExitStack() as stack:

        def start(handler: type[BaseHTTPRequestHandler]) -> str:
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield start


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


ANSWERS = {
    # bucket: (status, headers, code in the body), the message's parts
    "expired": ((400, {}, "ExpiredToken"), ["session token has expired", "AWS_SESSION_TOKEN"]),
    "skewed": ((403, {}, "RequestTimeTooSkewed"), ["clock is more than 15 minutes off"]),
    "unknown": ((403, {}, "InvalidAccessKeyId"), ["does not know the access key"]),
    "secret": ((403, {}, "SignatureDoesNotMatch"), ["the secret is not the one of"]),
    "moved": (
        (301, {"x-amz-bucket-region": "eu-west-7"}, "PermanentRedirect"),
        ["in region eu-west-7: set AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"],
    ),
    "late": ((403, {"Date": "Mon, 01 Jan 2001 00:00:00 GMT"}, ""), ["clock is more than 15 min"]),
}

BY_STATUS = ("expired", "moved", "late")  # known from the answer to a HEAD, too


class _Amazon(BaseHTTPRequestHandler):
    """Answers as Amazon does: no body to a HEAD, else a code in XML."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        (status, headers, code), _ = ANSWERS[self.path.split("/")[1]]
        body = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
        self.send_response_only(status)
        for name, value in {"Date": email.utils.formatdate(usegmt=True), **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format, *args):
        pass


@pytest.fixture
def amazon(serve, monkeypatch) -> None:
    """S3 is `_Amazon`."""
    _Amazon.asked = []
    monkeypatch.setenv("AWS_ENDPOINT_URL", serve(_Amazon))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "value-of-the-variable")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def read_first_byte(uri):
    storage.read_range(uri, 0, 1)


@pytest.mark.parametrize("bucket", ANSWERS)
def test_an_answer_of_s3_names_its_cause(amazon, bucket):
    (_, _, code), parts = ANSWERS[bucket]
    by_head = [storage.exists, storage.check_readable] if bucket in BY_STATUS else []
    for ask in [*([read_first_byte] if code else []), *by_head]:
        with pytest.raises(StorageError) as error:
            ask(f"s3://{bucket}/x")
        message = str(error.value)
        assert f"s3://{bucket}/x" in message
        assert "value-of" not in message
        assert not [part for part in parts if part not in message], message


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize(
    ("value", "fault"),
    [("key\n", "a line break"), (" key", "a space"), ("k\u00e9y", "a character outside ASCII")],
)
def test_a_key_that_no_request_can_carry_is_named_at_once(amazon, monkeypatch, name, value, fault):
    monkeypatch.setenv(name, value)
    for ask in (storage.read_bytes, storage.check_writable, storage.exists):
        with pytest.raises(StorageError, match=f"^{name} holds {fault}") as error:
            ask("s3://late/x")
        assert value.strip() not in str(error.value).replace(name, "").replace("key alone", "")
    assert _Amazon.asked == []


class _Undeletable(BaseHTTPRequestHandler):
    """A bucket of two objects, one of which it does not delete: with `codes`, in order."""

    codes: ClassVar[list[str]] = []
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        names = "".join(
            f"<Contents><Key>run%5B1%5D/{name}</Key><Size>1</Size></Contents>" for name in "ab"
        )
        kind = "<EncodingType>url</EncodingType>"
        self._answer(f"<ListBucketResult>{kind}{names}</ListBucketResult>")

    def do_POST(self):
        self.asked.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        code = self.codes.pop(0)
        error = f"<Error><Key>run[1]/b</Key><Code>{code}</Code><Message>no</Message></Error>"
        self._answer(f"<DeleteResult>{error if code else ''}</DeleteResult>")

    def _answer(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format, *args):
        pass


def test_what_a_server_did_not_delete_is_an_error(serve, amazon, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", serve(_Undeletable))
    _Undeletable.codes = ["AccessDenied"]
    with pytest.raises(
        StorageError, match=r"s3://bucket/run\[1\]/b could not .* \(AccessDenied: no\)"
    ):
        storage.delete("s3://bucket/run[1]")
    _Undeletable.codes = ["InternalError", "SlowDown", ""]
    storage.delete("s3://bucket/run[1]")
    assert _Undeletable.codes == []
    keys = "".join(f"<Object><Key>run[1]{end}</Key></Object>" for end in ("/a", "/b", ""))
    assert [keys in body for body in _Undeletable.asked] == [True] * 4
