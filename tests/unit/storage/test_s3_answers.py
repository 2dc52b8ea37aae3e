"""What S3 answers when it refuses, and the sentence that names the cause."""

import email.utils
from http.server import BaseHTTPRequestHandler
from typing import ClassVar

import pytest

from data_pipelines import storage
from data_pipelines.storage.retries import StorageError

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
