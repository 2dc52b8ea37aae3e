"""The sweep report answers which representation is best, and says what it does not know."""

import base64
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_sweeps import (
    CAUSE,
    COLOURS,
    DIM,
    MULTIPLICITIES,
    PLANTED,
    RATE,
    ROTATION,
    SPLIT,
    STEPS,
    make_best,
    make_full_sweep,
    make_sweep,
    make_trial,
)

from efae.config.forms import with_overrides
from efae.sweep.report.page import write_sweep_report
from efae.sweep.report.study import find_front
from efae.sweep.report.surface import find_ends, find_optimum, fit_surface
from efae.sweep.report.trials import choose_pairs, read_trials
from efae.sweep.space import apply_combination
from jobs import tune
from jobs.train import parse_arguments
from tests.unit.report.test_report import Page


class Spaced(Page):
    """Cells of a table do not run into each other."""

    def handle_starttag(self, tag, attrs):
        self.text += " " if tag in {"td", "th"} else ""
        super().handle_starttag(tag, attrs)


def write(folder: Path, sweep: dict[str, Any]) -> Page:
    write_sweep_report(folder, sweep)
    return Spaced((folder / "report.html").read_text(encoding="utf-8"))


def words(page: Page) -> str:
    return " ".join(page.text.split())


@pytest.fixture(scope="module")
def sweep() -> dict[str, Any]:
    return make_full_sweep()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sweep) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "made" / "here"
    write_sweep_report(folder, sweep)
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Spaced((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_shows_the_very_figures_and_loads_nothing(folder, page):
    names = {path.name for path in folder.iterdir()}
    drawn = ["surface.png", "importance.png", "curves.png"]  # no gap, one size: nothing is traded
    assert names == {"report.html", "sweep.json", *drawn}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    shown = [base64.b64decode(source.partition(";base64,")[2]) for source in sources]
    assert shown == [(folder / name).read_bytes() for name in drawn]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "a"}


def test_the_answer_comes_first(page, sweep):
    best = sweep["best"]
    answer = words(page).partition("Next steps")[0]
    assert "8 channels invariant, 8 that change sign, 16 that turn in 8 planes" in answer
    assert f"{best['value']:.2f} dB ± {best['spread']:.2f} dB (standard deviation)" in answer
    assert "over 3 seeds" in answer
    at = {ROTATION: 16, SPLIT: 0.75}.items()
    near = [t["metrics"]["psnr"] for t in sweep["trials"] if at <= t["config"].items()]
    behind = best["value"] - np.mean(near)
    assert f"(5 invariant, 11 changing sign, 16 turning), measured {behind:.2f} dB behind" in answer
    assert 'efae.load("models:/efae/3")' in page.text


def test_the_closed_form_stands_beside_the_sweep(tmp_path, page, sweep):
    answer = words(page).partition("Next steps")[0]
    assert "splits them 5+1+6+4+8 (A1+A2+B1+B2+E)" in answer
    assert "reconstructs the held-out images at 22.41 dB" in answer
    assert "A model of that split (5 invariant, 11 changing sign, 16 turning), measured" in answer
    best = {"multiplicities": {"a1": 8, "a2": 1, "b1": 4, "b2": 3, "e": 8}, "linear_psnr": 22.4}
    trials = [trial | {"validations": []} for trial in sweep["trials"]]
    text = words(
        write(tmp_path, sweep | {"trials": trials, "space": {}, "closed_form_split": best})
    )
    assert "The best trial's representation is that one." in text


def test_a_sweep_of_release_0_1_has_no_closed_form(tmp_path, sweep):
    old = {name: value for name, value in sweep.items() if name != "closed_form_split"}
    trials = [trial | {"validations": []} for trial in sweep["trials"][:3]]
    text = words(write(tmp_path, old | {"trials": trials, "space": {}, "best": None}))
    assert "linear map" not in text


def test_the_command_is_one_that_train_takes(page):
    command = page.text[page.text.index("python jobs/train.py") :].partition("The second")[0]
    _, script, preset, *flags = shlex.split(command.replace("\\\n", ""))
    assert (script, preset) == ("jobs/train.py", "PRESET")
    config = parse_arguments(["quickstart", *flags])
    assert (config.representation.rotation_dims, config.representation.chirality_split) == (16, 0.5)
    assert (config.representation.dim, config.training.steps) == (DIM, 10 * STEPS)


@pytest.mark.parametrize(
    ("arguments", "combination"),
    [
        (
            "quickstart_trial --sweep.trials 3 --training.steps 70",
            {ROTATION: 8, SPLIT: 0.25, RATE: 0.0123456789},
        ),
        (
            'fine_tune --start.model "diffusers:/models/my vae" --start.action split --output "a b"'
            " --ray.no-use-gpu --data.resolution 64 96 --data.buckets 64 64 64 96 --resume never"
            " --representation.group mirror --ray.num-workers 1 2 --data.cache-dir /cache"
            " --sweep.objectives psnr worst_gap_db",
            {f"{MULTIPLICITIES}.{k}": n for k, n in {"a2": 0, "b1": 1, "b2": 0, "e": 0}.items()},
        ),
        (
            "photographs_64 --tracking.run-name named",
            {"representation.learned_basis": True, "model.level": "objective"},
        ),
    ],
)
def test_the_job_ends_with_a_command_that_trains_the_best_trial(sweep, arguments, combination):
    preset, config, _ = tune.parse_arguments(shlex.split(arguments))
    best = sweep["best"] | {"config": combination}
    command = tune.write_command(sweep | {"best": best, "dim": 4}, preset, config)
    _, script, *options = shlex.split(command)
    assert script == "jobs/train.py"
    trial = apply_combination(with_overrides(config, {"representation.dim": 4}), combination)
    # The sweep names its runs, and `adopt_pretrained` reads the channels of an autoencoder.
    free = {"tracking.run_name": "", "resume": "auto", "representation.dim": 4}
    assert with_overrides(parse_arguments(options), free) == with_overrides(trial, free)


def test_every_trial_stands_in_the_table_in_its_state(page, sweep):
    text = words(page)
    for trial in sweep["trials"]:
        state = trial["state"] + (", finalist" if trial["phase"] == "finalist" else "")
        m = trial["multiplicities"]
        channels = f"{m['a1']} {m['a2'] + m['b1'] + m['b2']} {2 * m['e']}"
        assert f"#{trial['number']} {state} {channels} {trial['seed']}" in text
    assert {t["state"] for t in sweep["trials"]} == {"finished", "stopped", "failed", "running"}
    finished = [t for t in sweep["trials"] if t["state"] == "finished"]
    ranked = sorted(finished, key=lambda t: -t["metrics"]["psnr"])
    rows = [text.index(f"#{t['number']} finished") for t in ranked]
    assert rows == sorted(rows)
    saved = 1 - sweep["cost"]["steps"] / sweep["cost"]["full_steps"]
    assert f"({100 * saved:.0f} % less" in text


def test_hostile_text_is_escaped_and_passwords_are_left_out(folder, page, sweep):
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" in page.text
    assert "<script" not in html
    written = json.loads((folder / "sweep.json").read_text())
    assert written["trials"][4]["cause"] == CAUSE.replace("me:hunter2", "***")
    assert "hunter2" not in html + json.dumps(written)
    assert written["trials"][4]["metrics"] == {"psnr": None}  # nan is no JSON
    assert written["trials"][0] == json.loads(json.dumps(sweep["trials"][0]))


def test_a_sweep_that_stopped_most_still_has_its_surface(tmp_path):
    """Few representations finish; where the others were heading says where not to look."""
    knobs = [(16, 0.5), (12, 0.5), (16, 0.25), (0, 0.0), (4, 0.25), (24, 0.5), (20, 0.75), (8, 0.0)]
    states = ["finished"] * 3 + ["stopped"] * 5
    trials = [
        make_trial(i, *knob, state=state)
        for i, (knob, state) in enumerate(zip(knobs, states, strict=True))
    ]
    page = write(tmp_path, make_sweep(trials, best=make_best(trials[:1])))
    assert (tmp_path / "surface.png").is_file()
    assert "5 of them count by an estimate of their end" in words(page)
    ends = find_ends(read_trials(trials), "psnr")
    surface = fit_surface(ends, DIM)
    assert surface
    assert abs(find_optimum(surface, ends, "max", COLOURS).turning - PLANTED[0]) <= 4


def test_the_front_has_all_that_nothing_betters():
    points = np.random.default_rng(0).integers(0, 9, (40, 2)).tolist()
    trials = [
        make_trial(i, 8, 0.5) | {"metrics": {"worst_gap_db": x, "psnr": y}}
        for i, (x, y) in enumerate(points)
    ]
    unfinished = make_trial(40, 8, 0.5) | {"state": "stopped", "metrics": {"worst_gap_db": -1}}
    objectives = [{"metric": "worst_gap_db", "mode": "min"}, {"metric": "psnr", "mode": "max"}]
    front = {trial.number for trial in find_front(read_trials([*trials, unfinished]), objectives)}

    def betters(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    for i, point in enumerate(points):
        assert (i in front) == (not any(betters(other, point) for other in points))
    assert len(front) < len(points)
    assert find_front([], objectives) == []


def test_of_one_objective_only_what_differs_is_set_against_it(sweep):
    psnr = {"metric": "psnr", "mode": "max"}
    trials = sweep["trials"]
    assert choose_pairs(read_trials(trials), [psnr]) == []
    for metric in ("latent_size", "worst_gap_db"):
        other = [t | {"metrics": t["metrics"] | {metric: t["number"]}} for t in trials]
        pairs = choose_pairs(read_trials(other), [psnr])
        assert pairs == [(psnr, {"metric": metric, "mode": "min"})]
    slower = [t | {"seconds": 10 + t["number"]} for t in trials]
    assert choose_pairs(read_trials(slower), [psnr])[0][1]["metric"] == "seconds"


def test_several_objectives_have_a_front(tmp_path, sweep):
    trials = [
        t
        | {
            "metrics": t["metrics"] | {"worst_gap_db": 0.1 * i, "latent_size": 256 * (1 + i % 3)},
            "config": t["config"] | {RATE: 1e-3 * (1 + i)},
        }
        for i, t in enumerate(sweep["trials"])
    ]
    names = ("held_out_loss", "worst_gap_db", "latent_size")
    more = sweep | {
        "trials": trials,
        "objectives": [{"metric": name, "mode": "min"} for name in names],
        "space": sweep["space"] | {RATE: {"low": 1e-4, "high": 1e-2, "log": True}},
        "pareto": ["t000", "t012"],
        "best": None,
    }
    assert len(choose_pairs(read_trials(trials), more["objectives"])) == 3
    page = write(tmp_path, more)
    assert (tmp_path / "pareto.png").is_file()
    text = words(page)
    front = text.partition("On the front of all objectives together")[2].partition(
        "Which hyperparameter"
    )[0]
    assert {word for word in front.split() if word.startswith("#")} == {"#0", "#12"}
    assert "1.0e-4 to 0.01, on a log scale" in text
    assert "no best one was chosen" in text


def test_a_sweep_of_multiplicities_is_about_channels_too(tmp_path, sweep):
    def renamed(trial: dict[str, Any]) -> dict[str, Any]:
        counts = trial["multiplicities"].items()
        return trial | {"config": {f"{MULTIPLICITIES}.{k}": n for k, n in counts if k != "a1"}}

    trials = [renamed(trial) for trial in sweep["trials"]]
    best = sweep["best"] | {"config": trials[13]["config"]}
    choices = {"low": 0, "high": 8, "log": False, "step": 1}
    space = dict.fromkeys(trials[13]["config"], choices)
    page = write(tmp_path, sweep | {"trials": trials, "space": space, "best": best})
    assert {path.stem for path in tmp_path.glob("*.png")} == {"surface", "importance", "curves"}
    counts = trials[13]["multiplicities"].values()
    assert f"--{MULTIPLICITIES} {' '.join(map(str, counts))} " in page.text
    assert f"{trials[13]['multiplicities']['a1']} channels invariant" in words(page)


def test_trials_of_different_dimensions_are_not_compared_by_their_splits(tmp_path, sweep):
    wider = [t | {"multiplicities": t["multiplicities"] | {"a1": 64}} for t in sweep["trials"]]
    space = sweep["space"] | {"representation.dim": {"choices": [64, 128]}}
    text = words(write(tmp_path, sweep | {"trials": wider, "space": space}))
    assert not (tmp_path / "surface.png").exists()
    assert "No response surface: the trials have different numbers of channels." in text
    assert "level exact, different numbers of channels of one latent cell" in text
    assert "which theory predicts" not in text
    assert "A model of that split" not in text


def test_theory_may_be_the_best_or_known_by_the_surface_alone(tmp_path, sweep):
    def say(rotation_dims: int) -> str:
        theory = {"rotation_dims": rotation_dims, "chirality_split": 0.5}
        # Without knobs to rate and curves to draw: this test is about words.
        trials = [trial | {"validations": []} for trial in sweep["trials"]]
        page = write(tmp_path, sweep | {"trials": trials, "space": {}, "theory": theory})
        return words(page)

    assert "That is the regular representation" in say(16)
    assert "That is within one plane and one sign of" in say(14)
    text = say(8)
    assert "is by the fitted surface 0." in text
    assert "not measured" in text


def make_small(kind: str) -> dict[str, Any]:
    out_of_memory = {"state": "failed", "metrics": {}, "validations": [], "multiplicities": {}}
    failed = [make_trial(i, 8, 0.5) | out_of_memory | {"cause": "out of memory"} for i in range(3)]
    rates = [make_trial(i, 8, 0.5, rate=rate) for i, rate in enumerate((1e-4, 1e-3, 1e-2, 3e-3))]
    if kind == "learning rate alone":
        space = {RATE: {"low": 1e-4, "high": 1e-2, "log": True}}
        best = make_best(rates[1:2])
        more = {"space": space, "best": best, "theory": None, "rungs": [], "reduction_factor": None}
        return make_sweep(rates, **more)
    if kind == "one trial":
        return make_sweep(rates[:1], best=make_best(rates[:1]))
    return make_sweep({"no trial": [], "all failed": failed}[kind])


@pytest.mark.parametrize(
    ("kind", "figures", "said"),
    [
        ("no trial", set(), ["No trial finished", "No trial started", "finished trials: 0"]),
        ("all failed", set(), ["there is no answer yet: 3 failed. First cause: out of memory"]),
        ("one trial", {"curves"}, ["one run only", "Fewer than two trials finished"]),
        (
            "learning rate alone",
            {"curves"},
            ["optimizer.learning_rate = 0.001", "had only one hyperparameter"],
        ),
    ],
)
def test_a_sweep_with_little_to_say_says_so(tmp_path, kind, figures, said):
    (tmp_path / "surface.png").write_bytes(b"of an earlier report")
    page = write(tmp_path, make_small(kind))
    assert {path.stem for path in tmp_path.glob("*.png")} == figures
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(figures)
    text = words(page)
    for sentence in (*said, "No response surface: the ends of "):
        assert sentence in text
    assert not {"None", "nan", "inf"} & set(text.split())
