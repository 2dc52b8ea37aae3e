"""Train a generator of latents, or draw images with one.

    python jobs/generate.py train generate_quickstart --data.uri s3://efae-data/openmoji-32-latents
    python jobs/generate.py sample --model models:/efae-generator@champion \
        --count 1000 --output s3://efae-data/drawn
    ray job submit --working-dir . -- python jobs/generate.py train generate_quickstart

`train` takes latents that jobs/encode.py made; its options are listed by `train PRESET --help`. The
same --tracking.run-name resumes a run. `sample` decodes with the tokenizer that the latents name;
the same command resumes an interrupted sampling. Addresses come from the environment
(`source .local/env` for the local stack).
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import tyro

from data_pipelines.commands import run_command
from efae.generator_config import GeneratorConfig
from efae.latents.sample_request import SampleRequest
from efae.presets import GENERATORS
from efae.tracking.server import Server

# A script finds its neighbours as modules of their own, not as parts of a package.
jobs_train = import_module("jobs.train" if __package__ else "train")
_PROGRAM = "jobs/generate.py"


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if its work is done."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("train", "sample"))
    chosen, rest = parser.parse_args(arguments[:1]), arguments[1:]
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if chosen.action == "train":
        config = jobs_train.parse_arguments(rest, GENERATORS, __doc__, f"{_PROGRAM} train")
        return train(config)
    request = tyro.cli(SampleRequest, description=__doc__, args=rest, prog=f"{_PROGRAM} sample")
    return sample(request)


def train(config: GeneratorConfig) -> int:
    """Train a generator; return 0 only if it was registered."""
    # Importing the platform takes seconds; a mistyped option should not.
    from efae.generator_experiment import run_generator
    from efae.ray_trainer import TrainingFailed

    try:
        facts = run_generator(
            config, Server.from_environment(), say=lambda line: print(line, flush=True)
        )
    except (ValueError, OSError, TrainingFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_facts(facts)
    return 0


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print what happened, and what to do next."""
    held_out = ""
    if "held_out_loss" in facts:
        held_out = f"\n  held-out loss      {facts['held_out_loss']:.4f}"
    bad_samples = f", bad latents replaced: {bad}" if (bad := facts["bad_samples"]) else ""
    print(
        f"""
{facts["run_name"]}: {facts["steps"]} steps, {facts["images_seen"]} latents in\
 {facts["wall_seconds"] / 60:.1f} minutes, {facts["images_per_second"]:.0f} latents/s\
 (data wait {facts["data_wait_fraction"]:.1%}), recoveries: {facts["recoveries"]}\
{bad_samples}
  loss               {facts["loss"]:.4f}{held_out}
  registered         {facts["model_uri"]}

next:
  python {_PROGRAM} sample --model {facts["model_uri"]} --count 1000 --output FOLDER
""",
        flush=True,
    )


def sample(request: SampleRequest) -> int:
    """Draw images; return 0 only if the set is complete."""
    from data_pipelines.building.ray_tasks import TaskFailed
    from efae.latents.sample import locate_sheet, sample_set

    try:
        images, drawn = sample_set(request, say=lambda line: print(line, flush=True))
    except (ValueError, OSError, TaskFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{images.uri}: {len(images)} images, {drawn} of them drawn now; {locate_sheet(images)}")
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
