"""Train a generator of latents, draw images with one, or measure the images.

    python jobs/generate.py train generate_quickstart --data.uri s3://efae-data/openmoji-32-latents
    python jobs/generate.py sample --model models:/efae-generator@champion \
        --count 1000 --output s3://efae-data/drawn
    python jobs/generate.py compare --samples s3://efae-data/drawn \
        --reference s3://efae-data/openmoji-32/train
    ray job submit --working-dir . -- python jobs/generate.py train generate_quickstart

`train` takes latents that jobs/encode.py made; its options are listed by `train PRESET --help`. The
same --tracking.run-name resumes a run. `sample` decodes with the tokenizer that the latents name;
the same command resumes an interrupted sampling. `compare` measures FID, sFID, Inception score,
precision and recall against real images, and records FID on the registered generator of the
samples. Addresses come from the environment (`source .local/env` for the local stack).
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
from efae.config import GeneratorConfig
from efae.latents.sample_request import CompareRequest, SampleRequest
from efae.presets import GENERATORS
from efae.tracking.redaction import redact
from efae.tracking.server import Server

# A script finds its neighbours as modules of their own, not as parts of a package.
jobs_train = import_module("jobs.train" if __package__ else "train")
_PROGRAM = "jobs/generate.py"
_MEASURES = ("FID", "sFID", "Inception score", "precision", "recall")


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if its work is done."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("train", "sample", "compare"))
    chosen, rest = parser.parse_args(arguments[:1]), arguments[1:]
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if chosen.action == "train":
        config = jobs_train.parse_arguments(rest, GENERATORS, __doc__, f"{_PROGRAM} train")
        return train(config)
    if chosen.action == "compare":
        sets = tyro.cli(CompareRequest, description=__doc__, args=rest, prog=f"{_PROGRAM} compare")
        return compare(sets)
    request = tyro.cli(SampleRequest, description=__doc__, args=rest, prog=f"{_PROGRAM} sample")
    return sample(request)


def train(config: GeneratorConfig) -> int:
    """Train a generator; return 0 only if it was registered."""
    # Importing the platform takes seconds; a mistyped option should not.
    from efae.experiment.generator import run_generator
    from efae.ray_trainer import TrainingFailed

    server = Server.from_environment()
    try:
        with server.translating():
            facts = run_generator(config, server, say=lambda line: print(line, flush=True))
    except (ValueError, OSError, TrainingFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = f"--tracking.run-name {config.tracking.run_name}"
        print(f"stopped; the same command with {again} resumes", file=sys.stderr)
        return 130
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
 {facts["wall_seconds"] / 60:.1f} minutes, {facts["images_per_second"]:.0f} latents/s in training\
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


def compare(request: CompareRequest) -> int:
    """Measure a set of samples; return 0 only if the report was written."""
    from tqdm import tqdm

    from data_pipelines.storage import Location
    from efae.latents.compare import FILE, compare_sets, record_fid

    try:
        report = compare_sets(
            request,
            say=lambda line: print(line, flush=True),
            progress=lambda items, what: tqdm(items, what, disable=not sys.stderr.isatty()),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    print_comparison(report)
    print(f"report: {Location.parse(request.output) / FILE}")
    try:
        if version := record_fid(report, Server.from_environment()):
            print(f"FID recorded on {version.uri}, for python jobs/promote.py --model")
    except (ValueError, OSError) as error:
        print(f"warning: FID is not recorded on the generator: {error}", file=sys.stderr)
    return 0


def print_comparison(report: Mapping[str, Any]) -> None:
    """Print the measures, each with the network whose features it compares."""
    for name in ("samples", "reference"):
        facts = report[name]
        images = f", {facts['images']} images" if "images" in facts else ""
        moments = ", stored moments" if facts.get("stored_moments") else ""
        print(f"{name:16}  {redact(facts['uri'])}{images}{moments}")
    print(f"{'compared':16}  {report['features']}")
    if near := report["precision_recall_images"]:
        print(f"{'':16}  precision and recall: of {near} images of each set")
    for name in _MEASURES:
        value = report[name.lower().replace(" ", "_")]
        number = "-" if value is None else f"{value:.3f}"
        print(f"{name:16}  {number:>10}  {report['network']}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
