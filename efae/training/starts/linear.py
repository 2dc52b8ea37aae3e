"""The start in closed form: linear paths set from a sample of the training images."""

import itertools
import math

from data_pipelines import ShardDataset
from efae.config import Config
from efae.model.closed_form import Moments, fit_linear_map, set_linear_paths
from efae.training.process import Process
from efae.training.state import TrainState

SAMPLE_PATCHES = 2**18
"""Least number of patches of the sample, if an epoch and MOST_IMAGES have as many."""
MOST_IMAGES = 2**14
"""Most images of the sample, up to a batch: where they have a few cells each, their patches are
still many more than a patch has values."""


def start_linear(
    state: TrainState, config: Config, dataset: ShardDataset, process: Process
) -> None:
    """Set the linear paths of a state before its first step, alike on every rank.

    Raises:
        ShardError: A shard or an image in it cannot be read.
        StorageError: The storage refuses or does not answer.
    """
    moments = measure_moments(config, dataset, process)
    side, representation = config.model.downsampling, state.model.representation
    # Computed once: other machines' linear algebra may round otherwise.
    fitted = fit_linear_map(moments, representation, side) if process.rank == 0 else None
    set_linear_paths(state.model, process.agree(fitted))
    state.average.load({name: p.detach() for name, p in state.model.named_parameters()})


def measure_moments(
    config: Config, dataset: ShardDataset, process: Process, patches: int = SAMPLE_PATCHES
) -> Moments:
    """Return the moments of the patches of the first batches, over all ranks.

    Sums are exact, so they are the same at every world size.

    Args:
        config: Configuration of the experiment.
        dataset: Training images.
        process: This process of the run.
        patches: Least number of patches, if an epoch and MOST_IMAGES have as many.
    """
    batch_size, side = config.training.global_batch_size, config.model.downsampling
    loader = dataset.loader(
        global_batch_size=batch_size,
        rank=process.rank,
        world_size=process.world_size,
        seed=config.training.seed,
        options=config.data,
        tail="carry",
    )
    cells = math.prod(config.data.image_size) // side**2
    count = min(math.ceil(patches / cells), len(dataset), MOST_IMAGES)
    moments = Moments.none(config.data.channels * side**2, process.device)
    batches = itertools.islice(loader, math.ceil(count / batch_size))
    for batch in batches:
        moments += Moments.of(batch.image.to(process.device), side)
    return moments.over_processes()
