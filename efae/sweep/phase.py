"""Phases of a sweep: Ray Tune runs as many trials at a time as the cluster has resources for."""

import os
import signal
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from efae.config import Config
from efae.names import make_ascii
from efae.sweep.config import OBJECTIVES, VALIDATED, SweepConfig
from efae.sweep.records import Records, TrialRecord
from efae.sweep.run_trial import Sweep, list_resources, run_trial
from efae.sweep.searcher import Proposals
from efae.tracking.redaction import first_cause

REDUCTION = 2
"""One of this many trials continues at a rung."""


class Interrupted(Exception):
    """The sweep was interrupted before its end."""


@dataclass(frozen=True)
class Phases:
    """The two phases of one sweep.

    Attributes:
        sweep: Facts that all trials share.
        config: Configuration that every trial starts from.
        settings: Settings of the search.
        records: Records of the sweep; kept up to date.
        on_end: Function called with every trial that has ended.
    """

    sweep: Sweep
    config: Config
    settings: SweepConfig
    records: Records
    on_end: Callable[[TrialRecord], None]

    def search(self, proposals: Proposals) -> None:
        """Run proposed trials until settings.trials have ended.

        Raises:
            Interrupted: The driver was told to stop; unfinished trials are still "running".
        """
        found = self.records.in_phase("search")
        ended = [r for r in found if r.state != "running"]
        # Those that run end first, even where fewer trials are asked for than before.
        left = max(self.settings.trials, len(found)) - len(ended)
        if not left:
            return
        scheduler = FIFOScheduler()
        if self.settings.early_stopping:
            scheduler = make_scheduler(self.config, self.settings)
            for record in ended:
                replay(scheduler, record)
        self._run(
            "search",
            search_alg=proposals,
            scheduler=scheduler,
            num_samples=left,
        )

    def repeat(self, chosen: Sequence[TrialRecord]) -> None:
        """Train these finalists for all their steps.

        Raises:
            Interrupted: As for `search`.
        """
        if chosen:
            grid = cast(Any, tune.grid_search([asdict(record) for record in chosen]))
            self._run("finalist", param_space={"record": grid})

    def _run(
        self, phase: str, param_space: dict[str, Any] | None = None, **tune_config: Any
    ) -> None:
        bookkeeper = Bookkeeper(self.records, self.config.training.steps, self.on_end)
        with tempfile.TemporaryDirectory(prefix="efae-tune-", ignore_cleanup_errors=True) as folder:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(run_trial, sweep=self.sweep), list_resources(self.config)
                ),
                param_space=param_space,
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=count_concurrent(self.config, self.settings),
                    trial_name_creator=_name,
                    trial_dirname_creator=_name,
                    **tune_config,
                ),
                run_config=tune.RunConfig(
                    name=make_ascii(self.sweep.name),
                    storage_path=folder,  # for Tune's own state
                    failure_config=tune.FailureConfig(max_failures=self.config.ray.max_failures),
                    callbacks=[bookkeeper],
                    verbose=0,
                ),
            )
            with _stopped_by(signal.SIGTERM):
                tuner.fit()
        if any(record.state == "running" for record in self.records.in_phase(phase)):
            raise Interrupted


def make_scheduler(config: Config, settings: SweepConfig) -> ASHAScheduler:
    """Return successive halving (Li et al. 2020, arXiv:1810.05934) by `SweepConfig.stops_by`."""
    steps = config.training.steps
    return ASHAScheduler(
        time_attr="step",
        metric=settings.stops_by,
        mode=OBJECTIVES[settings.stops_by],
        grace_period=find_first_rung(config, settings),
        max_t=steps - 1,  # stopping at the last step would save nothing
        reduction_factor=REDUCTION,
        stop_last_trials=False,
    )


def find_first_rung(config: Config, settings: SweepConfig) -> int:
    """Return the step of the first validation at which a trial can be stopped."""
    steps, interval = config.training.steps, config.training.evaluation_interval
    first = max(1, round(settings.first_rung * steps / interval)) * interval
    return first if first < steps else first - interval  # nothing is stopped at the last step


def replay(scheduler: TrialScheduler, record: TrialRecord) -> None:
    """Report a trial that ended before this driver started to the scheduler."""
    # The scheduler reads only the id of a trial.
    trial: Any = Trial("replayed", stub=True, trial_id=f"replayed-{record.key}")
    controller: Any = None
    scheduler.on_trial_add(controller, trial)
    for validation in record.validations:
        scheduler.on_trial_result(controller, trial, dict(validation))


def count_concurrent(config: Config, settings: SweepConfig) -> int:
    """Return the number of concurrent trials that the cluster allows, at least one."""
    if settings.concurrency:
        return settings.concurrency
    have = cast(dict[str, float], ray.cluster_resources())
    each = {"CPU": config.ray.cpus_per_worker, "GPU": int(config.ray.use_gpu)}
    rooms = [
        int(have.get(name, 0) / (amount * config.ray.most_workers))
        for name, amount in each.items()
        if amount
    ]
    return max(1, min(rooms))


class Bookkeeper(tune.Callback):
    """Callback in Tune: records validations and ends of trials."""

    def __init__(self, records: Records, steps: int, on_end: Callable[[TrialRecord], None]):
        self._records, self._steps, self._on_end = records, steps, on_end
        self._before = {number: r.seconds for number, r in records.trials.items()}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a validation; a restarted trial may repeat one that is recorded."""
        number, record = self._find(trial)
        if result.get("cause") or result["step"] <= record.steps:
            return
        measured = {name: result[name] for name in ("step", *VALIDATED) if name in result}
        validations = [*record.validations, measured]
        self._records.update(number, validations=validations, seconds=self._seconds(number, result))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record a trial that finished, was stopped early, or reported a final failure."""
        number, record = self._find(trial)
        result = cast(dict[str, Any], trial.last_result)
        cause = str(result.get("cause", ""))
        state = "failed" if cause else "finished" if record.steps >= self._steps else "stopped"
        self._end(number, state=state, cause=cause, seconds=self._seconds(number, result))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record a trial that failed more often than it may be retried."""
        number, _ = self._find(trial)
        error = trial.get_pickled_error() or trial.get_error()
        cause = first_cause(error) if error else "its process was lost"
        self._end(number, state="failed", cause=cause)

    def _find(self, trial: Trial) -> tuple[int, TrialRecord]:
        number = cast(int, trial.config["record"]["number"])
        return number, self._records.trials[number]

    def _seconds(self, number: int, result: dict[str, Any]) -> float:
        return self._before.get(number, 0.0) + float(result.get("time_total_s", 0.0))

    def _end(self, number: int, **changes: Any) -> None:
        self._on_end(self._records.update(number, **changes))


def _name(trial: Trial) -> str:
    return f"trial-{trial.config['record']['number']:03d}"


@contextmanager
def _stopped_by(number: signal.Signals) -> Generator[None]:
    """Turn the signal of `ray job stop` into the one on which Tune stops cleanly."""

    def forward(number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(number, forward)
    try:
        yield
    finally:
        signal.signal(number, before)
