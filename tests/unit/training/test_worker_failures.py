"""What is said of workers that were lost, whether the run is tried again, and who evaluates it."""

import signal
import sys
import time

import pytest
import torch
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState

from efae import evaluation_task, ray_trainer
from efae.checkpoints.events import read_events, record_event
from efae.config import Config, RayConfig
from efae.config.forms import with_overrides
from efae.ray_trainer import (
    TrainingFailed,
    WorkerFailures,
    _interruptible,
    find_root_cause,
    is_final,
)
from efae.tracking.runs import Run
from efae.tracking.server import Server
from efae.training.micro_batches import OutOfMemory
from efae.worker_groups import GroupStarts

GONE = WorkerHealthCheckFailedError(
    "A worker health check failed.\nIts process is gone.", OSError()
)
ALONE = RuntimeError("Connection closed by peer")


def test_ctrl_c_is_an_interruption_during_and_after_training():
    before = signal.getsignal(signal.SIGINT)

    def fit():
        with _interruptible():
            signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as Ray does
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_without_memory_is_not_tried_again():
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_final(caught.value)
    assert is_final(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_final(OutOfMemory(1, "out of memory"))
    assert not is_final(OutOfMemory(2, "out of memory"))  # the next try takes half
    assert not is_final(RuntimeError("the actor died"))


@pytest.mark.parametrize(
    ("num_workers", "images", "ended_with", "free", "tasks"),
    [
        ((1, 8), 512, 8, {"CPU": 32, "GPU": 8}, 8),
        ((1, 8), 512, 8, {"CPU": 32, "GPU": 3}, 3),  # nodes were lost since
        ((1, 8), 512, 8, {"CPU": 5, "GPU": 8}, 2),
        ((2, 8), 512, 8, {}, 2),  # they wait
        ((1, 8), 512, 3, {"CPU": 32, "GPU": 8}, 3),
        ((1, 8), 100, 8, {"CPU": 32, "GPU": 8}, 2),  # a batch for each
        (4, 512, 4, {}, 4),
    ],
)
def test_as_many_tasks_evaluate_as_workers_trained(
    monkeypatch, num_workers, images, ended_with, free, tasks
):
    monkeypatch.setattr(evaluation_task, "_RELEASE_SECONDS", 0)
    monkeypatch.setattr(evaluation_task.ray, "available_resources", lambda: free)
    settings = {"ray.num_workers": num_workers, "ray.use_gpu": True, "ray.cpus_per_worker": 2}
    settings["training.held_out_images"] = images
    config = with_overrides(Config(), settings)
    assert evaluation_task.choose_tasks(config, ended_with) == tasks


@pytest.mark.parametrize(
    ("errors", "rank"),
    [
        ({0: ALONE, 1: GONE, 2: ALONE}, 1),
        ({0: GONE, 1: ALONE, 2: ValueError("wrong")}, 2),
        ({2: ALONE, 1: ALONE}, 1),
    ],
)
def test_the_error_that_the_others_came_from_is_named(errors, rank):
    assert find_root_cause(errors) == (rank, errors[rank])


def find_failure(uri):
    """The event, which is written in the background."""
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        for event in read_events(uri):
            if event.kind == "failure":
                return event.facts["what"]
        time.sleep(0.05)
    raise AssertionError("no event")


def test_the_host_is_the_one_of_the_last_start(tmp_path):
    uri = str(tmp_path)
    for hosts in (["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.3"]):
        record_event(uri, "start", "2 workers begin", hosts=hosts)
    WorkerFailures(uri).after_exception(None, {0: ALONE, 1: GONE})
    said = "rank 1 on 10.0.0.3 was lost: A worker health check failed."
    assert find_failure(uri) == said


def test_workers_that_were_lost_before_they_began_have_no_host(tmp_path):
    with pytest.raises(TrainingFailed, match="rank 0: wrong"):
        WorkerFailures(str(tmp_path)).after_exception(None, {0: ValueError("wrong")})
    assert find_failure(str(tmp_path)) == "rank 0 was lost: wrong"


def test_a_lost_controller_names_its_cause(tmp_path, monkeypatch):
    def fail(*_):
        raise ControllerError(OSError("no space left"))

    monkeypatch.setattr(ray_trainer, "_fit", fail)
    changes = {"ray.storage_uri": str(tmp_path), "ray.max_failures": 0}
    config = with_overrides(Config(), changes | {"tracking.run_name": "mine"})
    with pytest.raises(TrainingFailed, match="controller was lost: no space left"):
        ray_trainer.run_training(config, Run(Server("http://mlflow:5000"), "1"))
    assert find_failure(str(tmp_path / "mine")) == "Ray's controller was lost: no space left"


def test_workers_that_die_in_every_start_end_the_run(tmp_path):
    """Ray itself would start them for ever; starts that succeed between do not add up."""
    starts = GroupStarts(str(tmp_path), RayConfig(max_failures=2), in_sweep=False)

    def fail():
        error = ControllerError(WorkerGroupStartupFailedError("no memory"))
        starts.after_controller_state_update(None, ReschedulingState(error))

    for _ in range(3):
        fail()
        fail()
        starts.after_controller_state_update(None, RunningState())
    fail()
    fail()
    with pytest.raises(TrainingFailed, match=r"no memory.* 3 starts .* ray\.max_failures=2"):
        fail()
    assert find_failure(str(tmp_path)) == "workers were lost while they started: no memory"
