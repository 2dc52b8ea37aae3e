"""The command `python -m benchmarks.downstream`; the package describes it."""

from typing import Annotated, Literal

import torch
import tyro

import benchmarks.downstream as package
from benchmarks.downstream import prediction, symmetry
from benchmarks.downstream.study import Settings, Study, say


def main() -> None:
    """Run what is missing of a study, and print its tables."""

    def run(
        study: Annotated[Literal["symmetry", "prediction"], tyro.conf.Positional],
        settings: Annotated[Settings, tyro.conf.arg(name="")],
    ) -> None:
        torch.set_num_threads(1)
        chosen = {"symmetry": symmetry, "prediction": prediction}[study]
        chosen.print_tables(chosen.compare(Study(study, settings, say)))

    tyro.cli(run, description=package.__doc__)


if __name__ == "__main__":
    main()
