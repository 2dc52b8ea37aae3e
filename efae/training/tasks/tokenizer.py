"""Training of a tokenizer: an autoencoder of images."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_pipelines import ShardDataset
from efae.config import Config
from efae.evaluation.held_out import read_held_out
from efae.model.autoencoder import Autoencoder
from efae.model.fine_tuning import FineTuning
from efae.model.objective import Draws, Objective, Perceptual, draw, load_perceptual
from efae.tracking.server import Server
from efae.training.process import Process
from efae.training.starts.distillation import make_sampler
from efae.training.starts.linear import start_linear
from efae.training.starts.source import (
    check_start,
    copy_source,
    describe_source,
    has_source,
    load_source,
    needs_source,
    start_from,
)
from efae.training.state import TrainState
from efae.training.validation import Validation

if TYPE_CHECKING:  # with image decoders, which benchmarks/gpu does without
    from data_pipelines.loading.batch import Batch


class TokenizerTask:
    """See `Task`.

    Args:
        config: Configuration of the experiment.
    """

    members: tuple[str, ...] = ()

    def __init__(self, config: Config):
        self._config = config

    def check_source(self, source: Autoencoder | None, begins: bool) -> None:
        config = self._config
        if source is None and (needs_source(config) or (begins and has_source(config))):
            uri = config.flow.distill_from or config.start.model
            raise ValueError(f"{uri}: load the model, and train with Start(source=model)")
        if source is not None and begins and config.start.model and not config.start.is_diffusers:
            check_start(config, source.config)

    def begin(
        self, state: TrainState, dataset: ShardDataset, process: Process, source: Autoencoder | None
    ) -> None:
        if source is not None:
            start_from(state, source)
        elif self._config.model.has_linear_start:
            start_linear(state, self._config, dataset, process)

    def build_objective(
        self, model: Autoencoder, process: Process, source: Autoencoder | None
    ) -> Objective | FineTuning:
        """Return the loss around the model.

        Raises:
            ValueError: There is no such perceptual loss.
        """
        config = self._config
        perceptual = choose_perceptual(config, process.device)
        if not model.has_flow:
            anchored = config.start.anchor_weight > 0
            return FineTuning(model, perceptual, source if anchored else None)
        if source is None or not config.flow.distill_from:
            return Objective(model, perceptual)
        return Objective(model, perceptual, make_sampler(source, config, process))

    def draw(self, batch: "Batch", generator: torch.Generator) -> tuple[Tensor, Draws]:
        image = batch.image.to(generator.device, non_blocking=True)
        return image, draw(self._config, tuple(image.shape), generator)

    def copy_source(self, server: Server) -> dict[str, str]:
        copy_source(self._config, server)
        return describe_source(self._config)

    def load_source(self, process: Process, begins: bool) -> Autoencoder | None:
        starts = has_source(self._config) and begins
        if starts or needs_source(self._config):
            return load_source(self._config, process)
        return None

    def make_validation(
        self, process: Process, show: Callable[[Path, str], None] | None
    ) -> Validation:
        return Validation(
            read_held_out(self._config.data, self._config.training.validation_images),
            process.device,
            process.rank,
            process.world_size,
            self._config.training.evaluation_precision,
            show,
        )


def choose_perceptual(config: Config, device: torch.device) -> Perceptual | None:
    """Return the perceptual loss that the configuration names, on the device; None for none.

    Raises:
        ValueError: There is no such function, or the file holds other weights.
    """
    if config.loss.lpips_weights:
        from efae.evaluation.lpips_fid import Lpips  # torchmetrics takes two seconds

        lpips = Lpips(Path(config.loss.lpips_weights)).to(device)
        return lambda predicted, image: lpips(predicted, image)
    return load_perceptual(config.loss.perceptual, device) if config.loss.perceptual else None
