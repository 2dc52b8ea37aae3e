"""Choice of the next combination: an Optuna study behind Ray Tune's `Searcher` interface.

Ray's own OptunaSearch turns every suggestion into a trial, feasible or not, reports a trial that
was stopped early as complete, and resumes from a pickle. This one rejects infeasible and repeated
combinations, and resumes from the records in storage.
"""

import random
from dataclasses import asdict
from typing import Any, cast

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from efae.sweep.config import OBJECTIVES, SweepConfig
from efae.sweep.records import Records, TrialRecord
from efae.sweep.space import Chooser, apply_combination, count_latent

_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
_MOST_ASKS = 100
"""Maximum number of suggestions that Optuna makes for one proposal; many may be rejected."""


class Proposals(Searcher):
    """Proposes trials, unfinished ones first.

    Args:
        chooser: Filter of feasible and new combinations; it has seen those of the records.
        records: Records of the sweep; a proposal is written there before it becomes a trial.
        sweep: Settings of the search.
        first: Combination that Optuna tries first, if it is new; None for no such one.

    Raises:
        ValueError: No combination of the space is feasible.
    """

    def __init__(
        self,
        chooser: Chooser,
        records: Records,
        sweep: SweepConfig,
        first: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._chooser, self._records = chooser, records
        self._steps = chooser.config.training.steps
        self._objectives, self._how = sweep.objectives, sweep.search
        self._first = first if sweep.search == "optuna" else None
        self._distributions = dict(chooser.space.distributions)
        self._possible = chooser.list_possible()
        found = records.in_phase("search")
        self._unfinished = [record for record in found if record.state == "running"]
        # The sampler's state is not stored: its seed follows from the number of proposals.
        self._random = random.Random(f"{sweep.seed} {len(found)}")
        self._study = optuna.create_study(
            directions=[_DIRECTIONS[OBJECTIVES[name]] for name in sweep.objectives],
            sampler=_make_sampler(sweep, self._random.getrandbits(32)),
        )
        for record in found:
            if record.state != "running":
                self._remember(record)
        self._asked: dict[str, tuple[optuna.Trial, int]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the trial's record, or FINISHED if the space is exhausted."""
        if self._unfinished:
            record = self._unfinished.pop(0)
            trial = self._ask_for(record.combination)
        else:
            trial = self._choose()
            if trial is None:
                return cast(Any, Searcher.FINISHED)
            config = apply_combination(self._chooser.config, trial.params)
            record = self._records.add(
                "search", dict(trial.params), config.training.seed, count_latent(config)
            )
        self._asked[trial_id] = trial, record.latent_size
        return {"record": asdict(record)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report a validation of a trial to Optuna, which accepts them for one objective only."""
        if len(self._objectives) == 1 and not result.get("cause"):
            trial, latent_size = self._asked[trial_id]
            measured = result | {"latent_size": latent_size}
            trial.report(measured[self._objectives[0]], int(result["step"]))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Report the end of a trial to Optuna."""
        trial, latent_size = self._asked.pop(trial_id)
        if error or not result or "step" not in result or result.get("cause"):
            self._study.tell(trial, state=TrialState.FAIL)
        elif result["step"] < self._steps:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            measured = result | {"latent_size": latent_size}
            self._study.tell(trial, [measured[name] for name in self._objectives])

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: all state is in the records."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: all state is in the records."""

    def _choose(self) -> optuna.Trial | None:
        """Choose a feasible, new combination, by Optuna or, if it repeats itself, at random."""
        first, self._first = self._first, None
        if first is not None and self._chooser.accept(first):
            return self._ask_for(first)
        if self._how == "optuna" or self._possible is None:
            for _ in range(_MOST_ASKS):
                trial = self._study.ask(self._distributions)
                if self._chooser.accept(trial.params):
                    return trial
                self._study.tell(trial, state=TrialState.FAIL)
        if self._how != "grid" and self._possible is not None:
            self._random.shuffle(self._possible)
        chosen = next(filter(self._chooser.accept, self._possible or []), None)
        return None if chosen is None else self._ask_for(chosen)

    def _ask_for(self, combination: dict[str, Any]) -> optuna.Trial:
        self._study.enqueue_trial(combination)
        return self._study.ask(self._distributions)

    def _remember(self, record: TrialRecord) -> None:
        """Add a trial that ended before to the study."""
        first = self._objectives[0]
        curve = {int(v["step"]): v[first] for v in record.validations if first in v}
        state = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
        self._study.add_trial(
            create_trial(
                state=state.get(record.state, TrialState.FAIL),
                values=[record.metrics[name] for name in self._objectives]
                if record.state == "finished"
                else None,
                params=record.combination,
                distributions=self._distributions,
                intermediate_values=curve if len(self._objectives) == 1 else None,
            )
        )


def _make_sampler(sweep: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    if sweep.search != "optuna":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=max(4, sweep.trials // 3),
    )
