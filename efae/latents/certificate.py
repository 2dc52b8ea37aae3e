"""Certificate of a latent set: how exactly its encoder commutes with the group."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from efae.evaluation.measures import to_float
from efae.model.autoencoder import Autoencoder
from efae.model.precision import float32_arithmetic


@torch.no_grad()
def certify(model: Autoencoder, batches: Iterable[UInt8[Tensor, "b c h w"]]) -> dict[str, Any]:
    """Measure the largest |act(g, encode(x)) - encode(g x)|, over all numbers of all latents.

    Args:
        model: Model in evaluation mode; its latents have unit scale.
        batches: Batches of images, on the CPU.

    Returns:
        {"max_abs_difference": float, "by_element": {name: float}, "images": int,
        "precision": str}; and "tile": int, if the model has one;
        "symmetrized": True, if its encoder is averaged over the group; "compiled": True, if its
        blocks are compiled.

    Raises:
        ValueError: A latent is not finite.
    """
    device = next(model.parameters()).device
    worst = torch.zeros(len(model.group), device=device)
    count = 0
    for batch in batches:
        image = to_float(batch.to(device))
        with float32_arithmetic("fp32"):
            latent = model.encode(image)
            for number, element in enumerate(model.group):
                difference = model.act(element, latent) - model.encode(element.act_on_image(image))
                worst[number] = torch.maximum(worst[number], difference.abs().max())
        count += len(image)
    found = [float(value) for value in worst]
    by_element = {g.name: value for g, value in zip(model.group, found, strict=True)}
    if not bool(worst.isfinite().all()):
        raise ValueError("the model's latents are not finite: use an earlier checkpoint")
    return {
        "max_abs_difference": max(found),
        "by_element": by_element,
        "images": count,
        "precision": model.precision or "fp32",
        **({} if model.tile is None else {"tile": model.tile}),
        **({"symmetrized": True} if model.symmetrize else {}),
        **({"compiled": True} if model.compiled else {}),
    }
