"""How long MLflow's requests may take and how often they are tried again."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager

QUICK = {  # an outage shows in seconds, not in minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
PATIENT = {  # for whole files
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "120",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@contextmanager
def request_limits(limits: Mapping[str, str]) -> Generator[None]:
    """MLflow's HTTP settings for a while; they exist only as environment of the process.

    Args:
        limits: environment variables by name, such as `PATIENT`.
    """
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
