"""Names that work everywhere on their way, and names that are refused when they are parsed."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efae.checkpoints.run_folder import locate_run
from efae.config import Config
from efae.config.forms import with_overrides
from efae.names import LONGEST_BYTES, find_fault, make_ascii
from efae.preflight.driver_checks import check_configuration
from efae.presets import PRESETS
from efae.sweep.config import SweepConfig
from jobs import train, tune

EVERYWHERE = [
    (".", "read as a relative path"),
    ("..", "read as a relative path"),
    ("...", "read as a relative path"),
    (" run", "begins or ends with a space"),
    ("run ", "begins or ends with a space"),
    ("a\nb", "a line break"),
    ("a\x1b[31m", "cannot be printed"),
    ("caf\udce9", "cannot be printed"),
    ("x" * 300, "it has 300 bytes of UTF-8, and at most"),
    ("\u00fc" * 101, r"it has 202 bytes of UTF-8"),
]
PATHS = [
    ("a/b", "it contains /"),
    ("../other", "it contains /"),
    ("/etc", "it contains /"),
    ("a\\b", "it contains"),
]


@pytest.mark.parametrize(("name", "fault"), [*EVERYWHERE, *PATHS])
def test_a_run_that_cannot_work_is_refused_when_it_is_named(name, fault):
    with pytest.raises(ValueError, match=rf"tracking.run_name='.*{fault}.*; choose another name"):
        with_overrides(Config(), {"tracking.run_name": name})


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *EVERYWHERE,
        *PATHS,
        ("", "is empty"),
        ("a:1", "contains :"),
        ("a@b", "contains @"),
        ("a#", "contains #"),
    ],
)
def test_a_model_that_cannot_work_is_refused_when_it_is_named(name, fault):
    with pytest.raises(ValueError, match=rf"tracking.registered_model='.*{fault}"):
        with_overrides(Config(), {"tracking.registered_model": name})


@pytest.mark.parametrize(("name", "fault"), [*EVERYWHERE, ("", "is empty")])
def test_an_experiment_that_cannot_work_is_refused_when_it_is_named(name, fault):
    with pytest.raises(ValueError, match=rf"tracking.experiment='.*{fault}"):
        with_overrides(Config(), {"tracking.experiment": name})


@pytest.mark.parametrize(
    ("name", "fault"), [*EVERYWHERE, *PATHS, ("x" * 195, "at most 190 are allowed")]
)
def test_a_sweep_that_cannot_work_is_refused_when_it_is_named(name, fault):
    with pytest.raises(ValueError, match=rf"sweep.name='.*{fault}"):
        SweepConfig(name=name)


def test_names_that_work_are_taken():
    assert SweepConfig(name="x" * 190).name
    for name in (
        "versuch-\u00fc",
        'it\'s "1" of 100%',
        "lr[1]*?",
        "a:b",
        "x" * 200,
        ".hidden",
        "-1",
    ):
        config = with_overrides(Config(), {"tracking.run_name": name})
        assert str(locate_run(config)) == f"s3://efae-runs/ray/{name}"
    for name in ("/Users/me@host/sketches", "a:b", "it's"):
        with_overrides(Config(), {"tracking.experiment": name})
    with_overrides(Config(), {"tracking.registered_model": 'it\'s "mine", \u00fc'})


def test_a_run_needs_a_name_and_room_for_it_in_storage_and_steps_to_profile():
    config = PRESETS["quickstart"][1]
    with pytest.raises(ValueError, match=r"tracking.run_name='': name the run"):
        check_configuration(config)
    named = {"tracking.run_name": "x" * 200, "ray.storage_uri": "s3://bucket/" + "y" * 800}
    with pytest.raises(ValueError, match=r"bytes, s3:// takes 1024: choose a shorter one"):
        check_configuration(with_overrides(config, named))
    short = {"tracking.run_name": "x", "training.steps": 16, "training.profile_steps": 5}
    with pytest.raises(ValueError, match=r"profile_steps=5 with.*steps=16:.*set.*to 17 at least"):
        check_configuration(with_overrides(config, short))
    check_configuration(with_overrides(config, short | {"training.steps": 17}))


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_ray_gets_a_short_ascii_name_of_each_run(a, b):
    names = [name for name in (a, b) if not find_fault(name, "/\\")]
    short = [make_ascii(name) for name in names]
    assert len(set(short)) == len(set(names))
    for name in short:
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name)


def test_a_plain_name_is_itself_in_ray():
    assert make_ascii("quickstart-20261128-230000-3f9a") == "quickstart-20261128-230000-3f9a"
    assert re.fullmatch(r"versuch---[0-9a-f]{12}", make_ascii("versuch-\u00fc"))
    assert len(make_ascii("x" * LONGEST_BYTES)) < 100


def test_jobs_of_one_second_have_different_names(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20261128-230000")
    runs = {train.parse_arguments(["quickstart"]).tracking.run_name for _ in range(3)}
    sweeps = {tune.parse_arguments(["quickstart"])[2].name for _ in range(3)}
    assert len(runs) > 1
    assert len(sweeps) > 1
