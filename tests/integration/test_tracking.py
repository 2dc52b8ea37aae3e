"""Tracking to a real MLflow server that becomes unreachable and returns."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from cluster import ports
from efae.checkpoints.checkpoint import checkpoint_name, write_checkpoint
from efae.config import Config, DataConfig
from efae.config import forms as configuration
from efae.registry.model_uris import find_version, search_versions
from efae.sweep import sweep
from efae.sweep.records import TrialRecord
from efae.sweep.run_trial import Sweep
from efae.tracking import runs
from efae.tracking.runs import Run
from efae.tracking.sender import Tracker, deliver_points
from efae.tracking.server import Server
from efae.tracking.timeouts import notice_outages_soon
from tests.unit.checkpoints.test_checkpoint import make_state


class MlflowServer:
    """One server on its own database, which can be stopped and started again."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._port = ports.pick_free(1)[0]
        self._process: subprocess.Popen | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [
            *(str(Path(sys.executable).parent / "mlflow"), "server", f"--port={self._port}"),
            *("--workers=1", f"--backend-store-uri=sqlite:///{self._folder}/mlflow.db"),
            f"--artifacts-destination={self._folder}/artifacts",
        ]
        environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        log_path = self._folder / "server.log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        if not wait_until(self._answers, 120):
            raise RuntimeError(log_path.read_text()[-2000:])

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # an outage is not polite
            self._process.wait()
            self._process = None


def wait_until(condition, seconds: float) -> bool:
    give_up_at = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def _as_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TIMEOUT", "MAX_RETRIES"):  # monkeypatch gives back what was there
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "")
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
    notice_outages_soon()


@pytest.fixture
def mlflow(server: MlflowServer) -> Server:
    return Server(server.uri)


@pytest.fixture
def client(mlflow: Server) -> MlflowClient:
    return mlflow.client()


@pytest.fixture
def run(mlflow: Server, request: pytest.FixtureRequest) -> Run:
    return runs.find_or_create_run(mlflow, "tests", request.node.name, {})[0]


def read_history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def log_steps(tracker: Tracker, steps: range, sign: float = 1.0) -> None:
    for step in steps:
        tracker.log_metrics(step, {"loss": sign * step})


def test_check_server_accepts_a_server(mlflow):
    mlflow.check()


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "file:///mlruns", "mlruns", ""])
def test_check_server_refuses_what_other_nodes_cannot_reach(uri):
    with pytest.raises(ValueError, match=r"other nodes.*make up.*MLFLOW_TRACKING_URI"):
        Server(uri).check()


def test_check_server_names_address_and_remedy_when_nobody_listens():
    uri = f"http://127.0.0.1:{ports.pick_free(1)[0]}"
    with pytest.raises(ValueError, match=rf"{uri}.*Connection refused.*make up") as caught:
        Server(uri).check()
    assert "\n" not in str(caught.value)


def test_check_server_gives_up_on_silence_within_seconds_and_hides_the_password():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(ValueError, match="does not answer") as caught:
            Server(f"http://user:hunter2@127.0.0.1:{silent.getsockname()[1]}").check()
        assert time.monotonic() - start < 10
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_an_unfinished_run_is_continued(mlflow, client, status):
    name = f"continued-{status}"
    first, existed = runs.find_or_create_run(mlflow, "tests", name, {"preset": "p"})
    assert not existed
    assert client.get_run(first.id).data.tags["preset"] == "p"
    if status != "RUNNING":
        first.finish(status)
    assert runs.find_or_create_run(mlflow, "tests", name, {}) == (first, True)
    assert client.get_run(first.id).info.status == "RUNNING"


def test_a_finished_run_is_left_alone_and_the_newest_decides(mlflow):
    first, _ = runs.find_or_create_run(mlflow, "tests", "finished", {})
    first.finish("FINISHED")
    second, existed = runs.find_or_create_run(mlflow, "tests", "finished", {})
    assert second != first
    assert not existed
    assert runs.find_or_create_run(mlflow, "tests", "finished", {}) == (second, True)


def test_a_deleted_experiment_is_named(mlflow, client):
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(ValueError, match=r"tracking\.experiment='gone'"):
        runs.find_or_create_run(mlflow, "gone", "run", {})


def test_config_is_logged_once_and_may_differ_after_a_restart(client, run, tmp_path):
    secret = "s3://AKIA:hunter2@bucket/train?secret_key=hunter2&region=here"
    config = replace(Config(), data=DataConfig(uri=secret))
    run.log_config(config)
    changed = configuration.with_overrides(config, {"ray.num_workers": 4})
    run.log_config(changed)
    params = client.get_run(run.id).data.params
    assert params["ray.num_workers"] == "2"
    assert params["representation.multiplicities"] == "None"
    assert params.keys() == configuration.flatten(config).keys()
    stored = Path(client.download_artifacts(run.id, "config.json", str(tmp_path))).read_text()
    assert "hunter2" not in stored + json.dumps(params)
    assert configuration.from_json(stored).data.uri == (
        "s3://***@bucket/train?secret_key=***&region=here"
    )
    assert configuration.from_json(stored).ray.num_workers == 4


def test_a_report_is_stored_with_the_numbers_of_its_summary(client, run, tmp_path):
    (tmp_path / "report.html").write_text("<html></html>")
    summary = {"steps": 300, "psnr": 24.5, "run_name": "r", "gap_db": {"rot90": 0.0}}
    run.log_report(tmp_path, summary)
    assert [f.path for f in client.list_artifacts(run.id, "report")] == ["report/report.html"]
    assert client.get_run(run.id).data.metrics == {"summary/steps": 300.0, "summary/psnr": 24.5}
    assert read_history(client, run.id, "summary/psnr") == [(300, 24.5)]


def test_a_curve_is_read_back_in_order(client, run):
    assert run.read_curve("loss") == []
    points = [Metric("loss", float(step), 1000 - step, step) for step in (20, 5, 10)]
    client.log_batch(run.id, metrics=points, synchronous=True)
    assert run.read_curve("loss") == [(5, 5.0), (10, 10.0), (20, 20.0)]


def test_every_point_arrives_in_order_and_logging_takes_microseconds(client, run, tmp_path):
    tracker = Tracker(run, tmp_path)
    seconds = []
    for step in range(500):
        start = time.perf_counter()
        tracker.log_metrics(step, {"loss": 1.0 / (step + 1), "rate": float(step)})
        seconds.append(time.perf_counter() - start)
    tracker.log_text("hello", "notes/hello.txt")
    tracker.close()
    assert read_history(client, run.id, "rate") == [(step, float(step)) for step in range(500)]
    assert (tracker.dropped, tracker.spilled) == (0, 0)
    assert [file.path for file in client.list_artifacts(run.id, "notes")] == ["notes/hello.txt"]
    assert list(tmp_path.iterdir()) == []
    assert statistics.median(seconds) < 2e-4


def test_an_outage_delays_points_and_figures_but_loses_and_repeats_none(
    server, client, run, tmp_path
):
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"not really a picture")
    tracker = Tracker(run, tmp_path / "spill", send_interval_seconds=0.2)
    log_steps(tracker, range(100))
    assert wait_until(lambda: len(read_history(client, run.id, "loss")) == 100, 20)
    server.stop()
    try:
        slowest = 0.0
        for step in range(100, 200):
            start = time.perf_counter()
            tracker.log_metrics(step, {"loss": float(step)})
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.01)
        tracker.log_figure(figure, "figures/step-150.png")
        figure.unlink()
        assert wait_until(lambda: tracker.spilled == 100, 20)
    finally:
        server.start()
    log_steps(tracker, range(200, 300))
    assert wait_until(lambda: len(read_history(client, run.id, "loss")) == 300, 20)
    tracker.close()
    assert read_history(client, run.id, "loss") == [(step, float(step)) for step in range(300)]
    found = [file.path for file in client.list_artifacts(run.id, "figures")]
    assert found == ["figures/step-150.png"]
    assert tracker.dropped == 0
    assert slowest < 1.0  # a request would take 5
    assert list((tmp_path / "spill").iterdir()) == []


def test_a_restart_from_a_checkpoint_repeats_no_step(client, run, tmp_path):
    first = Tracker(run, tmp_path / "node-1")
    log_steps(first, range(51))
    first.log_metrics(50, {"held_out/psnr": 20.0})
    first.close()
    second = Tracker(run, tmp_path / "node-2")
    log_steps(second, range(41, 61), sign=-1.0)
    second.log_metrics(60, {"held_out/psnr": 21.0})
    second.close()
    expected = [(step, float(step if step <= 50 else -step)) for step in range(61)]
    assert read_history(client, run.id, "loss") == expected
    assert read_history(client, run.id, "held_out/psnr") == [(50, 20.0), (60, 21.0)]


def test_what_a_killed_worker_left_behind_is_sent_by_the_next(client, run, tmp_path):
    nobody = Server(f"http://127.0.0.1:{ports.pick_free(1)[0]}")
    killed = Tracker(Run(nobody, run.id), tmp_path, send_interval_seconds=0.1)
    log_steps(killed, range(60))
    killed.log_text("old", "old.txt")
    killed.close()
    assert killed.spilled == 60
    with (tmp_path / f"{run.id}.jsonl").open("a") as file:
        file.write('{"name": "loss", "st')  # killed in mid-line
    log_steps(revived := Tracker(run, tmp_path), range(41, 80))
    revived.close()
    assert read_history(client, run.id, "loss") == [(step, float(step)) for step in range(80)]
    assert [file.path for file in client.list_artifacts(run.id)] == ["old.txt"]
    assert list(tmp_path.iterdir()) == []


def test_a_point_that_the_server_has_is_stored_once(client, run):
    """What sending again after an unclear failure relies on."""
    points = [Metric("loss", float(step), 1000 + step, step) for step in range(10)]
    client.log_batch(run.id, metrics=points, synchronous=True)
    client.log_batch(run.id, metrics=points[5:], synchronous=True)
    assert [step for step, _ in read_history(client, run.id, "loss")] == list(range(10))


def test_one_bad_name_does_not_take_the_others_along(client, run, tmp_path):
    tracker = Tracker(run, tmp_path)
    log_steps(tracker, range(5))
    tracker.log_metrics(5, {"loss": 5.0, "bad\tname?": 1.0, "nan": float("nan")})
    tracker.close()
    assert tracker.dropped == 1
    assert len(read_history(client, run.id, "loss")) == 6
    assert [step for step, _ in read_history(client, run.id, "nan")] == [5]


def test_a_full_queue_drops_and_counts_instead_of_blocking(client, run, tmp_path):
    tracker = Tracker(run, tmp_path, send_interval_seconds=60, queue_size=10)
    log_steps(tracker, range(25))
    tracker.close()
    assert tracker.dropped == 15
    assert len(read_history(client, run.id, "loss")) == 10


def test_system_metrics_go_on_where_they_were_after_a_restart(client, run, tmp_path):
    name = "system/cpu_utilization_percentage"

    def count() -> int:
        return len(client.get_metric_history(run.id, name))

    for enough in (2, 4):
        tracker = Tracker(
            run, tmp_path, send_interval_seconds=0.1, system_metrics_interval_seconds=0.2
        )
        assert wait_until(lambda enough=enough: count() >= enough, 20)
        tracker.close()
    steps = [step for step, _ in read_history(client, run.id, name)]
    assert steps == list(range(len(steps)))


def test_a_checkpoint_carries_what_a_killed_process_had_not_sent(client, run, tmp_path):
    before = Tracker(run, tmp_path / "a", send_interval_seconds=3600)
    for step in range(3):
        before.log_metrics(step, {"loss": step / 10, "system/cpu": 1.0})
    saved = json.loads(json.dumps(before.unsent()))
    assert [(name, step) for name, step, *_ in saved] == [("loss", step) for step in range(3)]
    for node in ("b", "c"):  # two more lives, on other nodes; what arrived comes only once
        after = Tracker(run, tmp_path / node)
        after.resend(saved)
        after.close()
    assert read_history(client, run.id, "loss") == [(0, 0.0), (1, 0.1), (2, 0.2)]


def test_artifacts_that_clients_write_to_s3_fail_with_a_sentence(mlflow, client, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{ports.pick_free(1)[0]}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "value-of-the-variable")
    experiment = client.create_experiment("direct", artifact_location="s3://bucket/artifacts")
    run = client.create_run(experiment).info.run_id
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "boto3", None)  # as where it is not installed
        with pytest.raises(ValueError, match="install the extra aws"), mlflow.translating():
            client.log_text(run, "text", "report.txt")
    said = pytest.raises(ConnectionError, match=f"S3, where MLflow at {mlflow} keeps artifacts:")
    with said, mlflow.translating():
        client.log_text(run, "text", "report.txt")


def test_a_sweep_sends_the_curves_that_ended_trials_left(mlflow, client, tmp_path):
    """Of those that finished or were stopped: the failed ones have no result to explain."""
    config = configuration.with_overrides(Config(), {"ray.storage_uri": str(tmp_path)})
    trials = [
        TrialRecord(number, "search", {}, seed=0, latent_size=1, state=state)
        for number, state in enumerate(("finished", "stopped", "failed"), start=1)
    ]
    made: list[Run] = []
    for trial in trials:
        name = f"demo-{trial.key}"
        made.append(runs.find_or_create_run(mlflow, config.tracking.experiment, name, {})[0])
        state = make_state(40) | {"config": config}
        state["metadata"] |= {"unsent_metrics": [["loss", 40, 1, trial.number / 2]]}
        write_checkpoint(tmp_path / name / checkpoint_name(40), **state)
    sweep._deliver_curves(Sweep("demo", configuration.to_json(config), made[0]), trials)
    curves = [read_history(client, run.id, "loss") for run in made]
    assert curves == [[(40, 0.5)], [(40, 1.0)], []]


@pytest.mark.slow
def test_a_checkpoint_carries_what_an_outage_held_up(server, client, run, tmp_path):
    """MLflow is unreachable until training has ended; the driver, elsewhere, sends the curves."""
    tracker = Tracker(run, tmp_path / "worker", send_interval_seconds=0.1)
    tracker.log_metrics(0, {"loss": 0.5})
    assert wait_until(lambda: read_history(client, run.id, "loss"), 20)
    server.stop()
    try:
        for step in (1, 2):
            tracker.log_metrics(step, {"loss": step / 10})
            assert wait_until(lambda step=step: tracker.spilled >= step, 20)
        tracker.log_metrics(3, {"loss": 0.3})
        saved = json.loads(json.dumps(tracker.unsent()))
        assert not tracker.close(timeout_seconds=20)
    finally:
        server.start()
    assert [step for _, step, *_ in saved] == [1, 2, 3]
    deliver_points(run, saved)
    deliver_points(run, saved)
    assert read_history(client, run.id, "loss") == [(0, 0.5), (1, 0.1), (2, 0.2), (3, 0.3)]


NAMES = [
    *("it's", 'a "b"', 'it\'s "both"', "100%", "a_b", "axb", "A_B", "versuch-\u00fc", "lr[1]*?"),
    *("a' or 'x'='x", "a; drop", "a--b", "/* a", "a and b", "a`b", "\U0001f986", "both's \"it"),
]


def test_a_run_is_found_by_its_very_name(mlflow: Server, client: MlflowClient):
    experiment = 'it\'s "odd", 100%_\u00fc'
    names = [name for name in NAMES if "/" not in name]
    made = {name: runs.find_or_create_run(mlflow, experiment, name, {})[0] for name in names}
    assert len(set(made.values())) == len(names)
    for name, run in made.items():
        assert runs.find_or_create_run(mlflow, experiment, name, {}) == (run, True)
        assert runs.find_run(mlflow, experiment, name) == run
    made["it's"].finish("FINISHED")
    assert runs.find_unfinished_run(mlflow, experiment, "it's") is None
    assert runs.find_unfinished_run(mlflow, experiment, 'it\'s "both"')
    for missing in ("it", "a%", "_", "%", 'it\'s "b_th"', "%'\""):
        with pytest.raises(ValueError, match="MLflow has no run"):
            runs.find_run(mlflow, experiment, missing)


def test_many_runs_that_look_alike_do_not_hide_one(mlflow: Server, client: MlflowClient):
    experiment = client.create_experiment("alike")
    wanted = client.create_run(experiment, run_name="'\"").info.run_id
    for number in range(60):  # more than one page; all match the pattern that finds it
        client.create_run(experiment, run_name=f"{chr(200 + number)}x")
    assert runs.find_run(mlflow, "alike", "'\"").id == wanted


def test_the_versions_of_a_model_are_those_of_its_very_name(client: MlflowClient):
    names = [name for name in NAMES if not set(name) & set("/:@?#%\\")]
    digests = {name: f"{number:064x}" for number, name in enumerate(names)}
    for name, digest in digests.items():
        client.create_registered_model(name)
        client.create_model_version(name, "s3://bucket/x", tags={"digest": digest})
    for name, digest in digests.items():
        found = search_versions(client, name)
        assert [version.tags["digest"] for version in found] == [digest]
        uri = f"models:/{name}@sha256:{digest}"
        assert find_version(client, uri).name == name
        with pytest.raises(ValueError, match="has the digest"):
            find_version(client, f"models:/{name}@sha256:{'f' * 64}")
