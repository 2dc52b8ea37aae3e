"""One trial in its process, without Ray Tune: what it resumes, and what it reports of a failure."""

from dataclasses import asdict
from typing import Any

import pytest
from ray.train import ControllerError

from efae.checkpoints.checkpoint import checkpoint_name, write_checkpoint
from efae.config import Config
from efae.config.forms import to_json, with_overrides
from efae.ray_trainer import TrainingFailed
from efae.sweep import run_trial, sweep
from efae.sweep.records import TrialRecord
from efae.tracking.runs import Run
from efae.tracking.server import Server
from tests.unit.checkpoints.test_checkpoint import make_state

RATE = "optimizer.learning_rate"


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Function that runs trial 1 at a rate; returns whether it trained, and the cause it gives."""
    seen: list[str] = []
    monkeypatch.setattr(run_trial, "_begin_run", lambda *_: Run(Server("http://mlflow:5000"), "1"))
    monkeypatch.setattr(run_trial, "_train_here", lambda *_: seen.append("trained"))
    monkeypatch.setattr(run_trial.tune, "report", lambda facts: seen.append(facts["cause"]))

    def start(config: Config, rate: float) -> list[str]:
        facts = run_trial.Sweep("demo", to_json(config), Run(Server("http://mlflow:5000"), "0"))
        record = TrialRecord(1, "search", {RATE: rate}, seed=0, latent_size=1)
        run_trial.run_trial({"record": asdict(record)}, facts)
        return seen

    return start


def test_curves_that_mlflow_lacks_are_sent_before_a_sweep_registers(tmp_path, monkeypatch):
    sent: list[Any] = []
    monkeypatch.setattr(sweep, "deliver_late_points", lambda *facts: sent.append(facts[1:]))
    config = with_overrides(Config(), {"ray.storage_uri": str(tmp_path)})
    points = [["loss", 40, 1, 0.5]]
    for name, unsent in (("demo-001", points), ("demo-002", []), ("demo-003", points)):
        state = make_state(40) | {"config": config}
        state["metadata"] |= {"unsent_metrics": unsent}
        write_checkpoint(tmp_path / name / checkpoint_name(40), **state)
    trials = [
        TrialRecord(number, "search", {}, seed=0, latent_size=1, state=state)
        for number, state in enumerate(("finished", "stopped", "failed", "finished"), start=1)
    ]
    facts = run_trial.Sweep("demo", to_json(config), Run(Server("http://mlflow:5000"), "0"))
    sweep._deliver_curves(facts, trials)
    assert sent == [("efae", "demo-001", points)]


def test_the_cause_of_a_trial_of_several_workers_is_the_workers_own(tmp_path, started, monkeypatch):
    def fail(*_, **__):
        failure = TrainingFailed("training failed on rank 1: no memory")
        raise failure from ControllerError(failure)

    monkeypatch.setattr(run_trial, "TuneReportCallback", lambda: None)  # needs a session of Tune
    monkeypatch.setattr(run_trial, "run_training", fail)
    changes = {"ray.storage_uri": str(tmp_path), "ray.num_workers": 2}
    seen = started(with_overrides(Config(), changes), 0.001)
    assert seen == ["training failed on rank 1: no memory"]


@pytest.mark.parametrize(("rate", "said"), [(0.001, "trained"), (0.05, "another configuration")])
def test_a_trial_resumes_its_own_run_and_refuses_another(tmp_path, started, rate, said):
    config = with_overrides(Config(), {"ray.storage_uri": str(tmp_path), "ray.num_workers": 1})
    found = with_overrides(config, {"tracking.run_name": "demo-001", RATE: 0.001})
    folder = tmp_path / "demo-001" / checkpoint_name(40)
    write_checkpoint(folder, **make_state(40) | {"config": found})
    (seen,) = started(config, rate)
    assert said in seen
