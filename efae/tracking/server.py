"""The MLflow server that a run logs to and models are registered on.

Importing this module does not import MLflow, which takes two seconds: every Ray worker receives a
server, but among those that train only rank 0 talks to it.
"""

# pyright: reportUnknownVariableType=false
import http.client
import json
import os
import re
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from efae.tracking.redaction import first_cause, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CHECK_SECONDS = 5
_ADDRESS = "MLFLOW_TRACKING_URI"
_SEARCH = "/api/2.0/mlflow/experiments/search"


@dataclass(frozen=True)
class Server:
    """An MLflow server, which need not be reachable; `str` gives its address without a password.

    Requests of `client` follow MLflow's own settings, MLFLOW_HTTP_REQUEST_TIMEOUT and
    MLFLOW_HTTP_REQUEST_MAX_RETRIES: by default a request to an unreachable
    server fails after minutes. Call `check` first, or see `efae.tracking.timeouts`.

    Attributes:
        uri: Address, as in MLFLOW_TRACKING_URI; "" if none is set.
    """

    uri: str = field(repr=False)

    @classmethod
    def from_environment(cls) -> "Server":
        """Return the server that MLFLOW_TRACKING_URI names."""
        return cls(os.environ.get(_ADDRESS, ""))

    def __str__(self) -> str:
        return redact(self.uri)

    def client(self) -> "MlflowClient":
        """Return an MLflow client of this server.

        All calls use it, with explicit run ids: MLflow's fluent API keeps a "current run" per
        process and thread, and a restarted worker would open a second one.
        """
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    @contextmanager
    def translating(self) -> Generator[None]:
        """Translate MLflow's exceptions within the block.

        Raises:
            ValueError: The object does not exist in MLflow, MLflow rejects a value, or boto3 is
                missing where MLflow keeps its artifacts in S3 and lets clients write them there.
            ConnectionError: MLflow, or S3 in that case, fails.
        """
        try:
            yield
        except Exception as error:
            from mlflow.exceptions import MlflowException

            if isinstance(error, ModuleNotFoundError) and error.name == "boto3":
                raise ValueError(
                    f"MLflow at {self} keeps artifacts in S3, where clients write them with boto3:"
                    " install the extra aws here, or let the server write (--serve-artifacts)"
                ) from error
            if type(error).__module__.partition(".")[0] in ("boto3", "botocore"):
                raise ConnectionError(
                    f"S3, where MLflow at {self} keeps artifacts: {first_cause(error)}"
                ) from error
            if not isinstance(error, MlflowException):
                raise
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise ValueError(first_cause(error)) from error
            raise ConnectionError(f"MLflow at {self}: {first_cause(error)}") from error

    def check(self) -> None:
        """Send the server one small request, to see whether it answers.

        Raises:
            ValueError: The address is not http(s), or the server does not answer properly within
                seconds.
        """
        if urlsplit(self.uri).scheme not in ("http", "https"):
            raise ValueError(
                f"MLflow at {str(self)!r}: workers on other nodes cannot reach it; start a"
                " server (make up) and set MLFLOW_TRACKING_URI=http://HOST:PORT"
            )
        token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError(  # before the client raises: its message repeats the token
                "MLFLOW_TRACKING_TOKEN holds a line break, a space or a character outside ASCII:"
                " set it again, to the token alone"
            )
        settings = {name for name in os.environ if name.startswith("MLFLOW_TRACKING_")} - {_ADDRESS}
        # Importing MLflow takes a node longer than all other checks; it must be installed, though.
        if not settings and find_spec("mlflow") and self._answers_anyone():
            return
        from mlflow.exceptions import MlflowException

        try:
            self._ask()
        except (MlflowException, OSError) as error:
            if status := _find_refusal(error):
                raise ValueError(
                    f"MLflow at {self} refuses these credentials ({status}): set"
                    " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or"
                    " MLFLOW_TRACKING_TOKEN, to what the server accepts"
                ) from error
            raise ValueError(
                f"MLflow at {self} does not answer ({first_cause(error)}); start the"
                " local stack (make up) or set MLFLOW_TRACKING_URI to a running server"
            ) from error

    def _answers_anyone(self) -> bool:
        """Return whether the server answers a plain request, without credentials."""
        request = urllib.request.Request(
            f"{self.uri.rstrip('/')}{_SEARCH}",
            json.dumps({"max_results": 1}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_CHECK_SECONDS) as answer:
                return isinstance(json.load(answer), dict)
        except (OSError, http.client.HTTPException, ValueError):
            return False  # MLflow's own request succeeds with its settings, or says why

    def _ask(self) -> None:
        """Search for an experiment, once; `MlflowClient` takes no time limit of its own."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request_safe

        http_request_safe(
            get_default_host_creds(self.uri),
            _SEARCH,
            "POST",
            json={"max_results": 1},
            timeout=_CHECK_SECONDS,
            max_retries=0,
        )


def _find_refusal(error: Exception) -> int | None:
    """Return 401 or 403 if the server, or a proxy in front of it, answered so."""
    from mlflow.exceptions import MlflowException

    status = error.get_http_status_code() if isinstance(error, MlflowException) else None
    if status in (401, 403):
        return status
    found = re.search(r"error code (401|403)\b", str(error))
    return int(found[1]) if found else None
