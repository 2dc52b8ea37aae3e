"""One trial: a separate run, in the process that Ray Tune starts for it.

A single worker trains in that process; several are the workers of a Ray Train `TorchTrainer`, which
reserves their resources itself. Either way the trial resumes from its newest checkpoint, if any.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from efae.config import Config
from efae.config import forms as configuration
from efae.config.forms import with_overrides
from efae.experiment.resumption import find_start
from efae.model.representation import build_representation
from efae.ray_trainer import TrainingFailed, is_final, run_training, set_up_worker
from efae.sweep.config import VALIDATED
from efae.sweep.records import TrialRecord
from efae.sweep.space import apply_combination
from efae.tracking import runs
from efae.tracking.redaction import first_cause, first_line
from efae.tracking.runs import Run
from efae.training.divergence import TrainingDiverged
from efae.training.process import Process
from efae.training.resume import continue_run
from efae.training.starts.source import copy_source, describe_source

DRIVER_BYTES = 64 * 2**20
"""Memory that Tune reserves for a trial whose workers reserve the rest: Tune refuses a trial
without resources, and CPUs reserved here would be missing for the workers."""


@dataclass(frozen=True)
class Sweep:
    """Facts that all trials of a sweep share.

    Attributes:
        name: Name of the sweep.
        config: Configuration that every trial starts from, as JSON.
        parent: MLflow run of the sweep.
    """

    name: str
    config: str
    parent: Run


def configure_trial(sweep: Sweep, record: TrialRecord) -> Config:
    """Return the configuration of one trial.

    Raises:
        ValueError: Its combination cannot work.
    """
    base = configuration.from_json(sweep.config)
    return with_overrides(
        apply_combination(base, record.combination),
        {"training.seed": record.seed, "tracking.run_name": name_run(sweep.name, record)},
    )


def name_run(sweep_name: str, record: TrialRecord) -> str:
    """Return the name of the trial's run, in MLflow and in storage."""
    return f"{sweep_name}-{record.key}"


def list_resources(config: Config) -> dict[str, float]:
    """Return the resources that Tune reserves for the trial's own process."""
    if config.ray.most_workers > 1:
        return {"memory": DRIVER_BYTES}
    return {"CPU": config.ray.cpus_per_worker, **({"GPU": 1} if config.ray.use_gpu else {})}


def run_trial(proposal: dict[str, Any], sweep: Sweep) -> None:
    """Train and report every validation to Tune; report a final failure too.

    Args:
        proposal: Mapping {"record": fields of a `TrialRecord`}.
        sweep: Facts that all trials share.

    Raises:
        Exception: A failure that Tune may retry, such as the loss of a worker.
    """
    record = TrialRecord(**proposal["record"])
    config = configure_trial(sweep, record)
    try:
        find_start(config)  # refuses the checkpoint of another run that has this trial's name
        run = _begin_run(sweep, record, config)
        if config.ray.most_workers > 1:
            run_training(config, run, on_validation=TuneReportCallback())
        else:
            _train_here(config, run)
    except Exception as error:
        if not (isinstance(error, TrainingFailed) or is_final(error)):
            raise
        nothing = dict.fromkeys(VALIDATED, math.nan)
        # Ray's exceptions below a TrainingFailed do not name the cause; its own message does.
        cause = first_line(error) if isinstance(error, TrainingFailed) else first_cause(error)
        tune.report({"step": 0, **nothing, "cause": cause})


def _begin_run(sweep: Sweep, record: TrialRecord, config: Config) -> Run:
    """Find or create the trial's MLflow run, and log its parameters."""
    run, _ = runs.find_or_create_run(
        sweep.parent.server,
        config.tracking.experiment,
        config.tracking.run_name,
        {
            runs.PARENT: sweep.parent.id,
            "efae.phase": record.phase,
            "efae.commit": config.tracking.commit,
            "efae.config": configuration.digest(config),
        },
    )
    run.log_config(config)
    counts = build_representation(config).multiplicities
    run.log_params({f"latent.{irrep}": n for irrep, n in counts.items()})
    return run


def _train_here(config: Config, run: Run) -> None:
    set_up_worker()
    copy_source(config, run.server)
    if source := describe_source(config):
        run.log_params(source)
    process = Process(
        device=torch.device("cuda" if config.ray.use_gpu else "cpu"),
        report=cast(Callable[[dict[str, float]], None], tune.report),
    )
    while True:
        try:
            return continue_run(config, run, process, say=lambda line: None)
        except TrainingDiverged as error:
            if not error.rolls_back:
                raise
