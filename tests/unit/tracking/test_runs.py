"""Runs and servers as values; what they ask of MLflow is in integration/test_tracking.py."""

import json
import os
import pickle
import subprocess
import sys

import pytest
from mlflow.exceptions import MlflowException

from efae.report.html import write_json
from efae.tracking.redaction import first_cause, redact
from efae.tracking.runs import Run
from efae.tracking.server import Server
from efae.tracking.timeouts import notice_outages_soon
from jobs import generate, train, tune

RUN = Run(Server("http://someone:hunter2@mlflow:5000/"), "0123")


def test_a_run_travels_as_two_short_texts():
    assert pickle.loads(pickle.dumps(RUN)) == RUN
    assert len(pickle.dumps(RUN)) < 250


def test_neither_shows_a_password():
    assert str(RUN.server) == "http://***@mlflow:5000/"
    assert "hunter2" not in f"{RUN} {RUN!r} {RUN.server!r}"


def test_no_part_of_a_password_is_shown():
    address = "http://someone:hunt@er2@mlflow:5000/"
    assert redact(f"no answer from {address}") == "no answer from http://***@mlflow:5000/"
    assert "hunt" not in first_cause(OSError(f"{'x' * 170} {address}"))
    assert redact("at http://bob:it's@mlflow:5000") == "at http://***@mlflow:5000"


def test_a_file_without_passwords_is_still_json(tmp_path):
    cause = 'no "https://h/x?token=abc" there'
    write_json(tmp_path / "facts.json", {"http://a:b@h/x": [{"cause": cause}]})
    found = json.loads((tmp_path / "facts.json").read_text())
    assert found == {"http://***@h/x": [{"cause": cause.replace("abc", "***")}]}


@pytest.mark.parametrize(
    ("work", "job"),
    [
        ("efae.experiment.tokenizer.run_experiment", lambda: train.main(["quickstart"])),
        ("efae.sweep.sweep.run_sweep", lambda: tune.main(["quickstart_trial"])),
        (
            "efae.experiment.generator.run_generator",
            lambda: generate.main(["train", "generate_quickstart", "--data.uri", "s3://latents"]),
        ),
    ],
)
def test_a_job_says_in_one_line_that_mlflow_refuses(monkeypatch, capsys, work, job):
    def refuse(*_, **__):
        raise MlflowException("no room for artifacts", error_code=1)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", RUN.server.uri)
    monkeypatch.setattr(work, refuse)
    assert job() == 1
    said = capsys.readouterr().err
    assert said == "error: MLflow at http://***@mlflow:5000/: no room for artifacts\n"


def test_a_worker_that_receives_a_run_imports_no_mlflow():
    script = (
        "import pickle, sys; from efae.training import resume;"
        f" run = pickle.loads({pickle.dumps(RUN)!r}); print(run.id, 'mlflow' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["0123", "False"]


def test_a_workers_requests_are_quick_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
):
    timeout, retries = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.setenv(timeout, "60")
    monkeypatch.setenv(retries, "7")  # so that it is given back
    monkeypatch.delenv(retries)
    notice_outages_soon()
    assert (os.environ[timeout], os.environ[retries]) == ("60", "0")
