"""Sweeps as users start them: stopped, killed, resumed; failing trials among good ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_pipelines import storage
from efae.checkpoints.checkpoint import checkpoint_name, write_checkpoint
from efae.checkpoints.events import read_events
from efae.sweep.records import Records
from tests.conftest import find_workers
from tests.integration.train_jobs import OPTIONS, read_curve, run_job, run_uri, submitted
from tests.unit.checkpoints.test_checkpoint import make_state

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.timeout(900)]
STEPS, INTERVAL = 160, 40
TRIALS = [
    f"--training.steps={STEPS}",
    f"--training.evaluation-interval={INTERVAL}",
    f"--training.checkpoint-interval={INTERVAL}",
    "--training.validation-images=32",
    "--training.held-out-images=16",
    "--optimizer.warmup-steps=10",
]
NO_MEMORY = 2**22
"""A width whose weights no machine holds."""


def find_children(name):
    """(state, name) of the MLflow runs below the sweep's, and the parent's state."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("efae")
    assert experiment is not None
    parents = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert len(parents) == 1
    parent = parents[0].info
    children = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.run_id}'"
    )
    return sorted(children, key=lambda run: run.info.run_name), parent.status


def list_leftovers(environment):
    """Processes and placement groups of trials that are still there after a while."""
    code = (
        "import ray, json; from ray.util import placement_group_table as table; ray.init();"
        "print(json.dumps([g['state'] for g in table().values() if g['state'] != 'REMOVED']))"
    )
    give_up_at = time.monotonic() + 30
    while True:
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        groups = json.loads(result.stdout.splitlines()[-1])
        processes = [p.cmdline() for p in find_workers("ray::run_trial", environment)]
        processes += [p.cmdline() for p in find_workers("RayTrainWorker", environment)]
        if not (groups or processes) or time.monotonic() > give_up_at:
            return groups + processes


def find_chunks(folder):
    """Parts of shards in a cache, with what would change if one were written again."""
    return {path: path.stat().st_ino for path in folder.rglob("*.chunk")}


@pytest.fixture(scope="module")
def stormy_sweep(train_shards, local_stack, tmp_path_factory):
    """A good trial, one that diverges, two without memory; stopped once and killed once."""
    folder = tmp_path_factory.mktemp("sweep")
    space = folder / "space.toml"
    space.write_text(
        f"""
        optimizer.learning_rate = [0.004, 1e25]
        model.hidden_size = [64, {NO_MEMORY}]
        """
    )
    options = [
        *TRIALS,
        f"--sweep.space={space}",
        "--sweep.search=grid",
        "--sweep.no-early-stopping",
        "--sweep.finalists=1",
        "--sweep.finalist-seeds=1",
        "--sweep.concurrency=1",
        "--ray.num-workers=1",
        f"--data.cache-dir={folder / 'cache'}",
    ]
    uri, seen = run_uri("stormy"), {}

    def trials():
        return Records(uri).trials

    with submitted("stormy", *options, job="tune", submission_id="stormy") as job:
        job.wait_for(
            "validation of the first trial", lambda: 1 in trials() and trials()[1].validations
        )
        stop = [str(Path(sys.executable).with_name("ray")), "job", "stop", "stormy"]
        subprocess.run(stop, check=True, capture_output=True)
        seen["after the stop"] = (list_leftovers(local_stack), find_children("stormy"))
    with submitted("stormy", *options, job="tune", inside=False) as job:
        job.wait_for("end of the first trial", lambda: trials()[1].state == "finished")
        job.wait_for(
            "validation of the finalist", lambda: 5 in trials() and trials()[5].validations
        )
        job.process.send_signal(signal.SIGKILL)
    seen["first trial"] = storage.read_bytes(f"{uri}/001.json")
    seen["chunks"] = find_chunks(folder / "cache")
    result = run_job("tune", *OPTIONS, *options, "--sweep.name=stormy")
    assert result.returncode == 0, result.stdout + result.stderr
    return seen | {"output": result.stdout, "options": options, "cache": folder / "cache"}


@pytest.mark.slow
def test_every_trial_ends_in_a_clear_state(stormy_sweep):
    records = Records(run_uri("stormy"))
    found = {
        (r.combination["optimizer.learning_rate"], r.combination["model.hidden_size"], r.seed): r
        for r in records.trials.values()
    }
    assert len(found) == len(records.trials) == 5  # no trial twice; one is the finalist
    states = {key: record.state for key, record in found.items() if record.phase == "search"}
    assert states == {
        (0.004, 64, 0): "finished",
        (1e25, 64, 0): "failed",
        (0.004, NO_MEMORY, 0): "failed",
        (1e25, NO_MEMORY, 0): "failed",
    }
    assert "not finite" in found[1e25, 64, 0].cause
    assert "memory" in found[0.004, NO_MEMORY, 0].cause
    assert [r.state for r in records.in_phase("finalist")] == ["finished"]
    assert all(r.steps == STEPS for r in found.values() if r.state == "finished")


@pytest.mark.slow
def test_what_had_ended_was_kept_and_what_had_begun_went_on(stormy_sweep):
    assert storage.read_bytes(f"{run_uri('stormy')}/001.json") == stormy_sweep["first trial"]
    for number in (1, 5):
        events = read_events(run_uri(f"stormy-{number:03d}"))
        starts = [event.facts["step"] for event in events if event.kind == "start"]
        assert len(starts) == 2
        assert starts[0] == 0 < starts[1]
        validations = Records(run_uri("stormy")).trials[number].validations
        assert [v["step"] for v in validations] == list(range(INTERVAL, STEPS + 1, INTERVAL))


@pytest.mark.slow
def test_mlflow_has_one_run_for_each_trial(stormy_sweep):
    children, parent = find_children("stormy")
    assert parent == "FINISHED"
    states = {run.info.run_name: run.info.status for run in children}
    assert states == {
        f"stormy-{record.key}": "FAILED" if record.state == "failed" else "FINISHED"
        for record in Records(run_uri("stormy")).trials.values()
    }
    for run in children:
        steps = [step for step, _ in read_curve(run, "loss")]
        assert steps == sorted(set(steps))
        if run.info.status == "FINISHED":
            assert run.data.metrics["trial/psnr"] == run.data.metrics["held_out/psnr"]
            assert steps[-1] == STEPS


@pytest.mark.slow
def test_nothing_is_left_behind(stormy_sweep, local_stack):
    leftovers, (children, parent) = stormy_sweep["after the stop"]
    assert leftovers == []
    assert parent == "KILLED"
    assert {run.info.status for run in children} == {"KILLED"}
    assert list_leftovers(local_stack) == []


@pytest.mark.slow
def test_shards_are_fetched_once_for_all_trials(stormy_sweep):
    assert stormy_sweep["chunks"]
    assert find_chunks(stormy_sweep["cache"]) == stormy_sweep["chunks"]


@pytest.mark.slow
def test_the_best_is_registered_as_candidate(stormy_sweep):
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    version = client.get_model_version_by_alias("efae", "candidate")
    children, _ = find_children("stormy")
    assert version.run_id in {run.info.run_id for run in children}
    assert f"models:/efae/{version.version}" in stormy_sweep["output"]


@pytest.mark.slow
def test_a_sweep_that_ended_or_is_another_is_refused(stormy_sweep):
    options = [*OPTIONS, *stormy_sweep["options"], "--sweep.name=stormy"]
    for more, complaint in (
        ([], "that sweep has ended"),
        (["--training.steps=200"], "training.steps: 160 -> 200"),
    ):
        result = run_job("tune", *options, *more)
        assert result.returncode == 1
        assert complaint in result.stderr


@pytest.mark.slow
def test_trials_of_several_workers_are_stopped_early(train_shards, local_stack, tmp_path):
    space = tmp_path / "space.toml"
    space.write_text('"optimizer.learning_rate" = [0.004, 1e-9]')
    result = run_job(
        "tune",
        *OPTIONS,
        *TRIALS,
        f"--sweep.space={space}",
        "--sweep.search=grid",
        "--sweep.finalists=0",
        "--ray.num-workers=2",
        "--sweep.name=nested",
        f"--tracking.report-folder={tmp_path}",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "nested" / "sweep.json").read_text())
    assert [(t["state"], t["steps"]) for t in found["trials"]] == [
        ("finished", STEPS),
        ("stopped", INTERVAL),
    ]
    assert found["best"]["config"] == {"optimizer.learning_rate": 0.004}
    assert list_leftovers(local_stack) == []
    children, parent = find_children("nested")
    assert parent == "FINISHED"
    assert [run.info.status for run in children] == ["FINISHED", "FINISHED"]


@pytest.fixture(scope="module")
def small_sweep(train_shards, local_stack, tmp_path_factory):
    """Of three trials, one without memory, one whose name another run has; its report's folder."""
    folder = tmp_path_factory.mktemp("small")
    space = folder / "space.toml"
    space.write_text(f"model.hidden_size = [64, {NO_MEMORY}, 128]")
    write_checkpoint(f"{run_uri('small-003')}/{checkpoint_name(STEPS)}", **make_state(STEPS))
    options = [*TRIALS, f"--sweep.space={space}", "--sweep.search=grid"]
    options += ["--sweep.finalists=0", "--sweep.name=small", "--ray.num-workers=1"]
    options += ["--sweep.objectives", "psnr", "velocity_irreducible_variance"]
    result = run_job("tune", *OPTIONS, *options, f"--tracking.report-folder={folder}")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "small"


def test_a_sweep_reports_each_trial_and_registers_the_best(small_sweep, local_stack):
    found = json.loads((small_sweep / "sweep.json").read_text())
    states = {t["config"]["model.hidden_size"]: t["state"] for t in found["trials"]}
    assert states == {64: "finished", NO_MEMORY: "failed", 128: "failed"}
    causes = {t["config"]["model.hidden_size"]: t["cause"] for t in found["trials"]}
    assert "memory" in causes[NO_MEMORY]
    assert "another configuration" in causes[128]
    assert found["best"]["config"] == {"model.hidden_size": 64}
    split, dim = found["closed_form_split"], found["dim"]
    assert sum(split["multiplicities"].values()) + split["multiplicities"]["e"] == dim
    assert split["linear_psnr"] > 10
    assert (small_sweep / "report.html").exists()
    children, parent = find_children("small")
    assert parent == "FINISHED"
    assert sorted(run.info.status for run in children) == ["FAILED", "FINISHED"]
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    version = client.get_model_version_by_alias("efae", "candidate")
    (best,) = [run for run in children if run.info.status == "FINISHED"]
    assert version.run_id == best.info.run_id
    name = "velocity_irreducible_variance"
    (finished,) = [trial for trial in found["trials"] if trial["state"] == "finished"]
    assert finished["metrics"][name] == best.data.metrics[f"held_out/{name}"] > 0
    assert list_leftovers(local_stack) == []


@pytest.mark.slow
def test_a_sweep_without_a_result_says_why(train_shards, local_stack, tmp_path):
    space = tmp_path / "space.toml"
    space.write_text(f"model.hidden_size = [{NO_MEMORY}]")
    options = [*TRIALS, f"--sweep.space={space}", "--sweep.name=hopeless", "--ray.num-workers=2"]
    result = run_job("tune", *OPTIONS, *options, f"--tracking.report-folder={tmp_path}")
    assert result.returncode == 1
    assert "no trial finished: 1 started; causes:" in result.stderr
    assert "memory" in result.stderr
    assert "ControllerError" not in result.stderr
    assert (tmp_path / "hopeless" / "report.html").exists()
    children, parent = find_children("hopeless")
    assert [run.info.status for run in children] == [parent] == ["FAILED"]
    assert list_leftovers(local_stack) == []
