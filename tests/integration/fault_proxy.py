"""A reverse proxy on a free loopback port that damages a real server's answers.

    with FaultProxy(local_stack["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.fail("*.tar", status=503, times=2)     # the first two answers; without times: all
        proxy.flip("*/shard-000001.tar", offset=700)  # of the object, whatever range is asked for
        ...
        assert proxy.requests("*.tar") == 3
        assert proxy.bytes_sent("*.tar") == size

A pattern (fnmatch) is compared with the path, ``/bucket/key``, without the query. The first fault
that matches a request, and is not used up, applies; all other requests pass unchanged, Host and
signature included. An answer is held in memory, so keep objects small.
"""

import contextlib
import http.client
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_S3_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}
_NOT_PASSED_ON = ("connection", "expect", "keep-alive", "transfer-encoding", "content-length")


@dataclass
class _Fault:
    pattern: str
    kind: str
    value: float
    times: float
    headers: dict[str, str]


class FaultProxy:
    """See the module."""

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream).netloc
        self.closing = threading.Event()
        self.connections: set[socket.socket] = set()
        self._faults: list[_Fault] = []
        self._requests: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self})
        )
        self._server.daemon_threads = False  # so that closing waits for them
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        for connection in list(self.connections):
            _end(connection)
        self._server.server_close()

    def fail(self, pattern: str, status: int, times: float = float("inf"), **headers: str) -> None:
        """Answer with `status` and an S3 error; `headers` such as Retry_After="1" are added."""
        self._add(pattern, "fail", status, times, headers)

    def cut(self, pattern: str, after: int, times: float = float("inf")) -> None:
        """Announce the whole body, send `after` bytes of it and close the connection."""
        self._add(pattern, "cut", after, times)

    def truncate(self, pattern: str, after: int, times: float = float("inf")) -> None:
        """Answer, in good order, with only the first `after` bytes of the body."""
        self._add(pattern, "truncate", after, times)

    def stall(self, pattern: str, after: int = -1, times: float = float("inf")) -> None:
        """Send `after` bytes of the body, and then nothing; -1: not even the status."""
        self._add(pattern, "stall", after, times)

    def slow(self, pattern: str, bytes_per_second: int, times: float = float("inf")) -> None:
        """Send the body in a trickle."""
        self._add(pattern, "slow", bytes_per_second, times)

    def flip(self, pattern: str, offset: int, times: float = float("inf")) -> None:
        """Invert the byte at `offset` of the object, in answers that hold it."""
        self._add(pattern, "flip", offset, times)

    def drop(self, pattern: str, times: float = float("inf")) -> None:
        """Close the connection instead of answering."""
        self._add(pattern, "drop", 0, times)

    def end_faults(self) -> None:
        """Damage nothing from now on; the counts stay."""
        with self._lock:
            self._faults.clear()

    def clear(self) -> None:
        """Forget all faults and counts."""
        with self._lock:
            self._faults.clear()
            self._requests.clear()
            self._bytes.clear()

    def requests(self, pattern: str) -> int:
        """Requests so far, of all methods."""
        return sum(n for path, n in self._requests.items() if fnmatch(path, pattern))

    def bytes_sent(self, pattern: str) -> int:
        """Bytes of bodies sent so far, those of errors left out."""
        return sum(n for path, n in self._bytes.items() if fnmatch(path, pattern))

    def _add(
        self,
        pattern: str,
        kind: str,
        value: int,
        times: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        with self._lock:
            self._faults.append(_Fault(pattern, kind, value, times, headers or {}))

    def count(self, path: str, requests: int = 0, body_bytes: int = 0) -> None:
        with self._lock:
            self._requests[path] += requests
            self._bytes[path] += body_bytes

    def take_fault(self, path: str, first: int, last: int) -> _Fault:
        """The fault for an answer that holds the object's bytes [first, last)."""
        with self._lock:
            for fault in self._faults:
                missed = fault.kind == "flip" and not first <= fault.value < last
                if fault.times > 0 and not missed and fnmatch(path, fault.pattern):
                    fault.times -= 1
                    return fault
        return _Fault(path, "none", 0, 0, {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def setup(self) -> None:
        super().setup()
        self.proxy.connections.add(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # clients give up
            super().handle()

    def finish(self) -> None:
        self.proxy.connections.discard(self.connection)
        with contextlib.suppress(ConnectionError):
            super().finish()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.proxy.count(path, requests=1)
        status, headers, body = self._ask_upstream()
        span = headers["content-range"] if status == 206 else "bytes 0-"
        first = int(span.removeprefix("bytes ").split("-")[0])
        fault = self.proxy.take_fault(path, first, first + len(body))
        value, length = int(fault.value), int(headers.get("content-length", len(body)))
        if fault.kind == "fail":
            text = f"<Error><Code>{_S3_CODES.get(value, value)}</Code></Error>".encode()
            body = b"" if self.command == "HEAD" else text
            status, headers, length = value, fault.headers, len(body)
        elif fault.kind == "flip":
            at = value - first
            body = body[:at] + bytes([body[at] ^ 255]) + body[at + 1 :]
        elif fault.kind == "truncate":
            body, length = body[:value], min(value, length)
        elif fault.kind == "drop" or (fault.kind == "stall" and value < 0):
            if fault.kind == "stall":
                self.proxy.closing.wait()
            return _end(self.connection)
        self.send_response_only(status)
        for name, text in headers.items():
            if name.lower() not in _NOT_PASSED_ON:
                self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault.kind == "slow":
            step = max(1, value // 20)
            for at in range(0, len(body), step):
                self._write(path, body[at : at + step])
                if self.proxy.closing.wait(step / value):
                    break
        else:
            whole = fault.kind not in ("cut", "stall")
            self._write(path, body if whole else body[:value], counted=fault.kind != "fail")
            if fault.kind == "stall":
                self.proxy.closing.wait()
            if not whole:
                _end(self.connection)
        return None

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _ask_upstream(self) -> tuple[int, dict[str, str], bytes]:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(sent)
            response = upstream.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return response.status, headers, response.read()
        finally:
            upstream.close()

    def _write(self, path: str, body: bytes, counted: bool = True) -> None:
        # First: once the client has the body, a test may ask for the count.
        self.proxy.count(path, body_bytes=len(body) * counted)
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the client may have closed it
        connection.shutdown(socket.SHUT_RDWR)
