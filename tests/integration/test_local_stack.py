"""The local stack as users see it: its commands, its env file, its processes."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import boto3
import psutil
import pytest

from cluster import ports
from cluster.processes import ProcessRecord, is_live, is_running, start, stop
from cluster.state import load
from tests.conftest import RunningStack, end_stack, make_stack

pytestmark = [pytest.mark.s3, pytest.mark.ray]


@pytest.fixture
def second_stack():
    stack = make_stack("a st\u00fcck, $x'#?%20:=")  # a path that is syntax to somebody
    yield stack
    end_stack(stack)


def source(stack: RunningStack) -> dict[str, str]:
    """The environment of a shell that sourced the stack's env file."""
    dump = (
        f"{shlex.quote(sys.executable)} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    )
    shell = ["bash", "-c", f"source {shlex.quote(str(stack.folder / 'env'))} && {dump}"]
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "AWS_PROFILE": "of-the-user"}
    return json.loads(subprocess.run(shell, env=clean, check=True, capture_output=True).stdout)


def s3_client(environment: dict[str, str]):
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )


def test_up_again_keeps_every_process(session_stack):
    before = load(session_stack.folder).processes
    result = session_stack.run("up")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("already up") == 3
    assert load(session_stack.folder).processes == before


def test_env_file_serves_ray_init_and_job_submit(session_stack, tmp_path):
    environment = source(session_stack)
    assert "AWS_PROFILE" not in environment
    (tmp_path / "job.py").write_text(
        "import os, ray\n"
        "ray.init()\n"
        "get = ray.remote(lambda: os.environ['AWS_ENDPOINT_URL'])\n"
        "print('worker sees', ray.get(get.remote()))\n"
    )
    expected = f"worker sees {environment['AWS_ENDPOINT_URL']}"
    direct = subprocess.run(
        [sys.executable, "job.py"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert expected in direct.stdout, direct.stderr
    ray_command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    submitted = subprocess.run(
        [*ray_command, "--working-dir", ".", "--", "python", "job.py"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert submitted.returncode == 0, submitted.stderr
    assert expected in submitted.stdout


def test_ray_refuses_a_request_without_token(session_stack):
    url = f"{source(session_stack)['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(url, timeout=10):
        pass
    assert caught.value.code == 401
    caught.value.close()


def test_secrets_are_readable_by_their_owner_only(session_stack):
    for name in ("env", "stack.json", "ray_token"):
        assert (session_stack.folder / name).stat().st_mode & 0o777 == 0o600


def test_nothing_listens_beyond_loopback(session_stack):
    owned = []
    for record in load(session_stack.folder).processes.values():
        leader = psutil.Process(record.pid)
        owned += [leader, *leader.children(recursive=True)]
    connections = [connection for process in owned for connection in process.net_connections()]
    listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.slow
def test_second_stack_runs_beside_keeps_data_and_leaves_nothing(session_stack, second_stack):
    result = second_stack.run("up")
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = source(session_stack), source(second_stack)
    assert first["AWS_SECRET_ACCESS_KEY"] != second["AWS_SECRET_ACCESS_KEY"]
    s3_client(second).put_object(Bucket="efae-data", Key="kept", Body=b"over a restart")

    leaders = [
        psutil.Process(record.pid) for record in load(second_stack.folder).processes.values()
    ]
    owned = [*leaders, *(child for leader in leaders for child in leader.children(recursive=True))]
    assert len(owned) > len(leaders)
    assert second_stack.run("down").returncode == 0
    assert [process for process in owned if is_live(process)] == []
    assert session_stack.run("status").returncode == 0

    # With another S3 port, as after a clash.
    moved = {"EFAE_S3_PORT": str(ports.pick_free(1)[0])}
    assert second_stack.run("up", **moved).returncode == 0
    body = s3_client(source(second_stack)).get_object(Bucket="efae-data", Key="kept")["Body"]
    assert body.read() == b"over a restart"


@pytest.mark.slow
def test_up_restarts_only_what_died(session_stack):
    before = load(session_stack.folder).processes
    stop(before["s3"])
    result = session_stack.run("up")
    assert result.returncode == 0, result.stdout + result.stderr
    after = load(session_stack.folder).processes
    assert after["mlflow"] == before["mlflow"]
    assert after["ray"] == before["ray"]
    assert after["s3"] != before["s3"]


def test_taken_port_is_an_error_before_anything_starts(second_stack):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        result = second_stack.run("up", EFAE_MLFLOW_PORT=str(port))
    assert result.returncode == 1
    assert str(port) in result.stderr
    assert "EFAE_MLFLOW_PORT" in result.stderr
    assert load(second_stack.folder).processes == {}


@pytest.mark.parametrize("port", ["http", "80", "70000"])
def test_bad_port_is_refused(second_stack, port):
    result = second_stack.run("up", EFAE_S3_PORT=port)
    assert result.returncode == 1
    assert f"EFAE_S3_PORT='{port}'" in result.stderr


def test_failed_start_shows_the_log_and_cleans_up(second_stack):
    (second_stack.folder / "mlflow").mkdir()
    (second_stack.folder / "mlflow" / "mlflow.db").write_text("this is no database")
    result = second_stack.run("up")
    assert result.returncode == 1
    assert "MLflow did not start" in result.stderr
    assert "file is not a database" in result.stderr
    assert load(second_stack.folder).processes == {}


def test_stop_spares_a_recycled_pid(tmp_path):
    record = start(["sleep", "60"], dict(os.environ), tmp_path / "log")
    try:
        earlier = ProcessRecord(record.pid, record.started - 100)
        assert stop(earlier) == 0
        assert is_running(record)
    finally:
        assert stop(record) == 1
    assert not is_running(record)


def test_stop_ends_the_children_of_a_dead_leader(tmp_path):
    script = "sleep 60 & echo $!; kill -9 $$"
    record = start(["bash", "-c", script], dict(os.environ), tmp_path / "log")
    while is_running(record) or not (tmp_path / "log").read_text():
        time.sleep(0.01)
    orphan = psutil.Process(int((tmp_path / "log").read_text()))
    assert is_live(orphan)
    assert stop(record) == 1
    assert not is_live(orphan)
