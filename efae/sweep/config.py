"""All settings of a sweep: its space, method and length."""

from typing import Literal, get_args

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from efae.config.rules import require, require_name, require_positive
from efae.names import LONGEST_BYTES

Objective = Literal[
    "psnr",
    "held_out_loss",
    "worst_gap_db",
    "latent_size",
    "velocity_irreducible_variance",
    "spectral_energy_concentration",
    "local_distant_similarity",
    "spectral_slope_gap",
]
OF_GRIDS = ("spectral_energy_concentration", "local_distant_similarity", "spectral_slope_gap")
"""Objectives that need a grid of several latent cells."""
OBJECTIVES: dict[Objective, Literal["max", "min"]] = {
    name: "max" if name in ("psnr", "local_distant_similarity") else "min"
    for name in get_args(Objective)
}
"""Objectives and their direction: PSNR of held-out reconstructions in dB, flow loss on held-out
images, largest gap over the group in dB, numbers in the latent of an image, and the numbers of
efae/evaluation/diffusability.py."""
VALIDATED = tuple(name for name in OBJECTIVES if name != "latent_size")
"""Objectives that validations measure."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid", hide_input_in_errors=True))
class SweepConfig:
    """Settings of a search over the configuration; every trial is a separate run."""

    name: str = ""
    """Name of the sweep; by default the preset, the time and random digits. The same name
    resumes the sweep."""
    space: str = "split"
    """Space to search: split (representation.rotation_dims and .chirality_split at a fixed latent
    size), split_and_rate (with the learning rate), multiplicities (all five), or a TOML file with
    lines such as "model.hidden_size" = {choices = [96, 192]}, see docs/sweeps.md."""
    search: Literal["optuna", "random", "grid"] = "optuna"
    """Choice of combinations: Optuna's TPE, at random, or all in order."""
    objectives: tuple[Objective, ...] = ("psnr",)
    """Objectives of the search; the first decides, several give a Pareto front."""
    trials: int = 16
    """Maximum number of trials; a grid stops earlier once a finite space is exhausted."""
    early_stopping: bool = True
    """Stop trials that are in the worse half at a rung (ASHA), by held-out PSNR, or by flow loss if
    that is the first objective."""
    first_rung: float = 0.25
    """Share of training.steps before a trial can be stopped; the next rungs are at twice that."""
    finalists: int = 3
    """Number of best trials to repeat with other seeds."""
    finalist_seeds: int = 1
    """Number of other seeds per finalist."""
    concurrency: int = 0
    """Number of concurrent trials; 0 for as many as the cluster has resources for."""
    seed: int = 0
    """Seed of the search; trials use training.seed."""

    @property
    def stops_by(self) -> Objective:
        """Metric that decides early stopping."""
        # Over 29 splits, PSNR after a quarter of the steps predicts the final order (rank
        # correlation 0.92), the flow loss does not (0.38). A small gap alone is worth nothing.
        return "held_out_loss" if self.objectives[0] == "held_out_loss" else "psnr"

    def __post_init__(self):
        if self.name:  # each trial's run is named NAME-NUMBER
            require_name("sweep.name", self.name, "/\\", LONGEST_BYTES - 10)
        require_positive("sweep", self, "trials")
        for name in ("finalists", "finalist_seeds", "concurrency", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"sweep.{name}={value}: must be >= 0")
        require(0 < self.first_rung < 1, f"sweep.first_rung={self.first_rung}: must be in (0, 1)")
        require(
            0 < len(self.objectives) == len(set(self.objectives)),
            f"sweep.objectives={self.objectives}: name one, or several different ones",
        )
