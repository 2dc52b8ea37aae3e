"""The driver's part of a sweep, from its configuration to a registered candidate.

As for a single run, storage and MLflow hold all that a later driver needs to resume under the name.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipelines import storage
from data_pipelines.storage import Location
from efae.checkpoints import run_folder
from efae.checkpoints.checkpoint import CheckpointError
from efae.config import Config
from efae.config import forms as configuration
from efae.config.forms import with_overrides
from efae.evaluation.diffusability import FEWEST_CELLS
from efae.experiment.facts import describe_data, describe_run
from efae.experiment.publication import evaluate_and_export, publish
from efae.experiment.training_run import find_final, wait_for_mlflow
from efae.model.closed_form import LARGEST_PATCH
from efae.preflight.cluster_checks import run_preflight
from efae.preflight.driver_checks import RunData
from efae.registry import versions
from efae.report.html import write_split
from efae.sweep.closed_form import find_closed_form_split
from efae.sweep.config import OF_GRIDS, SweepConfig
from efae.sweep.phase import Interrupted, Phases
from efae.sweep.ranking import (
    choose_finalists,
    describe_cost,
    describe_sweep,
    find_best,
    rank,
)
from efae.sweep.records import Records, TrialRecord
from efae.sweep.report.page import write_sweep_report
from efae.sweep.run_trial import Sweep, configure_trial, name_run
from efae.sweep.searcher import Proposals
from efae.sweep.space import Chooser, Space, read_space
from efae.tracking import runs
from efae.tracking.runs import Run
from efae.tracking.sender import deliver_late_points
from efae.tracking.server import Server
from efae.training.starts.source import adopt_pretrained

CANDIDATE = "candidate"
_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "running": "KILLED"}
_MAY_GROW = ("trials", "finalists", "finalist_seeds")
"""Settings that may grow when a sweep resumes; concurrency may change freely."""


def run_sweep(
    config: Config, settings: SweepConfig, server: Server, say: Callable[[str], None]
) -> dict[str, Any]:
    """Search, repeat the best trials with other seeds, register the winner, and report.

    An unfinished sweep of the same name resumes: ended trials are kept, and unfinished ones resume
    from their checkpoints.

    Args:
        config: Configuration that every trial starts from; tracking.run_name is ignored.
        settings: Settings of the sweep.
        server: MLflow server, by an address that driver and trials reach.
        say: Function that prints one line of progress.

    Returns:
        Content of sweep.json.

    Raises:
        ValueError: The user's input cannot work, raised before any work starts; or no trial
            finished.
        StorageError: The storage refuses or does not answer.
        Interrupted: The driver was told to stop.
        ConnectionError: MLflow is unreachable when the model is registered.
    """
    started = time.monotonic()
    config = with_overrides(config, {"tracking.run_name": settings.name, "resume": "auto"})
    if config.start.is_diffusers and config.start.action != "split":
        raise ValueError(
            f"start.action={config.start.action}: a sweep searches the action itself; set split"
        )
    config = adopt_pretrained(config)
    chooser = Chooser(config, read_space(settings.space, config))
    check_settings(config, settings, chooser.space)
    say(f"    {describe_size(chooser.list_possible(), settings.trials)}")
    data = RunData(config.data)
    run_preflight(config, data, server, say)
    closed_form = find_closed_form_split(config)
    say(
        f"    best linear split: {write_split(closed_form['multiplicities'])} (A1+A2+B1+B2+E),"
        f" {closed_form['linear_psnr']:.2f} dB on held-out images"
        if closed_form
        else f"    best linear split: not measured, as a cell has more than {LARGEST_PATCH} values"
    )
    records = Records(run_folder.locate_run(config))
    parent = _begin(config, settings, chooser, records, server)
    say(f"ok   sweep {settings.name}: {parent.find_url()}")
    if records.trials:
        states = [record.state for record in records.trials.values()]
        found = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        say(f"    resuming; trials so far: {found}")
    sweep = Sweep(settings.name, configuration.to_json(config), parent)
    progress = _Progress(config, settings, sweep, records, say)
    phases = Phases(sweep, config, settings, records, progress.report)
    try:
        first = chooser.place(closed_form["multiplicities"]) if closed_form else None
        phases.search(Proposals(chooser, records, settings, first))
        phases.repeat(choose_finalists(records, settings, config.training.seed))
        best = find_best(records, settings)
        wait_for_mlflow(server, f"--sweep.name {settings.name}", say)
        _deliver_curves(sweep, records.trials.values())
        if best is not None:
            best["model_uri"] = _register(sweep, records.trials[best["number"]], data, say)
        facts = {
            "sweep_name": settings.name,
            "mlflow_parent_run_id": parent.id,
            "mlflow_url": parent.find_url(),
            **describe_sweep(config, settings, chooser, records, data),
            "closed_form_split": closed_form,
            "best": best,
            "cost": describe_cost(config, records) | {"wall_seconds": time.monotonic() - started},
        }
        _report(config, facts, parent)
        _check_found(records, best)
    except BaseException as error:
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        # Ray soon kills a stopped job, so end only the runs of unfinished trials.
        unfinished = [record for record in records.trials.values() if record.state == "running"]
        _end_runs(sweep, config, unfinished, "KILLED" if interrupted else "FAILED")
        raise
    _end_runs(sweep, config, records.trials.values(), "FINISHED")
    records.write_sweep((records.read_sweep() or {}) | {"ended": _plan(settings)})
    return facts


def check_settings(config: Config, settings: SweepConfig, space: Space) -> None:
    """Check that the sweep's settings, its space and the configuration fit together.

    Raises:
        ValueError: They do not.
    """
    if config.start.model:
        given, remedy = ("model.", "representation."), "search other settings, or leave it empty"
        if config.start.is_diffusers:
            given = ("model.downsampling", "representation.dim")
            remedy = "they are read from the autoencoder; search other settings"
        fixed = [key for key in space.distributions if key.startswith(given)]
        if fixed:
            raise ValueError(
                f"sweep.space: {', '.join(fixed)} cannot be searched, because they are those of"
                f" start.model={config.start.model!r}; {remedy}"
            )
    training = config.training
    first = settings.first_rung * training.steps
    if settings.early_stopping and training.evaluation_interval > first:
        raise ValueError(
            f"training.evaluation_interval={training.evaluation_interval}: trials are compared at"
            f" validations, the first at sweep.first_rung={settings.first_rung} of training.steps="
            f"{training.steps}; lower it to {max(1, int(first))}, or set --sweep.no-early-stopping"
        )
    spatial = [name for name in settings.objectives if name in OF_GRIDS]
    height, width = config.data.image_size
    default = config.model.downsampling
    for factor in {c.get("model.downsampling", default) for c in space.combinations}:
        if spatial and (height // factor) * (width // factor) < FEWEST_CELLS:
            raise ValueError(
                f"sweep.objectives: {spatial[0]} needs latents of {FEWEST_CELLS} cells or more, but"
                f" model.downsampling={factor} leaves {height // factor} x {width // factor}"
            )


def describe_size(possible: Sequence[Any] | None, trials: int) -> str:
    """Return how many models a space has, and how many of them the sweep leaves out.

    Args:
        possible: One combination for each model, from `Chooser.list_possible`.
        trials: Setting sweep.trials.
    """
    if possible is None:
        return f"the space is infinite or very large; sweep.trials={trials} of it are tried"
    left = len(possible) - trials
    if left <= 0:
        return f"the space has {len(possible)} different models; all of them are tried"
    return (
        f"the space has {len(possible)} different models; sweep.trials={trials} leaves out {left}"
        " of them"
    )


def _begin(
    config: Config, settings: SweepConfig, chooser: Chooser, records: Records, server: Server
) -> Run:
    """Find or create the sweep in storage and in MLflow; return its MLflow run.

    Raises:
        ValueError: The name belongs to a run, to a sweep with other settings, or to an ended one.
    """
    name = settings.name
    if run_folder.find_newest_checkpoint(run_folder.locate_run(config)):
        raise ValueError(f"sweep.name={name!r}: a run has that name; choose another")
    free = (*_MAY_GROW, "concurrency")
    fixed = {f"sweep.{k}": v for k, v in asdict(settings).items() if k not in free}
    fixed |= {
        key: value
        for key, value in configuration.flatten(config).items()
        if configuration.decides_weights(key)
    }
    fixed["sweep.space"] = chooser.space.describe()
    fixed = json.loads(json.dumps(fixed))
    known = records.read_sweep()
    if known is None:
        run, _ = runs.find_or_create_run(
            server,
            config.tracking.experiment,
            name,
            {"efae.commit": config.tracking.commit, "efae.sweep": "parent"},
        )
        run.log_params(fixed)
        records.write_sweep({"mlflow_run_id": run.id, "settings": fixed, "ended": None})
    else:
        run, before = Run(server, known["mlflow_run_id"]), known["settings"]
        changed = [
            f"{key}: {before.get(key)!r} -> {fixed.get(key)!r}"
            for key in sorted(filter(configuration.decides_weights, {*before, *fixed}))
            if before.get(key) != fixed.get(key)
        ]
        if changed:
            raise ValueError(
                f"sweep.name={name!r}: that sweep has other settings ({'; '.join(changed)}); choose"
                " another name, or the settings it started with"
            )
        planned = _plan(settings)
        if known["ended"] and all(planned[key] <= count for key, count in known["ended"].items()):
            raise ValueError(
                f"sweep.name={name!r}: that sweep has ended; choose another name, or raise"
                " sweep.trials to continue it"
            )
        records.write_sweep(known | {"ended": None})
        run.reopen()
    for record in records.trials.values():
        chooser.accept(record.combination)
    return run


def _plan(settings: SweepConfig) -> dict[str, int]:
    return {key: getattr(settings, key) for key in _MAY_GROW}


class _Progress:
    """Reports how trials ended, and ends their runs in MLflow."""

    def __init__(
        self,
        config: Config,
        settings: SweepConfig,
        sweep: Sweep,
        records: Records,
        say: Callable[[str], None],
    ):
        self._config, self._settings, self._sweep = config, settings, sweep
        self._records, self._say = records, say

    def report(self, record: TrialRecord) -> None:
        """Report a trial that has ended, and end its run."""
        end_trial(self._sweep, self._config, record)
        first = self._settings.objectives[0]
        ended = [r for r in self._records.in_phase(record.phase) if r.state != "running"]
        planned = self._settings.trials
        if record.phase == "finalist":
            planned = len(self._records.in_phase("finalist"))
        what = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in record.combination.items())
        value = f"{first} {record.metrics[first]:.4g}" if record.metrics else ""
        best = rank(self._records.in_phase("search"), self._settings)
        so_far = f"; best so far {best[0].metrics[first]:.4g} ({best[0].key})" if best else ""
        self._say(
            f"[{len(ended)}/{planned}] {record.phase} {record.key}: {what}, seed {record.seed}:"
            f" {record.state} at step {record.steps}, {record.cause or value},"
            f" {record.seconds:.0f} s{so_far}"
        )


def end_trial(sweep: Sweep, config: Config, record: TrialRecord) -> None:
    """End the trial's run in MLflow, and log its final metrics for the comparison of runs."""
    runs.end_trial(
        sweep.parent.server,
        config.tracking.experiment,
        name_run(sweep.name, record),
        _STATUS[record.state],
        {f"trial/{name}": value for name, value in record.metrics.items()},
        record.steps,
    )


def _end_runs(sweep: Sweep, config: Config, trials: Iterable[TrialRecord], status: str) -> None:
    for record in trials:
        end_trial(sweep, config, record)
    sweep.parent.finish(status)


def _deliver_curves(sweep: Sweep, trials: Iterable[TrialRecord]) -> None:
    """Send the points that MLflow lacks because it was unreachable when a trial ended."""
    for record in trials:
        if record.state not in ("finished", "stopped"):
            continue
        config = configure_trial(sweep, record)
        try:
            newest = run_folder.read_newest_origin(run_folder.locate_run(config))
        except CheckpointError:  # already logged, and no reason to lose the sweep
            continue
        if newest and (points := newest[1][0]["unsent_metrics"]):
            names = config.tracking
            deliver_late_points(sweep.parent.server, names.experiment, names.run_name, points)


def _register(sweep: Sweep, winner: TrialRecord, data: RunData, say: Callable[[str], None]) -> str:
    """Register the winner's weights as a version with the alias candidate; return its URI."""
    config, server = configure_trial(sweep, winner), sweep.parent.server
    final, metadata = find_final(config)
    say(f"evaluating trial {winner.key} on {config.training.held_out_images} held-out images ...")
    names = config.tracking
    run = runs.find_run(server, names.experiment, names.run_name)
    facts = {
        **describe_run(config, metadata["totals"]),
        **describe_data(data),
        "wall_seconds": winner.seconds,
    }
    with evaluate_and_export(final, config, metadata["totals"]["world_size"]) as product:
        summary = publish(config, data, run, product, facts)
    name, version = names.registered_model, int(summary["model_uri"].rpartition("/")[2])
    versions.set_alias(name, CANDIDATE, version, server)
    return summary["model_uri"]


def _report(config: Config, facts: dict[str, Any], parent: Run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report"
        write_sweep_report(path, facts)
        best = facts["best"]
        summary = {"steps": facts["cost"]["steps"]}
        if best is not None:
            summary[f"best_{best['metric']}"] = best["value"]
        parent.log_report(path, summary)
        if config.tracking.report_folder:
            copy = Location.parse(config.tracking.report_folder) / config.tracking.run_name
            storage.upload_folder(path, copy)


def _check_found(records: Records, best: dict[str, Any] | None) -> None:
    if best is None:
        causes = {r.cause for r in records.trials.values() if r.cause}
        raise ValueError(
            f"no trial finished: {len(records.trials)} started"
            f"{'; causes: ' + '; '.join(sorted(causes)) if causes else ''}"
        )
