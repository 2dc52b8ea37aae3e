"""What rotations by any angle cost a tokenizer: encoder error and PSNR, angle by angle."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from efae.symmetry import Representation
from efae.symmetry.rotation import act_by_angle, disk_mask, rotate_image


class Tokenizer(Protocol):
    """What is measured; latents come in the basis of the representation's irreps."""

    @property
    def representation(self) -> Representation: ...

    def encode(self, image: Tensor, /) -> Tensor: ...

    def decode(self, latent: Tensor, /, *, noise: Tensor) -> Tensor: ...


def masked_psnr(
    image: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"], mask: Float[Tensor, "h w"]
) -> Float[Tensor, "b"]:
    """Peak signal to noise ratio per example where the mask is, dB; the range is 2.

    20 log10(2) - 10 log10(sum m d^2 / sum m), as EQ-R of StyleGAN3 (Karras et al. 2021,
    arXiv:2106.12423) with the range fixed.
    """
    error = (mask * (image - other).square()).sum((1, 2, 3)) / (mask.sum() * image.shape[1])
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


@torch.no_grad()
def measure_rotations(
    tokenizer: Tokenizer,
    images: Float[Tensor, "n c h w"],
    angles_degrees: Sequence[float] = (15, 30, 45, 60, 75),
    *,
    seed: int = 0,
    batch_size: int = 128,
) -> dict[float, dict[str, float]]:
    """Measure R = rotation by each angle, inside the inscribed disk; 0 is always measured too.

    Args:
        tokenizer: in eval mode, with a representation that turns by any angle.
        images: square, in [-1, 1], on the tokenizer's device.
        angles_degrees: counter-clockwise.
        seed: of the noise that decoding starts from. All angles start from the same noise, not
            from rotated noise: interpolation would leave it neither white nor of unit variance.
        batch_size: images at a time.

    Returns:
        For each angle in degrees:
            encoder_error: E |E(Rx) - rho(R) E(x)|^2 / Var E(x), over cells inside the disk.
            psnr: of D(rho(R) E(x)) against Rx, dB, mean over images.
            gap_db: psnr at angle 0 minus this one.
            resampling_floor_db: psnr of R^-1 R x against x, what two resamplings alone cost.

    Raises:
        ValueError: the images are not square, or the representation does not extend.
    """
    batches = torch.split(images, batch_size)
    latents = [tokenizer.encode(image) for image in batches]
    noises = [
        torch.randn(image.shape, generator=torch.Generator().manual_seed(seed + i)).to(image.device)
        for i, image in enumerate(batches)
    ]
    mask = disk_mask(images.shape[-2], images.shape[-1], device=images.device)
    cells = disk_mask(latents[0].shape[-2], latents[0].shape[-1], device=images.device)
    spread = (cells * torch.cat(latents).var(0)).sum()
    measured: dict[float, dict[str, float]] = {}
    for degrees in (0.0, *(float(angle) for angle in angles_degrees if angle != 0)):
        angle = math.radians(degrees)
        errors: list[Tensor] = []
        scores: list[Tensor] = []
        floors: list[Tensor] = []
        for image, latent, noise in zip(batches, latents, noises, strict=True):
            turned = rotate_image(image, angle).clamp(-1, 1)
            moved = act_by_angle(tokenizer.representation, angle, latent)
            difference = tokenizer.encode(turned) - moved
            errors.append((cells * difference.square()).sum((1, 2, 3)))
            sample = tokenizer.decode(moved, noise=noise).clamp(-1, 1)
            scores.append(masked_psnr(sample, turned, mask))
            floors.append(masked_psnr(rotate_image(turned, -angle).clamp(-1, 1), image, mask))
        measured[degrees] = {
            "encoder_error": _mean(errors) / max(float(spread), 1e-12),
            "psnr": _mean(scores),
            "resampling_floor_db": _mean(floors),
        }
    base = measured[0.0]["psnr"]
    return {angle: {**found, "gap_db": base - found["psnr"]} for angle, found in measured.items()}


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())
