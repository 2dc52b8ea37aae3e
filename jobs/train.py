"""Train an equivariant flow autoencoder and register it.

    python jobs/train.py quickstart
    python jobs/train.py quickstart --optimizer.learning-rate 3e-3 --training.steps 2000
    ray job submit --working-dir . -- python jobs/train.py quickstart

Addresses come from the environment (`source .local/env` for the local stack): RAY_ADDRESS,
MLFLOW_TRACKING_URI, AWS_*. The same --tracking.run-name resumes that run, unless --resume never;
--resume URI starts a new run from a checkpoint of another.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import tyro

from data_pipelines.commands import run_command
from efae.config import Config
from efae.config.forms import rename_options
from efae.names import invent_name
from efae.presets import PRESETS
from efae.tracking.server import Server

EVENTS_SHOWN = 12


def parse_arguments(
    arguments: list[str],
    presets: Mapping[str, tuple[str, Config]] = PRESETS,
    description: str | None = __doc__,
    program: str = "jobs/train.py",
) -> Config:
    """Return the preset with the command line's overrides; exit with status 2 if invalid."""
    config = tyro.extras.overridable_config_cli(
        dict(presets), description=description, args=rename_options(arguments), prog=program
    )
    if config.tracking.run_name:
        return config
    name = invent_name(next((a for a in arguments if a in presets), "run"))
    return dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, run_name=name))


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if a model was trained and registered."""
    return run(parse_arguments(arguments))


def run(config: Config) -> int:
    """Run one experiment; return 0 only if a model was trained and registered."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Importing the platform takes seconds; a mistyped option should not.
    from efae.checkpoints.checkpoint import CheckpointError
    from efae.experiment.tokenizer import run_experiment
    from efae.ray_trainer import TrainingFailed

    server = Server.from_environment()
    try:
        with server.translating():
            summary = run_experiment(config, server, say=lambda line: print(line, flush=True))
    except (ValueError, OSError, CheckpointError, TrainingFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = f"--tracking.run-name {config.tracking.run_name}"
        print(f"stopped; the same command with {again} resumes", file=sys.stderr)
        return 130
    print_summary(summary, config)
    return 0


def print_summary(summary: Mapping[str, Any], config: Config) -> None:
    """Print what happened, and what to do next."""
    from efae.report.card import advise_on_linear_map

    report_folder = config.tracking.report_folder
    report = "report/report.html among the run's artifacts in MLflow"
    if report_folder:
        report = f"{report_folder}/{summary['run_name']}/report.html"
    events = ""
    if len(summary["events"]) > 1:  # more than the start of the workers
        events = "".join(f"\n  {line}" for line in summary["events"][-EVENTS_SHOWN:])
    busy = ""
    if summary.get("flop_utilization"):
        busy = (
            f", MFU {summary['flop_utilization']:.0%}"
            f" ({summary['flop_utilization_as_dense']:.0%} counted as dense)"
        )
    copy = f"\n  copy               {config.output}" if config.output else ""
    linear = ""
    if summary["linear_psnr"] is not None:
        linear = (
            f"\n  best linear map    {summary['linear_psnr']:.2f} dB, to a latent of equal size"
        )
    warning = f"\nwarning: {advice}\n" if (advice := advise_on_linear_map(summary, config)) else ""
    bad_samples = f", bad images replaced: {bad}" if (bad := summary["bad_samples"]) else ""
    print(
        f"""
{summary["run_name"]}: {summary["steps"]} steps, {summary["images_seen"]} images in\
 {summary["wall_seconds"] / 60:.1f} minutes, {summary["images_per_second"]:.0f} images/s in\
 training{busy} (data wait {summary["data_wait_fraction"]:.1%}), recoveries:\
 {summary["recoveries"]}{bad_samples}{events}
  held-out PSNR      {summary["psnr"]:.2f} dB{linear}
  worst gap          {summary["worst_gap_db"]:.1e} dB over {config.representation.group}
  group-law error    {summary["group_law_error"]:.1e}
  registered         {summary["model_uri"]}{copy}
{warning}
next:
  report     {report}
  use        efae.load("{summary["model_uri"]}")
""",
        flush=True,
    )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
