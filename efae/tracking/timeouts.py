"""Timeouts of MLflow's requests in a process that trains."""

import os

_QUICK = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def notice_outages_soon() -> None:
    """Make MLflow's requests fail within seconds, unless the environment sets other limits.

    Call it in the entry point of a process, before it logs: these settings exist only as
    environment variables. During an outage a `Tracker` then writes points to its local file after
    seconds instead of minutes.
    """
    for name, value in _QUICK.items():
        os.environ.setdefault(name, value)
