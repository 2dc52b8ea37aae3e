"""The three servers of the local stack: the command that starts each and its readiness check.

All listen on the stack's one address, which is loopback by default, and send no telemetry. A
service is ready when it answers a real request correctly, with credentials if it requires them.
"""

import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cluster.ports import LOOPBACK
from cluster.state import StackState

BUCKETS = ("efae-data", "efae-runs", "mlflow")
_REQUEST_SECONDS = 5.0
_OBJECT_STORE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Service:
    """One server process of the stack."""

    name: str
    title: str
    variable: str
    """Environment variable that sets the public port."""
    default_port: int
    hidden_ports: tuple[str, ...]
    """Other ports that it opens, chosen among the free ones; ``service.port`` in the state."""
    start_seconds: float
    """Longest time until it is ready."""
    command: Callable[[StackState], list[str]]
    environment: Callable[[StackState], dict[str, str]]
    check: Callable[[StackState], None]
    """Readiness check; raises OSError or RuntimeError with the reason until it passes."""


def client_environment(state: StackState) -> dict[str, str]:
    """Return the environment of a client of the stack: the contents of ``.local/env``."""
    return {
        **_s3_environment(state),
        "MLFLOW_TRACKING_URI": address(state, "mlflow"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # ray.init() needs the GCS address, and `ray job submit` finds the dashboard through it.
        # The dashboard's address works for jobs only, so it has a separate variable.
        "RAY_ADDRESS": f"{state.host}:{state.ports['ray.gcs']}",
        "RAY_API_SERVER_ADDRESS": address(state, "ray"),
        **_ray_environment(state),
    }


def address(state: StackState, name: str) -> str:
    """Return the URL of a service."""
    return f"http://{state.host}:{state.ports[name]}"


def _s3_environment(state: StackState) -> dict[str, str]:
    others = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    direct = ",".join(dict.fromkeys([state.host, "localhost", *filter(None, others.split(","))]))
    return {
        "AWS_ACCESS_KEY_ID": state.access_key,
        "AWS_SECRET_ACCESS_KEY": state.secret_key,
        "AWS_ENDPOINT_URL": address(state, "s3"),
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": direct,
        "no_proxy": direct,
    }


def _ray_environment(state: StackState) -> dict[str, str]:
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state.token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # The default, 3 s, is too short for a stopped sweep to close its runs in MLflow.
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }
    if state.host == LOOPBACK:
        # Despite its name, it applies to Linux too: with 0, Ray servers and clients keep
        # 127.0.0.1 instead of replacing it with the host's external address.
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return environment


def _server_environment(extra: dict[str, str]) -> dict[str, str]:
    """Return the caller's environment without its cloud, Ray and MLflow settings."""
    foreign = ("AWS_", "RAY_", "MLFLOW_", "EFAE_", "S3_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
    return {**inherited, "PATH": programs, **extra}


def _program(name: str) -> str:
    """Return the absolute path of a program of this Python environment."""
    program = shutil.which(name, path=str(Path(sys.executable).parent))
    if program is None:
        raise ValueError(f"{name} is not installed beside {sys.executable}: use `make up`")
    return program


def _get(
    url: str, token: str | None = None, body: Mapping[str, Any] | None = None
) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    # No proxies: a proxy cannot reach this machine's loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_REQUEST_SECONDS) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _s3_command(state: StackState) -> list[str]:
    hidden = [
        f"-{name.removeprefix('s3.')}={port}"
        for name, port in state.ports.items()
        if name.startswith("s3.")
    ]
    return [
        _program("weed"),
        "mini",
        "-dir=../s3",  # relative to logs/, the working folder: an absolute path may hold commas
        f"-ip={state.host}",
        f"-ip.bind={state.host}",
        f"-s3.port={state.ports['s3']}",
        *hidden,
        f"-filer.localSocket={state.socket_folder / 'filer.sock'}",
        f"-s3.localSocket={state.socket_folder / 's3.sock'}",
        f"-bucket={','.join(BUCKETS)}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # The filer and the master would serve and accept objects without credentials.
        "-disableHttp",
        "-admin.ui=false",
        "-webdav=false",
        "-master.telemetry=false",
    ]


def _check_s3(state: StackState) -> None:
    # Imported here: it takes longer than the rest of `up` on a running stack.
    from botocore import config, exceptions, session  # pyright: ignore[reportMissingTypeStubs]

    client = session.Session().create_client(
        "s3",
        endpoint_url=address(state, "s3"),
        region_name="us-east-1",
        aws_access_key_id=state.access_key,
        aws_secret_access_key=state.secret_key,
        config=config.Config(
            connect_timeout=_REQUEST_SECONDS,
            read_timeout=_REQUEST_SECONDS,
            retries={"total_max_attempts": 1},
            proxies={},
        ),
    )
    try:
        answer = cast(dict[str, Any], client.list_buckets())
    except (exceptions.BotoCoreError, exceptions.ClientError) as error:
        raise RuntimeError(f"listing the buckets failed: {error}") from error
    found = {bucket["Name"] for bucket in answer["Buckets"]}
    if not found.issuperset(BUCKETS):
        raise RuntimeError(f"found buckets {sorted(found)} instead of {BUCKETS}")


def _mlflow_command(state: StackState) -> list[str]:
    return [
        _program("mlflow"),
        "server",
        f"--host={state.host}",
        f"--port={state.ports['mlflow']}",
        "--workers=1",
        "--backend-store-uri=sqlite:///../mlflow/mlflow.db",  # absolute paths may hold ? and #
        "--artifacts-destination=s3://mlflow/artifacts",
    ]


def _mlflow_environment(state: StackState) -> dict[str, str]:
    return _server_environment(
        {
            **_s3_environment(state),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            # Tracking does not need MLflow's background jobs, which take 240 MB.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
    )


def _check_mlflow(state: StackState) -> None:
    status, _ = _get(f"{address(state, 'mlflow')}/health")
    if status == 200:
        url = f"{address(state, 'mlflow')}/api/2.0/mlflow/experiments/search"
        status, _ = _get(url, body={"max_results": 1})
    if status != 200:
        raise RuntimeError(f"answered {status}")


def _head_cpus() -> int:
    """Return the CPUs of the head: EFAE_RAY_HEAD_CPUS, or all CPUs of the host, at least two.

    With 0, the head runs no workers, as on a large cluster; other nodes join with `ray start`.
    """
    text = os.environ.get("EFAE_RAY_HEAD_CPUS", "")
    if not text:
        return max(2, os.cpu_count() or 2)
    if not text.isdecimal():
        raise ValueError(f"EFAE_RAY_HEAD_CPUS={text!r}: use a number of CPUs, 0 or more")
    return int(text)


def _ray_command(state: StackState) -> list[str]:
    ports = state.ports
    return [
        _program("ray"),
        "start",
        "--head",
        "--block",
        f"--node-ip-address={state.host}",
        f"--port={ports['ray.gcs']}",
        f"--dashboard-host={state.host}",
        f"--dashboard-port={ports['ray']}",
        "--include-dashboard=true",
        f"--dashboard-agent-listen-port={ports['ray.agent']}",
        f"--ray-client-server-port={ports['ray.client']}",
        # The kernel chooses the workers' ports: Ray's default range is the same in every stack.
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--num-cpus={_head_cpus()}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={state.socket_folder / 'ray'}",
        "--disable-usage-stats",
        "--log-color=false",
    ]


def _ray_head_environment(state: StackState) -> dict[str, str]:
    """Return the environment that jobs and workers inherit: the clients', without RAY_ADDRESS.

    The dashboard's address stays. Without it, Ray searches the host's processes for clusters and
    fails if it finds two, even when it should release the resources of a dead controller.
    """
    client = client_environment(state)
    del client["RAY_ADDRESS"]
    return _server_environment(
        {
            **client,
            # train.report() blocks for one poll of the controller (default 2 s).
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
            # Ray's defaults for these two are the same in every stack.
            "AUTOSCALER_METRIC_PORT": str(state.ports["ray.autoscaler_metrics"]),
            "DASHBOARD_METRIC_PORT": str(state.ports["ray.dashboard_metrics"]),
            # `down` does not wait for running jobs.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }
    )


def _check_ray(state: StackState) -> None:
    jobs = f"{address(state, 'ray')}/api/jobs/"
    status, _ = _get(jobs)
    if status != 401:
        raise RuntimeError(f"answered {status} instead of 401 to a request without a token")
    status, _ = _get(jobs, state.ray_token)
    if status != 200:
        raise RuntimeError(f"answered {status} to a request with a token")
    _, body = _get(f"{address(state, 'ray')}/nodes?view=summary", state.ray_token)
    nodes = json.loads(body)["data"]["summary"]
    if not any(node["raylet"].get("state") == "ALIVE" for node in nodes):
        raise RuntimeError("the head node is not alive yet")


SERVICES = (
    Service(
        name="s3",
        title="S3 (SeaweedFS)",
        variable="EFAE_S3_PORT",
        default_port=8333,
        # The names are weed's flags.
        hidden_ports=(
            *("s3.port.grpc", "master.port", "master.port.grpc", "volume.port"),
            *("volume.port.grpc", "filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc"),
        ),
        start_seconds=60,
        command=_s3_command,
        environment=lambda state: _server_environment(_s3_environment(state)),
        check=_check_s3,
    ),
    Service(
        name="mlflow",
        title="MLflow",
        variable="EFAE_MLFLOW_PORT",
        default_port=5000,
        hidden_ports=(),
        start_seconds=180,
        command=_mlflow_command,
        environment=_mlflow_environment,
        check=_check_mlflow,
    ),
    Service(
        name="ray",
        title="Ray dashboard",
        variable="EFAE_RAY_DASHBOARD_PORT",
        default_port=8265,
        hidden_ports=("gcs", "agent", "client", "autoscaler_metrics", "dashboard_metrics"),
        start_seconds=120,
        command=_ray_command,
        environment=_ray_head_environment,
        check=_check_ray,
    ),
)
