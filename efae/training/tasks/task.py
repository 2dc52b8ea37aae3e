"""What a kind of model asks of a run; everything else of a run is the same for all."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from data_pipelines import ShardDataset
from efae.model.autoencoder import Autoencoder
from efae.model.objective import BatchDraws
from efae.tracking.server import Server
from efae.training.process import Process
from efae.training.state import TrainState

if TYPE_CHECKING:  # with image decoders, which benchmarks/gpu does without
    from data_pipelines.loading.batch import Batch


class Measurement(Protocol):
    """A validation of the averaged weights."""

    def measure(self, state: TrainState) -> dict[str, float]:
        """Return measures by name; all ranks call it together."""
        ...


class Task(Protocol):
    """One kind of model in training: its data, start, loss and validation."""

    members: tuple[str, ...]
    """Extensions of the sample members that batches hold beside the images or latents."""

    def check_source(self, source: Autoencoder | None, begins: bool) -> None:
        """Raise a ValueError if training needs another model, and it is not there.

        Args:
            source: Model that the run starts from.
            begins: Whether the run begins at step 0.
        """
        ...

    def begin(
        self, state: TrainState, dataset: ShardDataset, process: Process, source: Autoencoder | None
    ) -> None:
        """Set what the seed does not: weights of a state before its first step."""
        ...

    def build_objective(
        self, model: Any, process: Process, source: Autoencoder | None
    ) -> nn.Module:
        """Return the loss around the model: (values, draws) -> loss and t of each example."""
        ...

    def draw(self, batch: "Batch", generator: torch.Generator) -> tuple[Tensor, BatchDraws]:
        """Return a batch's images or latents on the generator's device, and all that is random."""
        ...

    def copy_source(self, server: Server) -> dict[str, str]:
        """Copy another model that the run needs into its folder, where workers read it.

        Returns:
            Parameters for the MLflow run that say which model it starts from, if any.
        """
        ...

    def load_source(self, process: Process, begins: bool) -> Autoencoder | None:
        """Load the model that this process needs for the start or for every step, if any."""
        ...

    def make_validation(
        self, process: Process, show: Callable[[Path, str], None] | None
    ) -> Measurement:
        """Return the validation of one rank.

        Args:
            process: This process.
            show: Function that takes a PNG file, which is removed afterwards, and a name for it.
        """
        ...
