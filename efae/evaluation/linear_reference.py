"""The best equivariant linear map to a latent of equal size: a reference for every model.

The map is fitted to the very images that it is measured on, so on them no equivariant linear map,
however trained, has less squared error. A model that does not beat it has learned nothing that a
matrix could not do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from efae.evaluation.measures import Totals, gather_json, psnr, ssim
from efae.evaluation.protocol import Tokenizer
from efae.model.autoencoder import Autoencoder
from efae.model.closed_form import (
    LARGEST_PATCH,
    LinearMap,
    Moments,
    choose_multiplicities,
    fit_linear_map,
)
from efae.symmetry import Representation

PATCHES_PER_CHANNEL = 128
"""Least number of patches, counted once per element of the group, for each channel of the latent.

On photographs, a map fitted to as many is at most 0.4 dB ahead of one fitted to other images; on an
eighth of them it can be several dB ahead."""


@dataclass(frozen=True)
class LinearReference:
    """Two linear maps: that of the model's representation, and that of the best split.

    Attributes:
        side: Side of a latent cell, in pixels.
        fitted: Best map to the representation of the model; to the best split for a foreign model,
            which has none.
        best: Best map over all splits of as many channels.
        multiplicities: Multiplicities of the best split.
    """

    side: int
    fitted: LinearMap
    best: LinearMap
    multiplicities: Mapping[str, int]

    def measure(self, image: Float[Tensor, "b c h w"], totals: Totals) -> None:
        """Measure the reconstructions of both maps, clamped like a model's."""
        reconstruction = self.fitted.reconstruct(image, self.side).clamp(-1, 1)
        totals.add("linear psnr", psnr(reconstruction, image))
        totals.add("linear ssim", ssim(reconstruction, image))
        reconstruction = self.best.reconstruct(image, self.side).clamp(-1, 1)
        totals.add("linear psnr of the best split", psnr(reconstruction, image))


@torch.no_grad()
def fit_linear_reference(
    model: Tokenizer, images: UInt8[Tensor, "n c h w"], device: torch.device, batch_size: int = 64
) -> LinearReference | None:
    """Fit the reference of a model to the images of all processes, which call this together.

    Args:
        model: Tokenizer in eval mode.
        images: This process's images, those that the model is measured on.
        device: Device to sum the moments on, that of the model.
        batch_size: Number of images per batch; does not affect the result.

    Returns:
        The same reference on every process; None if the images have fewer patches than
        PATCHES_PER_CHANNEL asks for, cells of the latent are not square, or their patches have
        more than LARGEST_PATCH values.
    """
    channels, height, width = images.shape[1:]
    # A whole batch: one image would be another shape, for which a compiled model is compiled anew.
    blank = torch.zeros(max(1, len(images[:batch_size])), channels, height, width, device=device)
    rows, columns = model.encode(blank).shape[-2:]
    side, group, dim = height // rows, model.group, model.representation.dim
    if (rows * side, columns * side) != (height, width) or channels * side**2 > LARGEST_PATCH:
        return None
    patches = sum(gather_json(len(images), device)) * rows * columns
    if patches * len(group) < PATCHES_PER_CHANNEL * dim:
        return None
    moments = Moments.none(channels * side**2, device)
    for start in range(0, len(images), batch_size):
        moments += Moments.of(images[start : start + batch_size].to(device), side)
    moments = moments.over_processes()
    chosen = choose_multiplicities(moments, group, dim, side, min(channels, dim))
    best = fit_linear_map(moments, Representation(group, **chosen), side)
    fitted = best
    if isinstance(model, Autoencoder):
        fitted = fit_linear_map(moments, model.representation, side)
    return LinearReference(side, fitted, best, chosen)
