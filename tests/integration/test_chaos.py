"""Processes killed at random moments of a run; `python -m benchmarks.chaos` is the long form."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from benchmarks.chaos.audit import audit, measure_recoveries, read_attempts
from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.fire import KINDS, Kill, Killed, plan_kills
from benchmarks.chaos.suite import CHECKPOINT_INTERVAL, find_losses, run_suite
from cluster.state import StackState, load

STEPS = 240


@pytest.fixture
def cluster(session_stack, local_stack, monkeypatch):
    """A head without CPUs and two nodes, beside the session's S3 and MLflow."""
    monkeypatch.setenv("EFAE_RAY_HEAD_CPUS", "0")
    session = load(session_stack.folder)
    folder = Path(tempfile.mkdtemp(prefix="efae-"))
    state = StackState(
        folder,
        access_key=session.access_key,
        secret_key=session.secret_key,
        ray_token=session.ray_token,
        ports={name: session.ports[name] for name in ("s3", "mlflow")},
    )
    with Cluster(state, 2) as cluster:
        yield cluster
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_cost_time_and_nothing_else(cluster, tmp_path):
    plan = [
        Kill("worker", "checkpoint", CHECKPOINT_INTERVAL, 0.05),
        Kill("raylet", "training", 120, 0.1),
        Kill("driver", "recovery", 120, 4.0),
    ]
    found = run_suite(cluster, STEPS, plan, tmp_path, "chaos")
    assert find_losses(found) == []
    assert found["samples"]["whole"]["lost_samples"] == 0
    assert found["samples"]["killed"]["steps_done_again"] > 0
    assert found["submissions"] == 2
    assert found["attempts"] >= 3
    lost = [row["lost_steps"] for row in found["kills"] if row["lost_steps"] is not None]
    assert len(lost) == 2  # the driver died in the recovery from the lost node
    # At most an interval, and what is done while a checkpoint travels.
    assert max(lost) <= CHECKPOINT_INTERVAL + found["steps_per_second"]


KEYS = [f"{number:02d}" for number in range(10)]


def write_run(folder, *groups):
    """Logs of attempts of two ranks: (first second, first step, last step), batches of four."""
    for start, first, last in groups:
        for rank in range(2):
            lines = [
                [start + step / 10, step, 2, [KEYS[(4 * step + 2 * rank + i) % 10] for i in (0, 1)]]
                for step in range(first, last + 1)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{start * 10**9 + rank}-{rank}.jsonl").write_text(text)


def audit_run(folder):
    found = audit(read_attempts(folder), KEYS, steps=10, batch_size=4)
    return {name for name, count in found.items() if count}


def edit(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_audit_accepts_steps_that_were_done_again(tmp_path):
    write_run(tmp_path, (100, 0, 5), (120, 4, 9))
    assert audit_run(tmp_path) == {"steps_done_again"}
    kills = [Killed("worker", "training", 101.0, 1)]
    (row,) = measure_recoveries(read_attempts(tmp_path), kills)
    assert row["lost_steps"] == 2
    assert row["recovery_seconds"] == pytest.approx(19.4)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda lines: lines.pop(3), {"missing_steps", "lost_samples"}),
        (lambda lines: lines[2][3].pop(), {"wrong_batches", "lost_samples"}),
        (lambda lines: lines[1].__setitem__(3, ["00", "01"]), {"repeated_samples", "lost_samples"}),
    ],
)
def test_the_audit_finds_what_is_lost_and_repeated(tmp_path, change, fault):
    write_run(tmp_path, (100, 0, 9))
    assert audit_run(tmp_path) == set()
    edit(min(tmp_path.iterdir()), change)
    assert audit_run(tmp_path) >= fault


def test_the_audit_finds_a_step_that_takes_other_samples_when_done_again(tmp_path):
    write_run(tmp_path, (100, 0, 5), (120, 4, 9))
    edit(max(tmp_path.iterdir()), lambda lines: lines[0][3].reverse())
    assert audit_run(tmp_path) == {"differing_steps", "steps_done_again"}


def test_a_line_that_a_kill_cut_is_no_step(tmp_path):
    write_run(tmp_path, (100, 0, 9))
    log = min(tmp_path.iterdir())
    log.write_text(log.read_text()[:-4])
    assert "missing_steps" in audit_run(tmp_path)


def test_a_plan_is_a_function_of_its_seed_and_has_every_kind():
    plan = plan_kills(20, KINDS, steps=4000, checkpoint_interval=40, seed=3)
    assert plan == plan_kills(20, KINDS, steps=4000, checkpoint_interval=40, seed=3)
    assert plan != plan_kills(20, KINDS, steps=4000, checkpoint_interval=40, seed=4)
    assert {kill.kind for kill in plan} == set(KINDS)
    assert {kill.moment for kill in plan} == {"training", "checkpoint", "recovery"}
    assert all(40 <= kill.step <= 3640 for kill in plan)
