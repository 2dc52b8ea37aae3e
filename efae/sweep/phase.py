"""One phase of a sweep: Ray Tune runs trials, as many at a time as the cluster has room for."""

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
from efae.sweep.config import OBJECTIVES, SweepConfig
from efae.sweep.records import Records, TrialRecord
from efae.sweep.run_trial import Sweep, list_resources, run_trial
from efae.sweep.searcher import Proposals
from efae.tracking.redaction import first_cause

REDUCTION = 2
"""One of so many trials goes on at a rung."""


class Interrupted(Exception):
    """The sweep was told to stop before its end."""


@dataclass(frozen=True)
class Phases:
    """The two phases of one sweep.

    Attributes:
        sweep: what all trials share.
        config: what every trial starts from.
        settings: of the search.
        records: of the sweep; kept up to date.
        on_end: called with every trial that has ended.
    """

    sweep: Sweep
    config: Config
    settings: SweepConfig
    records: Records
    on_end: Callable[[TrialRecord], None]

    def search(self, proposals: Proposals) -> None:
        """Run trials of what `searcher` says until settings.trials have ended.

        Raises:
            Interrupted: the driver was told to stop; trials that had begun are still "running".
        """
        ended = [r for r in self.records.in_phase("search") if r.state != "running"]
        if len(ended) >= self.settings.trials:
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
            num_samples=self.settings.trials - len(ended),
        )

    def repeat(self, chosen: Sequence[TrialRecord]) -> None:
        """Run these finalists to their ends.

        Raises:
            Interrupted: as of `search`.
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
                    storage_path=folder,  # of Tune's own notes
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
    """Successive halving (Li et al. 2020, arXiv:1810.05934) by `SweepConfig.stops_by`."""
    steps = config.training.steps
    return ASHAScheduler(
        time_attr="step",
        metric=settings.stops_by,
        mode=OBJECTIVES[settings.stops_by],
        grace_period=find_first_rung(config, settings),
        max_t=steps - 1,  # at the end nothing is left to stop
        reduction_factor=REDUCTION,
        stop_last_trials=False,
    )


def find_first_rung(config: Config, settings: SweepConfig) -> int:
    """The step of the first look at which a trial can be stopped."""
    interval = config.training.evaluation_interval
    return max(1, round(settings.first_rung * config.training.steps / interval)) * interval


def replay(scheduler: TrialScheduler, record: TrialRecord) -> None:
    """Let the scheduler see a trial that ended before this driver began."""
    # All that it asks of a trial is its id.
    trial: Any = Trial("replayed", stub=True, trial_id=f"replayed-{record.key}")
    controller: Any = None
    scheduler.on_trial_add(controller, trial)
    for look in record.looks:
        scheduler.on_trial_result(controller, trial, dict(look))


def count_concurrent(config: Config, settings: SweepConfig) -> int:
    """Trials at a time: as many as the whole cluster has CPUs and GPUs for, at least one."""
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
    """Writes what happens to trials into the records."""

    def __init__(self, records: Records, steps: int, on_end: Callable[[TrialRecord], None]):
        self._records, self._steps, self._on_end = records, steps, on_end
        self._before = {number: r.seconds for number, r in records.trials.items()}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A look; one that was known before a restart may come again."""
        number, record = self._find(trial)
        if result.get("cause") or result["step"] <= record.steps:
            return
        names = ("step", "psnr", "held_out_loss", "worst_gap_db")
        look = {name: result[name] for name in names}
        self._records.update(
            number, looks=[*record.looks, look], seconds=self._seconds(number, result)
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Finished, stopped early, or failed for good in its own words."""
        number, record = self._find(trial)
        result = cast(dict[str, Any], trial.last_result)
        cause = str(result.get("cause", ""))
        state = "failed" if cause else "finished" if record.steps >= self._steps else "stopped"
        self._end(number, state=state, cause=cause, seconds=self._seconds(number, result))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Failed more often than it may be tried again."""
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
    """Turns the signal of `ray job stop` into the one that Tune ends by in order."""

    def pass_on(number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(number, pass_on)
    try:
        yield
    finally:
        signal.signal(number, before)
