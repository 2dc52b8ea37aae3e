"""Attacks on the local stack and on our clients; docs/security.md lists each threat's tests."""

import contextlib
import http.client
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import psutil
import pytest

from cluster.state import load
from data_pipelines import storage
from efae import presets
from efae.registry import pull
from efae.tracking import runs
from efae.tracking.server import Server
from tests.conftest import RunningStack

pytestmark = [pytest.mark.s3, pytest.mark.ray]
ROOT = Path(__file__).parents[2]


def ask(
    address: str, path: str, method: str = "GET", body: str = "", **headers: str
) -> tuple[int, bytes]:
    """(status, body) of one request to HOST:PORT or a URL, without any proxy."""
    connection = http.client.HTTPConnection(address.rpartition("/")[2], timeout=10)
    try:
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def list_processes(stack: RunningStack, service: str) -> list[psutil.Process]:
    leader = psutil.Process(load(stack.folder).processes[service].pid)
    return [leader, *leader.children(recursive=True)]


def list_connections(stack: RunningStack, service: str) -> list[Any]:
    """Those of all its processes; workers may end meanwhile."""
    found: list[Any] = []
    for process in list_processes(stack, service):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.net_connections()
    return found


def list_ports(stack: RunningStack, service: str) -> set[int]:
    """What the processes of a service listen on."""
    connections = list_connections(stack, service)
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


class TestRay:
    """Who reaches Ray and has no token runs nothing and learns nothing."""

    @pytest.mark.parametrize("token", ["", "0123456789abcdef" * 4], ids=["no token", "wrong token"])
    def test_the_dashboard_answers_nobody_without_token(self, session_stack, tmp_path, token):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        job = json.dumps({"entrypoint": f"touch {tmp_path / 'planted'}"})
        requests = [
            *(("POST", "/api/jobs/"), ("GET", "/api/jobs/"), ("GET", "/api/jobs/one")),
            *(("GET", "/api/jobs/one/logs"), ("GET", "/api/jobs/one/logs/tail")),
            *(("POST", "/api/jobs/one/stop"), ("DELETE", "/api/jobs/one")),
            *(("PUT", "/api/packages/gcs/_ray_pkg_0.zip"), ("GET", "/api/packages/gcs/x.zip")),
            *(("GET", "/api/v0/actors"), ("GET", "/api/v0/tasks"), ("GET", "/api/v0/logs")),
            *(("GET", "/api/v0/logs/file?filename=raylet.out"), ("GET", "/api/v0/runtime_envs")),
            *(("GET", "/nodes?view=summary"), ("GET", "/nodes?view=hostnamelist")),
            *(("GET", "/logical/actors"), ("GET", "/api/cluster_status"), ("GET", "/events")),
            *(("GET", "/api/train/v2/runs"), ("GET", "/api/serve/applications/")),
            *(("PUT", "/api/serve/applications/"), ("GET", "/api/version"), ("GET", "/metrics")),
            *(("GET", "/worker/traceback?pid=1"), ("GET", "/memory_profile?pid=1")),
            *(("POST", "/api/authenticate"), ("GET", "/log_proxy?url=http://127.0.0.1/")),
        ]
        address = session_stack.environment["RAY_API_SERVER_ADDRESS"]
        body = {"POST": job, "PUT": job}
        statuses = {
            (method, path): ask(address, path, method, body.get(method, ""), **headers)[0]
            for method, path in requests
        }
        allowed = {401} if not token else {401, 403}
        assert {request: s for request, s in statuses.items() if s not in allowed} == {}
        assert list(tmp_path.iterdir()) == []

    def test_every_http_port_asks_for_the_token_or_shows_measurements_alone(self, session_stack):
        asking, measuring = set[int](), set[int]()
        for port in list_ports(session_stack, "ray"):
            try:
                status, body = ask(f"127.0.0.1:{port}", "/api/job_agent/jobs/")
            except (OSError, http.client.HTTPException):
                continue  # gRPC, below
            if status == 401:
                asking.add(port)
            else:
                assert status == 200
                assert body.startswith(b"# HELP"), f"port {port}: {body[:100]}"
                measuring.add(port)
        ports = load(session_stack.folder).ports
        assert {ports["ray"], ports["ray.agent"]} < asking  # and the agent of runtime environments
        assert len(asking) >= 3
        assert measuring

    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("ray.gcs", "/ray.rpc.JobInfoGcsService/GetAllJobInfo"),
            ("ray.gcs", "/ray.rpc.InternalKVGcsService/InternalKVKeys"),
            ("ray.gcs", "/ray.rpc.ActorInfoGcsService/GetAllActorInfo"),
            ("ray.client", "/ray.rpc.RayletDriver/ClusterInfo"),
        ],
    )
    def test_its_grpc_ports_ask_for_the_token(self, session_stack, name, call):
        state = load(session_stack.folder)
        token = f"Bearer {state.ray_token}"

        def knock(**metadata: str) -> grpc.StatusCode:
            with grpc.insecure_channel(f"127.0.0.1:{state.ports[name]}") as channel:
                try:
                    channel.unary_unary(call)(b"", timeout=10, metadata=tuple(metadata.items()))
                except grpc.RpcError as error:
                    return error.code()
            return grpc.StatusCode.OK

        assert knock() == grpc.StatusCode.UNAUTHENTICATED
        assert knock(authorization="Bearer 0123") == grpc.StatusCode.UNAUTHENTICATED
        assert knock(authorization=token) != grpc.StatusCode.UNAUTHENTICATED


def test_nobody_beyond_this_machine_is_called(session_stack):
    """No telemetry, no look for updates or for a cloud's credentials: not one connection."""
    called: set[str] = set()
    for service in load(session_stack.folder).processes:
        called |= {c.raddr.ip for c in list_connections(session_stack, service) if c.raddr}
    assert called
    assert called <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


class TestStorageAndMlflow:
    def test_objects_are_had_with_credentials_alone(self, local_stack, session_stack):
        """Not from S3 without, and not past it, from the servers that hold the objects."""
        storage.write_bytes("s3://efae-data/security/kept", b"as it was")
        state = load(session_stack.folder)
        assert ask(local_stack["AWS_ENDPOINT_URL"], "/efae-data/security/kept")[0] == 403
        for method, body in (("GET", ""), ("PUT", "planted"), ("DELETE", "")):
            for path in (
                "/buckets/efae-data/security/kept",
                "/dir/assign",
                "/dir/lookup?volumeId=1",
            ):
                for name in ("s3.filer.port", "s3.master.port"):
                    status, _ = ask(f"127.0.0.1:{state.ports[name]}", path, method, body)
                    assert status == 404, (name, method, path)
        assert storage.read_bytes("s3://efae-data/security/kept") == b"as it was"

    @pytest.mark.parametrize(
        "header", [{"Host": "attacker.example"}, {"Origin": "http://attacker.example"}], ids=str
    )
    def test_mlflow_refuses_pages_of_other_sites(self, server, header):
        """A page in a browser may give this server's address a name of its own (DNS rebinding)."""
        url, body = "/api/2.0/mlflow/experiments/create", json.dumps({"name": "planted"})
        headers = {"Content-Type": "application/json", **header}
        assert ask(server.uri, url, "POST", body, **headers)[0] == 403
        assert server.client().get_experiment_by_name("planted") is None

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    @pytest.mark.parametrize(
        "path", ["../../etc/passwd", "..%2f..%2fefae-data%2fx", "%252e%252e%252fx", "%2e%2e/x"]
    )
    def test_mlflow_keeps_to_its_artifacts(self, server, method, path):
        url = f"/api/2.0/mlflow-artifacts/artifacts/{path}"
        assert ask(server.uri, url, method, "x" if method == "PUT" else "")[0] == 400


@contextlib.contextmanager
def serve(answers: dict[str, object]) -> Iterator[tuple[str, list[str]]]:
    """HOST:PORT of a server that says these things, and the Authorization that it is sent.

    Args:
        answers: JSON values by a part of the path.
    """
    sent: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            sent.append(self.headers.get("Authorization", ""))
            found = [answer for part, answer in answers.items() if part in self.path]
            body = json.dumps(found[0] if found else {}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()
            thread.join()


class TestHostileRegistry:
    """What a registry says of a model's place, where others may write into the registry."""

    @pytest.fixture(autouse=True)
    def of_this_test(self, cache, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "the-token-of-who-pulls")

    @pytest.mark.parametrize("uri", ["models:/m/1", "models:/m@champion", "runs:/abc/model"])
    @pytest.mark.parametrize("place", ["mlflow-artifacts://{}/x", "http://{}/x", "runs:/abc/model"])
    def test_the_token_goes_to_the_registry_alone(self, monkeypatch, uri, place):
        with serve({"": {"files": []}}) as (thief, stolen):
            version = {"name": "m", "version": "1", "source": place.format(thief), "tags": []}
            of_run = "mlflow-artifacts://{}/x" if place.startswith("runs") else place
            answers = {
                "experiments/search": {"experiments": []},
                "model-versions/get": {"model_version": version},
                "registered-models/alias": {"model_version": version},
                "runs/get": {"run": {"info": {"artifact_uri": of_run.format(thief)}, "data": {}}},
            }
            with serve(answers) as (address, sent):
                monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
                with pytest.raises(ValueError, match="would send its own credentials"):
                    pull.pull(uri)
            assert set(sent) == {"Bearer the-token-of-who-pulls"}
            assert stolen == []

    def test_a_listing_plants_no_file(self, monkeypatch, tmp_path):
        planted = tmp_path / "planted"
        names = [f"{'../' * 12}{planted}", str(planted), "manifest.json/../../planted"]
        files = [{"path": name, "is_dir": False, "file_size": 1} for name in names]
        version = {"name": "m", "version": "1", "source": "mlflow-artifacts:/x", "tags": []}
        answers = {
            "experiments/search": {"experiments": []},
            "model-versions/get": {"model_version": version},
            "mlflow-artifacts/artifacts": {"files": files},
        }
        with serve(answers) as (address, _):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
            with pytest.raises(pull.CheckpointError, match="manifest"):
                pull.pull("models:/m/1")
        assert not planted.exists()


class TestSecrets:
    def find(self, where: str, text: str | bytes, stack: RunningStack) -> list[str]:
        """Names of the stack's secrets that are in a text, each with its place."""
        state = load(stack.folder)
        data = text.encode() if isinstance(text, str) else text
        secrets = {"S3 secret": state.secret_key, "Ray token": state.ray_token}
        return [f"{name} in {where}" for name, value in secrets.items() if value.encode() in data]

    @pytest.mark.timeout(600)
    def test_a_run_leaves_none_behind(self, whole_run, session_stack, client, tmp_path):
        state, found, texts = load(session_stack.folder), [], 0
        for path in session_stack.folder.rglob("*"):  # MLflow's database and all logs are in it
            if path.is_file() and not path.is_relative_to(session_stack.folder / "s3"):
                with contextlib.suppress(FileNotFoundError):  # Ray removes some of its own
                    found += self.find(str(path), path.read_bytes(), session_stack)
        kept = {"env": 1, "stack.json": 2, "ray_token": 1}
        assert sorted(at.rpartition("/")[2] for at in found) == sorted(
            name for name, count in kept.items() for _ in range(count)
        )
        found = []
        for uri in ("s3://efae-runs/ray/whole", "s3://mlflow/artifacts"):
            for name, size in storage.list_files(uri).items():
                if size < 2**22:
                    texts += 1
                    data = storage.read_bytes(f"{uri}/{name}")
                    found += self.find(f"{uri}/{name}", data, session_stack)
        assert texts > 20  # checkpoints, report.html, summary.json, config.json, model card
        run = client.get_run(whole_run.info.run_id)
        found += self.find("run", json.dumps(run.to_dictionary(), default=str), session_stack)
        headers = {"Authorization": f"Bearer {state.ray_token}"}
        address = session_stack.environment["RAY_API_SERVER_ADDRESS"]
        shown = ("workers?detail=true", "actors?detail=true", "tasks?detail=true", "runtime_envs")
        for path in ("/api/jobs/", *(f"/api/v0/{name}" for name in shown)):
            status, body = ask(address, path, **headers)
            assert status == 200, path
            found += self.find(path, body, session_stack)
        for service in state.processes:  # every user of a machine may read these
            for process in list_processes(session_stack, service):
                with contextlib.suppress(psutil.NoSuchProcess):
                    line = " ".join(process.cmdline())
                    found += self.find(f"arguments of {process.pid}", line, session_stack)
        assert found == []

    def test_a_submitted_job_gets_none_from_its_runtime_env(self, session_stack, tmp_path):
        """By the script that `make train` uses, in a folder that has what it needs."""
        (tmp_path / ".venv/bin").mkdir(parents=True)
        ray = shutil.which("ray", path=str(Path(sys.executable).parent))
        (tmp_path / ".venv/bin/ray").symlink_to(str(ray))
        (tmp_path / "job.py").write_text(
            "import os; print('it has', sorted(n for n in os.environ if 'SECRET' in n))"
        )
        shutil.copy(ROOT / ".rayignore", tmp_path)
        result = subprocess.run(
            [ROOT / "cluster/submit_job.sh", session_stack.folder / "env", "job.py"],
            env={name: os.environ[name] for name in ("PATH", "HOME")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "it has ['AWS_SECRET_ACCESS_KEY']" in result.stdout, result.stdout + result.stderr
        state = load(session_stack.folder)
        headers = {"Authorization": f"Bearer {state.ray_token}"}
        _, body = ask(session_stack.environment["RAY_API_SERVER_ADDRESS"], "/api/jobs/", **headers)
        job = next(j for j in json.loads(body) if j["entrypoint"] == "python job.py")
        assert set(job["runtime_env"]) == {"working_dir"}
        assert set(job["metadata"]) <= {"job_submission_id", "job_name"}
        assert self.find("job", json.dumps(job), session_stack) == []
        assert self.find("output", result.stdout + result.stderr, session_stack) == []

    def test_a_password_in_mlflows_address_is_neither_printed_nor_stored(self, server):
        parts = urlsplit(server.uri)
        secret = Server(f"http://someone:hunter2@{parts.netloc}")
        run, _ = runs.find_or_create_run(secret, "security", "password", {})
        config = presets.PRESETS["quickstart"][1]
        run.log_config(config)
        assert run.find_url().startswith(f"http://***@{parts.netloc}/#/")
        assert "hunter2" not in repr(run)
        stored = server.client().get_run(run.id)
        assert "hunter2" not in json.dumps(stored.to_dictionary(), default=str)
