"""Search the configuration, above all the latent's representation, and register the best model.

    python jobs/tune.py quickstart_trial
    python jobs/tune.py quickstart_trial --sweep.trials 24 --sweep.space split_and_rate
    python jobs/tune.py imagenet_256 --training.steps 20000 --sweep.space my_space.toml
    ray job submit --working-dir . -- python jobs/tune.py quickstart_trial

Every trial is a run of jobs/train.py, of the preset with the trial's overrides. Addresses come from
the environment, as for jobs/train.py. The same --sweep.name resumes that sweep: ended trials are
kept, and unfinished ones resume from their checkpoints.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import tyro
from pydantic.dataclasses import dataclass

from data_pipelines.commands import run_command
from efae.config import Config
from efae.config.forms import flatten, rename_options, write_option
from efae.names import invent_name
from efae.presets import PRESETS
from efae.sweep.config import SweepConfig
from efae.tracking.server import Server

LOG_LEVELS = {
    "optuna": logging.WARNING,  # it logs every study
    "ray.tune": logging.WARNING,
    "ray.tune.tune": logging.ERROR,  # it recommends Tuner.restore
}
OF_THE_SWEEP = ("tracking.run_name", "resume")
"""Settings that a sweep chooses for its trials."""


@dataclass(frozen=True)
class SweepJob(Config):
    """An experiment and the search over it."""

    sweep: SweepConfig = field(default_factory=SweepConfig)


def parse_arguments(arguments: list[str]) -> tuple[str, Config, SweepConfig]:
    """Return the preset's name, its configuration with overrides, and the search.

    Exit with status 2 and a message if the arguments are invalid.
    """
    presets = {name: (what, SweepJob(**_split(preset))) for name, (what, preset) in PRESETS.items()}
    job = tyro.extras.overridable_config_cli(
        presets, description=__doc__, args=rename_options(arguments), prog="jobs/tune.py"
    )
    sweep, preset = job.sweep, next(a for a in arguments if a in PRESETS)
    if not sweep.name:
        sweep = dataclasses.replace(sweep, name=invent_name(f"sweep-{preset}"))
    values = _split(job)
    del values["sweep"]
    return preset, Config(**values), sweep


def _split(config: Config) -> dict[str, Any]:
    return {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if a best model was found and registered."""
    preset, config, sweep = parse_arguments(arguments)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # The sweep reports its progress; only the older of Tune's two ways of printing can be silent.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Importing the platform takes seconds; a mistyped option should not.
    from efae.checkpoints.checkpoint import CheckpointError
    from efae.sweep.phase import Interrupted
    from efae.sweep.sweep import run_sweep

    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    again = f"nothing is lost: submit again with --sweep.name {sweep.name} to resume"
    server = Server.from_environment()
    try:
        with server.translating():
            found = run_sweep(config, sweep, server, say=lambda line: print(line, flush=True))
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt):
        print(f"stopped; {again}", file=sys.stderr)
        return 130
    print_summary(found, preset, config)
    return 0


def write_command(found: Mapping[str, Any], preset: str, config: Config) -> str:
    """Return the command that trains the best trial's configuration.

    Args:
        found: Content of sweep.json.
        preset: Name of the preset.
        config: The preset with the overrides of the command line.
    """
    from efae.sweep.space import list_overrides

    usual = flatten(PRESETS[preset][1])
    changed = {key: value for key, value in flatten(config).items() if value != usual[key]}
    changed |= list_overrides(found["best"]["config"], found["dim"])
    options = [write_option(k, v) for k, v in changed.items() if k not in OF_THE_SWEEP]
    return " ".join(["python jobs/train.py", preset, *options])


def print_summary(found: Mapping[str, Any], preset: str, config: Config) -> None:
    """Print what was found, and what to do next."""
    from efae.report.html import write_split

    best, cost, linear = found["best"], found["cost"], found["closed_form_split"]
    states = [trial["state"] for trial in found["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    report = "report/report.html among the artifacts of the sweep's run in MLflow"
    if report_folder := config.tracking.report_folder:
        report = f"{report_folder}/{found['sweep_name']}/report.html"
    values = ", ".join(f"{value:.2f}" for value in best["values"])
    split = "not measured"
    if linear:
        split = f"{write_split(linear['multiplicities'])} (A1+A2+B1+B2+E)"
        split += f", {linear['linear_psnr']:.2f} dB"
    combination = "".join(f"\n    {key} = {value}" for key, value in best["config"].items())
    print(
        f"""
{found["sweep_name"]}: {len(states)} trials ({counts}) in {cost["wall_seconds"] / 60:.1f} minutes,\
 {cost["steps"] / cost["full_steps"]:.0%} of the steps of all trials in full
  best (trial {best["key"]}){combination}
  {best["metric"]:<18} {best["value"]:.4g} over seeds {best["seeds"]} ({values})
  best linear split  {split}
  registered         {best["model_uri"]}, alias candidate

next:
  report     {report}
  train it   {write_command(found, preset, config)}
  promote    python jobs/promote.py --model {best["model_uri"]}
""",
        flush=True,
    )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
