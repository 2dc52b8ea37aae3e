"""Going on, beginning and refusing: what `resume` and the checkpoints in storage decide."""

import pytest

from efae.checkpoints.checkpoint import CheckpointError, checkpoint_name, write_checkpoint
from efae.checkpoints.events import read_events, record_event
from efae.config import Config
from efae.config.forms import with_overrides
from efae.experiment import training_run
from efae.experiment.facts import describe_run
from efae.experiment.resumption import find_start
from efae.sweep.records import Records
from efae.tracking.server import Server
from tests.unit.checkpoints.test_checkpoint import damage, make_state


@pytest.fixture
def config(tmp_path):
    names = {"ray.storage_uri": str(tmp_path), "tracking.run_name": "mine", "training.steps": 100}
    return with_overrides(Config(), names)


def write(tmp_path, config, step, run="mine"):
    uri = tmp_path / run / checkpoint_name(step)
    write_checkpoint(uri, **make_state(step) | {"config": config})
    return str(uri)


def test_a_new_name_begins_at_0(config):
    assert find_start(config) == 0
    assert find_start(with_overrides(config, {"resume": "never"})) == 0


def test_the_same_name_goes_on_unless_told_never(tmp_path, config):
    write(tmp_path, config, 40)
    uri = write(tmp_path, config, 80)
    assert find_start(config) == 80
    other_cluster = {"ray.num_workers": (1, 8), "ray.max_failures": 9, "tracking.commit": "abc"}
    other_cluster |= {"data.cache_dir": "/other", "data.cache_bytes": 1, "data.decode_threads": 7}
    other_cluster |= {"data.pixel_cache_bytes": 1, "flow.sampler_steps": 2}
    other_cluster |= {"training.checkpoint_interval": 7, "training.log_interval": 3}
    other_cluster |= {"training.held_out_images": 9}
    assert find_start(with_overrides(config, other_cluster)) == 80
    with pytest.raises(ValueError, match=rf"'mine' exists, at step 80 \({uri}\).*--resume auto"):
        find_start(with_overrides(config, {"resume": "never"}))


def test_the_name_of_a_sweep_is_refused(tmp_path, config):
    Records(tmp_path / "mine").write_sweep({})
    with pytest.raises(ValueError, match="run_name='mine': a sweep has that name"):
        find_start(config)


def test_another_configuration_is_refused_by_its_settings(tmp_path, config):
    write(tmp_path, config, 40)
    changed = with_overrides(config, {"optimizer.learning_rate": 1.0, "training.seed": 3})
    with pytest.raises(ValueError, match=r"learning_rate: 0.006 -> 1.0; training.seed: 0 -> 3"):
        find_start(changed)


def test_what_was_trained_without_mlflow_is_submitted_again(monkeypatch):
    monkeypatch.setattr(training_run, "MLFLOW_PATIENCE_SECONDS", -1)
    with pytest.raises(ConnectionError, match=r"trained, but.*again with --sweep\.name demo when"):
        training_run.wait_for_mlflow(Server(""), "--sweep.name demo", print)


def test_damage_falls_back_and_is_an_error_where_all_is_damaged(tmp_path, config, caplog):
    for step in (40, 80):
        write(tmp_path, config, step)
    damage(tmp_path / "mine/step-00000080/state.json")
    assert find_start(config) == 40
    assert "step-00000080" in caplog.text
    damage(tmp_path / "mine/step-00000040/config.json")
    with pytest.raises(CheckpointError, match="step-00000040"):
        find_start(config)


def test_a_uri_begins_a_new_run_from_another(tmp_path, config):
    uri = write(tmp_path, config, 40, run="theirs")
    onward = {"resume": uri, "optimizer.learning_rate": 1e-3, "training.steps": 400}
    assert find_start(with_overrides(config, onward)) == 40
    write(tmp_path, with_overrides(config, onward), 60)
    assert find_start(with_overrides(config, onward)) == 60  # its own checkpoints come first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.steps": 40}, "training.steps=40: the checkpoint .* is already at step 40"),
        (
            {"model.depth": 5},
            "model.depth: 4 -> 5.*here: use the same settings$",
        ),
        (
            {"data.uri": "s3://else/where"},
            "data.uri: .*, or begin with its weights alone: --start.m",
        ),
        ({"data.resolution": 64}, "data.resolution: 32 -> 64.*would be meaningless"),
        ({"training.global_batch_size": 64}, "global_batch_size: 128 -> 64"),
        ({"flow.condition_drop": 0.1}, "condition_drop: 0.0 -> 0.1"),
        ({"flow.distill_from": "a/model"}, "flow.distill_from: '' -> 'a/model'"),
    ],
)
def test_a_uri_that_does_not_fit_is_refused(tmp_path, config, changes, message):
    uri = write(tmp_path, config, 40, run="theirs")
    with pytest.raises(ValueError, match=message):
        find_start(with_overrides(config, {"resume": uri, **changes}))


def test_a_unet_trains_on_at_another_size(tmp_path, config):
    config = with_overrides(config, {"model.kind": "unet"})
    uri = write(tmp_path, config, 40, run="theirs")
    assert find_start(with_overrides(config, {"resume": uri, "data.resolution": 64})) == 40


def test_a_uri_without_a_checkpoint_is_refused(tmp_path, config):
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        find_start(with_overrides(config, {"resume": str(tmp_path / "nothing")}))


def test_events_come_back_in_order_and_count_the_recoveries(tmp_path, config):
    uri = str(tmp_path / "mine")
    assert read_events(uri) == []
    record_event(uri, "start", "2 workers begin", step=0, world_size=2)
    record_event(uri, "failure", "rank 1 was lost: killed")
    record_event(uri, "start", "2 workers go on from step 40", step=40, world_size=2)
    events = read_events(uri)
    assert [event.kind for event in events] == ["start", "failure", "start"]
    assert events[2].facts["step"] == 40
    facts = describe_run(config, {"checkpoints": 3})
    assert facts["recoveries"] == 1
    assert [line.split("  ", 1)[1] for line in facts["events"]] == [
        "2 workers begin",
        "rank 1 was lost: killed",
        "2 workers go on from step 40",
    ]
