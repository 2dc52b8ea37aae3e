"""The split in closed form: which representation the best linear map of the images would have."""

from typing import Any

import torch

from data_pipelines import ShardDataset
from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.held_out import read_held_out
from efae.evaluation.measures import psnr, to_float
from efae.model.closed_form import LARGEST_PATCH, choose_multiplicities, fit_linear_map
from efae.model.representation import build_representation
from efae.symmetry import Representation
from efae.training.process import Process
from efae.training.starts.linear import measure_moments

SAMPLE_PATCHES = 2**16
"""Least number of patches of the sample, as for the start: seconds on one CPU."""


def find_closed_form_split(config: Config) -> dict[str, Any] | None:
    """Find the split whose linear map reconstructs a sample of the training images best.

    Args:
        config: Configuration that every trial starts from.

    Returns:
        "multiplicities" by irrep, and "linear_psnr", the PSNR of the map on held-out images; None
        if a patch has more than LARGEST_PATCH values.

    Raises:
        ShardError: A shard or an image in it cannot be read.
        StorageError: The storage refuses or does not answer.
    """
    side, group = config.model.downsampling, build_representation(config).group
    dim, colours = config.representation.dim, config.data.channels
    if colours * side**2 > LARGEST_PATCH:
        return None
    images = with_overrides(config, {"data.pixel_cache_bytes": 0})
    dataset = ShardDataset.open(config.data.uri)
    moments = measure_moments(images, dataset, Process(torch.device("cpu")), SAMPLE_PATCHES)
    chosen = choose_multiplicities(moments, group, dim, side, min(colours, dim))
    fitted = fit_linear_map(moments, Representation(group, **chosen), side)
    held_out = read_held_out(config.data, config.training.held_out_images)
    scores: list[torch.Tensor] = []
    for start in range(0, len(held_out), 64):
        image = to_float(held_out[start : start + 64])
        scores.append(psnr(fitted.reconstruct(image, side).clamp(-1, 1), image))
    return {"multiplicities": chosen, "linear_psnr": float(torch.cat(scores).mean())}
