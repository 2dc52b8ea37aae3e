"""Jobs with a non-finite loss: stopped at once, or rolled back to a lower learning rate."""

import json

import pytest

from efae.checkpoints.events import read_events
from tests.integration import loss_terms
from tests.integration.train_jobs import OPTIONS, find_run, read_curve, run_job, run_uri

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
SHORT = [
    *OPTIONS,
    "--training.steps=100",
    "--training.evaluation-interval=100",
    "--optimizer.warmup-steps=10",
    "--ray.num-workers=1",
    "--training.held-out-images=16",
]


def train(name, loss, *options):
    arguments = [f"--tracking.run-name={name}", f"--loss.perceptual=tests.integration.{loss}"]
    return run_job("train", *SHORT, *arguments, *options)


def test_a_run_that_diverges_stops_at_once_and_says_where(train_shards, tmp_path):
    log = tmp_path / "samples"
    result = train("diverging", "loss_terms:always", f"--tracking.sample-log={log}")
    assert result.returncode == 1
    step = loss_terms.CALLS_BEFORE
    lines = [json.loads(line) for line in next(log.iterdir()).read_text().splitlines()]
    assert f"step {step} is not finite" in result.stderr
    assert all(repr(key) in result.stderr for key in lines[step][3][:8])
    assert f"{run_uri('diverging')}/step-00000040" in result.stderr
    assert "--ray.rollbacks" in result.stderr
    # It would diverge again: the workers did not start again.
    assert [e.kind for e in read_events(run_uri("diverging"))] == ["start", "failure"]
    assert find_run("diverging").info.status == "FAILED"


def test_a_rollback_goes_on_from_the_checkpoint_at_half_the_rate(train_shards):
    loss_terms.marker().unlink(missing_ok=True)
    try:
        result = train(
            "rolled-back", "loss_terms:once", "--ray.rollbacks=1", "--ray.max-failures=0"
        )
    finally:
        loss_terms.marker().unlink(missing_ok=True)
    assert result.returncode == 0, result.stdout + result.stderr
    events = read_events(run_uri("rolled-back"))
    assert [e.kind for e in events if e.kind != "failure"] == ["start", "rollback", "start"]
    assert "half the rate" in result.stdout
    rates = dict(read_curve(find_run("rolled-back"), "learning_rate"))
    assert sorted(rates) == list(range(10, 101, 10))
    # On the cosine but halved: steps 41 to 50 were logged before the run went back to step 40.
    assert rates[50] / rates[40] > 0.75
    assert rates[60] / rates[50] < 0.5
    assert rates[70] / rates[60] > 0.6
