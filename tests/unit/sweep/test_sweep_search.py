"""How a sweep searches, without training: a formula stands in for the value of a combination."""

import math
from dataclasses import asdict

import pytest

from efae.config.forms import with_overrides
from efae.presets import PRESETS
from efae.sweep.config import VALIDATED, SweepConfig
from efae.sweep.phase import find_first_rung, make_scheduler, replay
from efae.sweep.ranking import choose_finalists, describe_trials, find_best, predict, rank
from efae.sweep.records import Records, TrialRecord
from efae.sweep.report.study import find_front
from efae.sweep.report.trials import read_trials
from efae.sweep.searcher import Proposals
from efae.sweep.space import Chooser, read_space

CONFIG = PRESETS["quickstart_trial"][1]
STEPS = CONFIG.training.steps
ROTATION, CHIRALITY = "representation.rotation_dims", "representation.chirality_split"


def value_of(combination):
    """Best at 16 and 0.5."""
    return 25 - abs(combination[ROTATION] - 16) / 8 - 4 * abs(combination[CHIRALITY] - 0.5)


def validate(combination, step=STEPS):
    value = value_of(combination) - (STEPS - step) / 100
    return {"step": step, "psnr": value, "held_out_loss": 1 / value, "worst_gap_db": 0.0}


def begin(folder, settings, first=None):
    """A driver that finds what is in storage."""
    records = Records(str(folder))
    chooser = Chooser(CONFIG, read_space(settings.space, CONFIG))
    for record in records.trials.values():
        chooser.accept(record.combination)
    return records, Proposals(chooser, records, settings, first)


def run(records, proposals, count, first_id=0):
    """Propose and end `count` trials; their combinations."""
    found = []
    for i in range(first_id, first_id + count):
        proposal = proposals.suggest(str(i))
        if proposal == "FINISHED":
            break
        record = TrialRecord(**proposal["record"])
        validation = validate(record.combination)
        proposals.on_trial_result(str(i), validation)
        proposals.on_trial_complete(str(i), validation)
        records.update(record.number, state="finished", validations=[validation])
        found.append(record.combination)
    return found


@pytest.mark.parametrize("search", ["optuna", "random", "grid"])
def test_no_combination_comes_twice_and_all_come_once(tmp_path, search):
    settings = SweepConfig(name="s", search=search, trials=100)
    records, proposals = begin(tmp_path, settings)
    found = run(records, proposals, 100)
    possible = Chooser(CONFIG, read_space("split", CONFIG)).list_possible()
    chooser = Chooser(CONFIG, read_space("split", CONFIG))
    assert possible is not None
    signed = [chooser.sign(combination) for combination in found]
    assert len(set(signed)) == len(signed) == len(possible)
    assert None not in signed
    if search == "grid":
        assert found == possible


@pytest.mark.parametrize("search", ["optuna", "random", "grid"])
def test_optuna_starts_with_the_given_combination_once(tmp_path, search):
    settings = SweepConfig(name="s", search=search, trials=12)
    first = {ROTATION: 16, CHIRALITY: 0.5}
    records, proposals = begin(tmp_path, settings, first)
    found = run(records, proposals, 3)
    assert (found[0] == first) == (search == "optuna")
    again, resumed = begin(tmp_path, settings, first)
    found += run(again, resumed, 3, first_id=3)
    assert len({tuple(c.values()) for c in found}) == 6


def test_optuna_finds_the_best_sooner_than_chance(tmp_path):
    def best_after(search, seed):
        settings = SweepConfig(name="s", search=search, trials=12, seed=seed)
        records, proposals = begin(tmp_path / f"{search}{seed}", settings)
        return max(map(value_of, run(records, proposals, 12)))

    by_model = [best_after("optuna", seed) for seed in range(4)]
    by_chance = [best_after("random", seed) for seed in range(4)]
    assert sum(by_model) > sum(by_chance)


def test_a_later_driver_goes_on(tmp_path):
    """What ended is remembered and not tried again; what had begun is begun again, first."""
    settings = SweepConfig(name="s", trials=12)
    records, proposals = begin(tmp_path, settings)
    found = run(records, proposals, 5)
    begun = [proposals.suggest(f"left-{i}")["record"] for i in range(2)]
    again, taken_up = begin(tmp_path, settings)
    assert {r.number: r.state for r in again.trials.values()} == {
        **dict.fromkeys(range(1, 6), "finished"),
        **dict.fromkeys((6, 7), "running"),
    }
    proposed = [taken_up.suggest(f"again-{i}")["record"] for i in range(5)]
    assert proposed[:2] == begun
    combinations = [*found, *(record["combination"] for record in proposed)]
    assert len({tuple(c.values()) for c in combinations}) == len(combinations)
    assert len(again.trials) == 10


@pytest.mark.parametrize("search", ["optuna", "grid"])
def test_steps_of_a_tenth_come_once_each_and_resume(tmp_path, search):
    """3 * 0.1 is more than 0.3."""
    space = tmp_path / "space.toml"
    space.write_text('"optimizer.weight_decay" = {low = 0.0, high = 0.3, step = 0.1}')
    settings = SweepConfig(name="s", search=search, space=str(space), trials=9)
    records, proposals = begin(tmp_path / "sweep", settings)
    for i in range(4):
        record = TrialRecord(**proposals.suggest(str(i))["record"])
        proposals.on_trial_complete(str(i), error=True)
        records.update(record.number, state="failed", cause="no memory")
    tried = [record.combination["optimizer.weight_decay"] for record in records.trials.values()]
    assert sorted(tried) == [0.0, 0.1, 0.2, 0.3]
    _, resumed = begin(tmp_path / "sweep", settings)
    assert resumed.suggest("5") == "FINISHED"


def test_a_later_driver_knows_the_values(tmp_path):
    """Optuna goes by what earlier drivers found: its next proposals are near the best."""
    settings = SweepConfig(name="s", trials=30)
    records, proposals = begin(tmp_path, settings)
    run(records, proposals, 14)
    _, taken_up = begin(tmp_path, settings)
    study = taken_up._study
    assert study.best_value == max(r.metrics["psnr"] for r in records.trials.values())
    assert len(study.trials) == 14


def test_a_trial_stopped_early_is_no_whole_one(tmp_path):
    settings = SweepConfig(name="s", trials=3)
    records, proposals = begin(tmp_path, settings)
    for name, step in (("whole", STEPS), ("stopped", 150)):
        record = TrialRecord(**proposals.suggest(name)["record"])
        validation = validate(record.combination, step)
        proposals.on_trial_result(name, validation)
        proposals.on_trial_complete(name, validation)
        state = "finished" if step == STEPS else "stopped"
        records.update(record.number, state=state, validations=[validation])
    proposals.suggest("failed")
    nothing = dict.fromkeys(VALIDATED, math.nan)
    proposals.on_trial_result("failed", {"step": 0, **nothing, "cause": "no memory"})
    proposals.on_trial_complete("failed", {"step": 0, **nothing, "cause": "no memory"})
    records.update(3, state="failed", cause="no memory")
    wanted = ["COMPLETE", "PRUNED", "FAIL"]
    told = [trial.state.name for trial in proposals._study.trials if trial.params]
    assert [state for state in told if state != "FAIL"] == wanted[:2]
    _, taken_up = begin(tmp_path, settings)
    assert [trial.state.name for trial in taken_up._study.trials] == wanted


@pytest.mark.parametrize(
    ("objective", "best"),
    [
        ("velocity_irreducible_variance", 0.1),
        ("spectral_energy_concentration", 0.1),
        ("local_distant_similarity", 0.3),
        ("spectral_slope_gap", 0.1),
    ],
)
def test_the_numbers_of_diffusability_are_objectives(tmp_path, objective, best):
    settings = SweepConfig(name="s", trials=3, objectives=(objective,))
    records, proposals = begin(tmp_path, settings)
    for i, value in enumerate((0.2, 0.1, 0.3)):
        record = TrialRecord(**proposals.suggest(str(i))["record"])
        validation = validate(record.combination) | {objective: value}
        proposals.on_trial_result(str(i), validation)
        proposals.on_trial_complete(str(i), validation)
        records.update(record.number, state="finished", validations=[validation])
    assert find_best(records, settings)["value"] == proposals._study.best_value == best


def test_several_objectives_give_a_front(tmp_path):
    space = tmp_path / "space.toml"
    space.write_text('"representation.dim" = {choices = [16, 24, 32]}')
    objectives = ("psnr", "latent_size")
    settings = SweepConfig(name="s", space=str(space), trials=3, objectives=objectives)
    records, proposals = begin(tmp_path / "sweep", settings)
    psnr = {16: 20.0, 24: 19.0, 32: 24.0}
    for i in range(3):
        record = TrialRecord(**proposals.suggest(str(i))["record"])
        dim = record.combination["representation.dim"]
        validation = {"step": STEPS, "psnr": psnr[dim], "held_out_loss": 1.0, "worst_gap_db": 0.0}
        proposals.on_trial_result(str(i), validation)
        proposals.on_trial_complete(str(i), validation)
        records.update(record.number, state="finished", validations=[validation])
    assert [list(t.params.values()) for t in proposals._study.best_trials if t.values] == [
        [record.combination["representation.dim"]]
        for record in records.trials.values()
        if record.combination["representation.dim"] != 24
    ]
    modes = [{"metric": "psnr", "mode": "max"}, {"metric": "latent_size", "mode": "min"}]
    front = find_front(read_trials(describe_trials(CONFIG, records)), modes)
    assert {trial.config["representation.dim"] for trial in front} == {16, 32}
    assert find_best(records, settings)["config"] == {"representation.dim": 32}


@pytest.mark.parametrize("metric", ["psnr", "held_out_loss"])
def test_asha_remembers_what_earlier_drivers_saw(metric):
    """A trial in the worse half at a rung is stopped, also when the others ended before."""
    settings = SweepConfig(name="s", objectives=(metric,))
    assert find_first_rung(CONFIG, settings) == 150
    scheduler = make_scheduler(CONFIG, settings)

    def record(number, loss):
        validations = [
            {"step": step, "psnr": -loss, "held_out_loss": loss, "worst_gap_db": 0.0}
            for step in range(150, STEPS + 1, 150)
        ]
        return TrialRecord(number, "search", {}, 0, 1, "finished", validations)

    for number, loss in enumerate((0.1, 0.2, 0.3, 0.4), start=1):
        replay(scheduler, record(number, loss))

    class Live:
        def __init__(self, name):
            self.trial_id = name

    def decide(name, loss, steps):
        trial = Live(name)
        scheduler.on_trial_add(None, trial)
        return [
            scheduler.on_trial_result(
                None, trial, {"step": step, "held_out_loss": loss, "psnr": -loss}
            )
            for step in steps
        ]

    assert decide("good", 0.15, (150, 300, 450, 600)) == ["CONTINUE"] * 4
    assert decide("bad", 0.5, (75, 150)) == ["CONTINUE", "STOP"]


@pytest.mark.parametrize(("interval", "first"), [(500, 500), (300, 600), (100, 800)])
def test_the_first_rung_comes_before_the_last_step(interval, first):
    changes = {"training.steps": 1000, "training.evaluation_interval": interval}
    config, settings = with_overrides(CONFIG, changes), SweepConfig(name="s", first_rung=0.75)
    assert find_first_rung(config, settings) == first
    make_scheduler(config, settings)


def test_finalists_are_the_best_and_planned_once(tmp_path):
    settings = SweepConfig(name="s", search="grid", trials=8, finalists=2, finalist_seeds=2)
    records, proposals = begin(tmp_path, settings)
    run(records, proposals, 8)
    records.update(3, state="stopped")
    best = [record.combination for record in rank(records.in_phase("search"), settings)[:2]]
    chosen = choose_finalists(records, settings, 0)
    assert [(r.combination, r.seed) for r in chosen] == [(c, s) for c in best for s in (1, 2)]
    assert choose_finalists(records, settings, 0) == chosen
    records.update(chosen[0].number, state="finished", validations=[validate(best[0])])
    assert choose_finalists(Records(str(tmp_path)), settings, 0) == chosen[1:]


def test_the_best_is_the_mean_over_most_seeds(tmp_path):
    settings = SweepConfig(name="s")
    records = Records(str(tmp_path))
    for combination, seed, psnr in (("a", 0, 30.0), ("b", 0, 25.0), ("b", 1, 26.0), ("c", 0, 25.8)):
        record = records.add("search", {"k": combination}, seed, 512)
        validation = {"step": STEPS, "psnr": psnr, "held_out_loss": 1.0, "worst_gap_db": 0.0}
        records.update(record.number, state="finished", validations=[validation])
    best = find_best(records, settings)
    assert (best["config"], best["value"], best["seeds"]) == ({"k": "b"}, 25.5, [0, 1])
    assert records.trials[best["number"]].metrics["psnr"] == 26.0
    assert find_best(Records(str(tmp_path / "none")), settings) is None


def test_records_come_back_from_storage(tmp_path):
    records = Records(str(tmp_path))
    record = records.add("search", {ROTATION: 4}, 3, 512)
    records.update(
        record.number, validations=[validate({ROTATION: 4, CHIRALITY: 0.5}, 100)], seconds=2.5
    )
    records.write_sweep({"ended": False})
    again = Records(str(tmp_path))
    assert list(map(asdict, again.trials.values())) == list(map(asdict, records.trials.values()))
    assert again.trials[1].steps == 100
    assert again.read_sweep() == {"ended": False}
    (tmp_path / "002.json").write_text("{")
    with pytest.raises(ValueError, match=r"002\.json: not a trial's record"):
        Records(str(tmp_path))


def test_records_of_release_0_1_are_read(tmp_path):
    """There the key of `validations` was "looks"."""
    record = Records(str(tmp_path)).add("search", {}, 0, 1)
    file = tmp_path / f"{record.key}.json"
    file.write_text(file.read_text().replace('"validations": []', '"looks": [{"step": 7}]'))
    assert Records(str(tmp_path)).trials[1].steps == 7


def test_the_theory_is_the_action_on_a_patch():
    """An 8 x 8 patch splits 10:6:6:10:16 (E twice): half of the channels turn."""
    assert predict(CONFIG) == {"rotation_dims": 16.0, "chirality_split": 22 / 32}
