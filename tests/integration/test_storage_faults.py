"""Storage under faults of server and network: real SeaweedFS behind a proxy."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import botocore.session
import fsspec
import pytest

from cluster.ports import LOOPBACK, pick_free
from data_pipelines import storage
from data_pipelines.storage import objects
from data_pipelines.storage.retries import StorageError
from tests.conftest import ROOT
from tests.integration.fault_proxy import FaultProxy

pytestmark = pytest.mark.s3
DATA = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(DATA).hexdigest()
NAME = "faults/object.bin"
URI = f"s3://efae-data/{NAME}"
PATH = f"/efae-data/{NAME}"
START, END = 1000, 301_000


@pytest.fixture(scope="module")
def stored(local_stack):
    """The server's address; the object is on it."""
    storage.write_bytes(URI, DATA)
    yield local_stack["AWS_ENDPOINT_URL"]
    storage.delete("s3://efae-data/faults")


@pytest.fixture(scope="module")
def running_proxy(stored):
    with FaultProxy(stored) as proxy:
        yield proxy


@pytest.fixture
def proxy(running_proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", running_proxy.url)
    running_proxy.clear()
    assert storage.exists(URI)  # making a client takes long enough to disturb short deadlines
    running_proxy.clear()
    return running_proxy


def read(deadline_seconds=20.0):
    return storage.read_range(URI, START, END, deadline_seconds)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def expect_error(action, *parts, error=StorageError):
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in message
    for part in parts:
        assert part in message


def test_without_faults_a_range_is_one_request_for_just_those_bytes(proxy):
    assert read() == DATA[START:END]
    assert proxy.requests(PATH) == 1
    assert proxy.bytes_sent(PATH) == END - START
    storage.write_bytes(f"{URI}.copy", DATA[:10])
    assert storage.read_bytes(f"{URI}.copy") == DATA[:10]
    assert storage.read_range(URI, 5, 5) == b""


def test_many_threads_read_ranges_at_once(proxy):
    ranges = [(i * 10_000, i * 10_000 + 20_000) for i in range(48)]
    proxy.fail(PATH, 503, times=5)
    with ThreadPoolExecutor(16) as threads:
        parts = list(threads.map(lambda span: storage.read_range(URI, *span), ranges))
    assert parts == [DATA[start:end] for start, end in ranges]
    assert proxy.requests(PATH) == 48 + 5


TRANSIENT = {
    "SlowDown": lambda proxy: proxy.fail(PATH, 503, times=2),
    "InternalError": lambda proxy: proxy.fail(PATH, 500, times=2),
    "throttled": lambda proxy: proxy.fail(PATH, 429, times=2),
    "bad gateway": lambda proxy: proxy.fail(PATH, 502, times=2),
    "connection closed": lambda proxy: proxy.drop(PATH, times=2),
    "body cut": lambda proxy: proxy.cut(PATH, 100_000, times=2),
    "body cut before its first byte": lambda proxy: proxy.cut(PATH, 0, times=2),
    "body shorter, and so announced": lambda proxy: proxy.truncate(PATH, 100_000, times=2),
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_range_is_recovered(proxy, fault):
    TRANSIENT[fault](proxy)
    assert read() == DATA[START:END]
    assert proxy.requests(PATH) == 3


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_download_is_recovered(proxy, fault, tmp_path):
    TRANSIENT[fault](proxy)
    storage.download(URI, tmp_path / "x", len(DATA), SHA256)
    assert (tmp_path / "x").read_bytes() == DATA
    assert names(tmp_path) == ["x"]
    assert proxy.requests(PATH) == 3


def test_a_flipped_byte_is_found_by_the_checksum_and_fetched_again(proxy, tmp_path):
    proxy.flip(PATH, 77_777, times=2)
    storage.download(URI, tmp_path / "x", len(DATA), SHA256)
    assert (tmp_path / "x").read_bytes() == DATA
    assert proxy.requests(PATH) == 3
    proxy.clear()
    proxy.flip(PATH, 77_777)
    expect_error(lambda: storage.download(URI, tmp_path / "y", sha256=SHA256), URI, "checksum")
    assert proxy.requests(PATH) == 3
    assert names(tmp_path) == ["x"]


def test_a_range_shows_the_flipped_byte_to_its_caller_where_it_lies(proxy):
    proxy.flip(PATH, 77_777)
    data = read()
    assert [i for i, byte in enumerate(data, START) if byte != DATA[i]] == [77_777]
    assert storage.read_range(URI, 0, 77_777) == DATA[:77_777]


@pytest.mark.parametrize("cause", ["truncated", "shorter than its index says"])
def test_an_object_that_stays_short_is_given_up_after_three_attempts(proxy, cause):
    if cause == "truncated":
        proxy.truncate(PATH, 100)
        span, arrived = (START, END), 100
    else:
        span, arrived = (START, len(DATA) + 1), len(DATA) - START
    expected = f"{arrived} bytes arrived, {span[1] - span[0]} expected from 1000 on"
    expect_error(lambda: storage.read_range(URI, *span), URI, expected)
    assert proxy.requests(PATH) == 3


def test_a_range_beyond_the_end_is_an_error_at_once(proxy):
    end = len(DATA)
    expect_error(lambda: storage.read_range(URI, end, end + 9), URI, "ends before the bytes")
    assert proxy.requests(PATH) == 1


@pytest.mark.parametrize(
    ("status", "error", "part"),
    [
        (404, FileNotFoundError, "does not exist at http"),
        (403, StorageError, "access denied at http"),
        (400, StorageError, "refused at http"),
        (501, StorageError, "failed at http"),
    ],
)
def test_permanent_errors_are_asked_once(proxy, tmp_path, status, error, part):
    proxy.fail(PATH, status)
    expect_error(read, URI, part, error=error)
    expect_error(lambda: storage.download(URI, tmp_path / "x"), URI, part, error=error)
    assert proxy.requests(PATH) == 2
    assert names(tmp_path) == []


def test_a_server_that_stays_busy_is_asked_until_the_deadline(proxy):
    proxy.fail(PATH, 503)
    started = time.monotonic()
    expect_error(lambda: read(1.0), URI, "no answer at http", "is AWS_ENDPOINT_URL right")
    assert time.monotonic() - started < 5
    assert 2 <= proxy.requests(PATH) <= 60


def test_the_wait_that_the_server_asks_for_is_kept(proxy):
    proxy.fail(PATH, 503, times=1, Retry_After="1")
    started = time.monotonic()
    assert read() == DATA[START:END]
    assert time.monotonic() - started >= 1
    assert proxy.requests(PATH) == 2
    proxy.fail(PATH, 503, Retry_After="30")
    started = time.monotonic()
    expect_error(lambda: read(20.0), "no answer")
    assert time.monotonic() - started < 10
    assert proxy.requests(PATH) == 3


SILENT = {
    "no answer": lambda proxy, times: proxy.stall(PATH, times=times),
    "silence in the body": lambda proxy, times: proxy.stall(PATH, 100_000, times=times),
    "a trickle": lambda proxy, times: proxy.slow(PATH, 20, times=times),
}


@pytest.mark.parametrize("fault", SILENT)
def test_a_silent_or_slow_server_does_not_hold_a_read(proxy, fault, tmp_path, monkeypatch):
    SILENT[fault](proxy, float("inf"))
    started = time.monotonic()
    expect_error(lambda: read(0.3), URI, "no answer at http", "too slow, or silent")
    assert 0.2 < time.monotonic() - started < 5
    target = tmp_path / "x"
    monkeypatch.setattr(objects, "_SLOWEST_BYTES_PER_SECOND", 2**22)
    expect_error(lambda: storage.download(URI, target, len(DATA), SHA256, 0.2), "no answer")
    assert time.monotonic() - started < 10
    assert names(tmp_path) == []
    proxy.clear()
    monkeypatch.setattr(objects, "ATTEMPT_SECONDS", 0.3)
    SILENT[fault](proxy, 1)
    assert read() == DATA[START:END]
    assert proxy.requests(PATH) == 2


FULL_DISK = f"""
import resource, sys
from data_pipelines import storage
from data_pipelines.storage.retries import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for action in (
    lambda: storage.download({URI!r}, sys.argv[1], {len(DATA)}),
    lambda: storage.download({URI!r}, sys.argv[1]),
    lambda: storage.write_bytes(sys.argv[1], bytes({len(DATA)})),
):
    try:
        action()
    except StorageError as error:
        print(error)
"""


def test_a_file_that_may_not_grow_is_named_and_not_tried_again(proxy, tmp_path):
    child = run_python(FULL_DISK, str(tmp_path / "x"))
    lines = child.stdout.splitlines()
    assert len(lines) == 3, child.stdout + child.stderr
    for line, amount in zip(
        lines, (f"{len(DATA)} bytes", "an object", f"{len(DATA)} bytes"), strict=True
    ):
        assert line.startswith(f"{tmp_path}: no room to write {amount} (File too large)")
    assert names(tmp_path) == []
    assert proxy.requests(PATH) == 2


READ = f"""
from data_pipelines import storage
print(storage.read_range({URI!r}, 1000, 1100, 5.0).hex(), end="")
"""


def run_python(program, *arguments, **variables):
    """A program in a process of its own: fsspec reads its variables once."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
EXPECTED = DATA[1000:1100].hex()


class TestCredentials:
    def test_a_profile_of_the_shared_file(self, stored, tmp_path, monkeypatch):
        lines = [f"{name.lower()} = {os.environ[name]}" for name in KEYS]
        (tmp_path / "credentials").write_text("\n".join(["[team]", *lines]))
        for name in KEYS:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_PROFILE", "team")
        assert read() == DATA[START:END]
        monkeypatch.delenv("AWS_PROFILE")  # another identity, hence another client
        expect_error_without_keys(read)

    def test_no_credentials(self, stored, monkeypatch):
        for name in KEYS:
            monkeypatch.delenv(name)
        expect_error_without_keys(read)

    def test_a_container_role(self, stored, monkeypatch):
        answer = {
            "AccessKeyId": os.environ[KEYS[0]],
            "SecretAccessKey": os.environ[KEYS[1]],
            "Token": "",
            "Expiration": "2100-01-01T00:00:00Z",
        }
        for name in KEYS:
            monkeypatch.delenv(name)
        with FileServer({"/role": json.dumps(answer).encode()}) as server:
            monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{server.url}/role")
            monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "container-token")
            assert read() == DATA[START:END]
            assert server.authorizations == ["container-token"]

    def test_a_session_token_is_sent(self, proxy, monkeypatch):
        assert read() == DATA[START:END]
        monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-that-the-server-did-not-give")
        expect_error(read, "access denied", "check AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SESSION_TOKEN")
        assert read() == DATA[START:END]

    def test_the_endpoint_of_s3_beats_that_of_all_services(self, stored, proxy, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{LOOPBACK}:{pick_free(1)[0]}")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        assert read() == DATA[START:END]
        assert proxy.requests(PATH) == 1

    def test_anonymous_access_to_a_public_object(self, stored, monkeypatch):
        allowed = {
            "Effect": "Allow",
            "Principal": "*",
            "Action": "s3:GetObject",
            "Resource": f"arn:aws:s3:::efae-data/{NAME}",
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        client = botocore.session.get_session().create_client("s3")  # with the keys
        for name in KEYS:
            monkeypatch.delenv(name)
        with monkeypatch.context() as patch:
            patch.setitem(fsspec.config.conf, "s3", {"anon": True})
            with pytest.raises(StorageError, match=r"access denied.*FSSPEC_S3_ANON"):
                read()
        client.put_bucket_policy(Bucket="efae-data", Policy=policy)
        try:
            assert run_python(READ, FSSPEC_S3_ANON="true").stdout == EXPECTED
            with pytest.raises(StorageError, match=r"no credentials.*FSSPEC_S3_ANON=true reads a"):
                read()
        finally:
            client.delete_bucket_policy(Bucket="efae-data")
            client.close()


def expect_error_without_keys(action):
    expect = pytest.raises(StorageError, match=r"no credentials at http.*AWS_PROFILE or the role")
    with expect as caught:
        action()
    assert "\n" not in str(caught.value)


class FileServer:
    """Serves `files`, with or without knowing Range; the requests' paths and ranges are kept."""

    def __init__(self, files, ranges=True):
        self.asked, self.authorizations = [], []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                body, span = files[handler.path.split("?")[0]], handler.headers.get("Range")
                self.asked.append(span)
                self.authorizations.append(handler.headers.get("Authorization"))
                first, last = 0, len(body) - 1
                if ranges and span:
                    first, last = map(int, span.removeprefix("bytes=").split("-"))
                handler.send_response(206 if ranges and span else 200)
                handler.send_header("Content-Length", str(last + 1 - first))
                handler.end_headers()
                handler.wfile.write(body[first : last + 1])

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class TestHttp:
    def test_a_range(self):
        with FileServer({"/x": DATA}) as server:
            assert storage.read_range(f"{server.url}/x", START, END) == DATA[START:END]
            assert server.asked == [f"bytes={START}-{END - 1}"]

    def test_headers_of_fsspecs_settings_are_sent(self, monkeypatch):
        with FileServer({"/x": DATA}) as server:
            storage.read_range(f"{server.url}/x", 0, 5)
            monkeypatch.setitem(
                fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer x"}}
            )
            assert storage.read_range(f"{server.url}/x", START, END) == DATA[START:END]
            assert storage.read_bytes(f"{server.url}/x") == DATA
            assert server.authorizations == [None, "Bearer x", "Bearer x"]

    def test_a_small_object_of_a_server_without_ranges(self):
        with FileServer({"/x": DATA}, ranges=False) as server:
            assert storage.read_range(f"{server.url}/x", START, END) == DATA[START:END]
            beyond = f"{len(DATA) - START} bytes arrived"
            with pytest.raises(StorageError, match=beyond):
                storage.read_range(f"{server.url}/x", START, len(DATA) + 5)

    def test_a_large_object_of_a_server_without_ranges_is_refused(self):
        with FileServer({"/x": bytes(2**24 + 1)}, ranges=False) as server:
            with pytest.raises(StorageError, match="ignores Range") as caught:
                storage.read_range(f"{server.url}/x?signature=secret", START, END)
            assert "secret" not in str(caught.value)
            assert len(server.asked) == 1

    def test_a_silent_server(self, proxy):
        proxy.stall("/silent")
        with pytest.raises(StorageError, match="too slow, or silent"):
            storage.read_range(f"{proxy.url}/silent", 0, 9, 0.4)
