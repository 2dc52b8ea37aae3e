"""Check all that a training run needs, without training; exit status 0 only if it can begin.

    python jobs/preflight.py quickstart
    ray job submit --working-dir . -- python jobs/preflight.py imagenet_256 --ray.num-workers 16

Takes the presets and overrides of jobs/train.py, which runs the same checks before training.
Addresses come from the environment (`source .local/env` for the local stack).
"""

import dataclasses
import logging
import sys

import tyro

from data_pipelines.commands import run_command
from efae.config import Config
from efae.config_forms import rename_options
from efae.presets import PRESETS
from efae.tracking.server import Server


def parse_arguments(arguments: list[str]) -> Config:
    """Return the preset with the command line's overrides; exit with status 2 if invalid."""
    config = tyro.extras.overridable_config_cli(
        PRESETS, description=__doc__, args=rename_options(arguments), prog="jobs/preflight.py"
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

    try:
        outcomes = run_preflight(
            adopt_pretrained(config),
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
