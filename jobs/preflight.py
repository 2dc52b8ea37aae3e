"""Check all that a training run needs, without training; exit status 0 only if it can begin.

    python jobs/preflight.py quickstart
    ray job submit --working-dir . -- python jobs/preflight.py imagenet_256 --ray.num-workers 16
    python jobs/preflight.py generate_b --data.uri s3://efae-data/imagenet-256-latents

Takes the presets and overrides of jobs/train.py and of jobs/generate.py train, which run the same
checks before training.
Addresses come from the environment (`source .local/env` for the local stack).
"""

import dataclasses
import logging
import sys

import tyro

from data_pipelines.commands import run_command
from efae.config import AnyConfig, GeneratorConfig
from efae.config.forms import rename_options
from efae.presets import GENERATORS, PRESETS
from efae.tracking.server import Server


def parse_arguments(arguments: list[str]) -> AnyConfig:
    """Return the preset with the command line's overrides; exit with status 2 if invalid."""
    presets: dict[str, tuple[str, AnyConfig]] = {**PRESETS, **GENERATORS}
    config = tyro.extras.overridable_config_cli(
        presets, description=__doc__, args=rename_options(arguments), prog="jobs/preflight.py"
    )
    name = config.tracking.run_name or "preflight"
    return dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, run_name=name))


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if all checks passed."""
    config = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Importing the platform takes seconds; a mistyped option should not.
    from efae.preflight.cluster_checks import run_preflight
    from efae.preflight.driver_checks import RunData
    from efae.training.starts.source import adopt_pretrained
    from efae.training.tasks.generator import adopt_latents

    try:
        if isinstance(config, GeneratorConfig):
            config = adopt_latents(config)
        else:
            config = adopt_pretrained(config)
        outcomes = run_preflight(
            config,
            RunData(config.data),
            Server.from_environment(),
            say=lambda line: print(line, flush=True),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"all {len(outcomes)} checks passed")
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
