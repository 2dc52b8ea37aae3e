"""Make an autoencoder of diffusers equivariant, and register it.

    python jobs/finetune.py fine_tune --start.model diffusers:/models/sdxl-vae --output my-vae
    ray job submit --working-dir . -- python jobs/finetune.py fine_tune --start.model ...

The job is that of jobs/train.py, with the presets that start from an autoencoder, local or remote:
AutoencoderKL, AutoencoderTiny or AutoencoderDC. --output receives a folder of the same class,
which pipelines load without this package.
"""

import sys
from importlib import import_module

from data_pipelines.commands import run_command
from efae.presets import PRESETS

# A script finds its neighbours as modules of their own, not as parts of a package.
train = import_module("jobs.train" if __package__ else "train")
FINE_TUNING = {name: p for name, p in PRESETS.items() if p[1].model.kind == "diffusers"}


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if a model was fine-tuned and registered."""
    config = train.parse_arguments(arguments, FINE_TUNING, __doc__, "jobs/finetune.py")
    return train.run(config)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
