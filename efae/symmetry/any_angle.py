"""Rotations by any angle, for images and for latents whose representation extends to O(2).

Angles are in radians, counter-clockwise like `torch.rot90`. A channel of charge m is a complex
field u: a rotation by theta multiplies it by e^{i m theta}, and h conjugates it. The irreps of D4
extend to all rotations as follows:

    irreps    charge   u             transforms like (x to the right, y up)
    A1, A2    0        a             1; rotations leave it unchanged
    E         1        y - i x       the vector (x, y)
    B1 + B2   2        b1 + i b2     x^2 - y^2 and 2 x y: one of each makes a plane

Channels rotate exactly, up to rounding. A grid of pixels or cells does not: it is resampled, and
only the inscribed disk keeps its content.
"""

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from efae.symmetry.group import C4, D4
from efae.symmetry.representation import Representation

# Samples per pixel and axis before bicubic interpolation. Odd, so that the centre of a pixel stays
# a sample and quarter turns are exact.
_OVERSAMPLING = 3


def check_turns_by_any_angle(representation: Representation) -> None:
    """Raise unless the representation extends from quarter turns to all rotations.

    Raises:
        ValueError: The group has no quarter turns, or B1 and B2 do not pair into planes.
    """
    group, counts = representation.group, representation.multiplicities
    if D4["rot90"] not in group.elements:
        raise ValueError(
            f"{representation} cannot turn by any angle: group {group} has no quarter turns;"
            f" use {D4} or {C4}"
        )
    b1, b2 = counts["b1"], counts["b2"]
    # Without mirrors B1 and B2 are one irrep, so any two of them make a plane.
    has_mirrors = any(element.mirrored for element in group)
    if b1 != b2 if has_mirrors else (b1 + b2) % 2:
        remedy = "as many B1 as B2" if has_mirrors else "an even number of B1 and B2 together"
        raise ValueError(
            f"{representation} cannot turn by any angle: b1={b1} and b2={b2} do not pair into"
            f" planes of charge 2; set representation.multiplicities to {remedy}"
        )


def act_by_angle(
    representation: Representation,
    angle: float | Float[Tensor, "batch"],
    latent: Float[Tensor, "batch dim height width"],
) -> Float[Tensor, "batch dim height width"]:
    """Rotate a latent, out of place: (R z)(p) = rho(R) z(R^-1 p).

    At quarter turns this equals `Representation.act`.

    Args:
        representation: Representation that `check_turns_by_any_angle` accepts.
        angle: Radians counter-clockwise, one for all or one per example on the latent's device.
        latent: Square grid of channel vectors in the basis of the irreps; on a 1x1 grid only the
            channels rotate.

    Raises:
        ValueError: The representation does not extend to all rotations, or the latent is not a
            square grid with its channels.
    """
    check_turns_by_any_angle(representation)
    if latent.ndim != 4 or latent.shape[1] != representation.dim:
        raise ValueError(
            f"latent of shape {tuple(latent.shape)}: expected (batch, {representation.dim}, h, w)"
        )
    angles = _per_example(angle, latent)
    turned = _turn_channels(representation, angles, latent)
    return turned if turned.shape[-2:] == (1, 1) else rotate_image(turned, angles)


def rotate_image(
    image: Float[Tensor, "batch channels height width"], angle: float | Float[Tensor, "batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Rotate an image counter-clockwise about its centre; at quarter turns, as `torch.rot90` does.

    The image, mirrored at its edges, is a sum of cosines (DCT-II). Frequencies that the rotation
    would carry past the Nyquist frequency of an axis are dropped (none at quarter turns). The rest
    are evaluated on a grid three times as fine, where the error of bicubic interpolation is small.
    Only pixels inside `disk_mask` show the image; the corners show its mirrored continuation.
    Differentiable. Computes in float32 or wider, also under autocast.

    Args:
        image: Square images.
        angle: Radians, one for all or one per example on the image's device.

    Raises:
        ValueError: The image is not square.
    """
    if image.ndim != 4 or image.shape[-1] != image.shape[-2]:
        raise ValueError(
            f"image of shape {tuple(image.shape)}: only a square (batch, c, s, s) can turn by any"
            " angle; pad or crop it"
        )
    dtype = torch.promote_types(image.dtype, torch.float32)
    angles = _per_example(angle, image)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    with torch.autocast(image.device.type, enabled=False):
        rotated = F.grid_sample(
            _oversample(image.to(dtype), cosine, sine),
            _source_points(image.shape[-1], cosine, sine),
            mode="bicubic",
            padding_mode="reflection",
            align_corners=False,
        )
    return rotated.to(image.dtype)


@functools.cache
@torch.inference_mode(False)
def disk_mask(
    height: int, width: int, edge: float = 0.0, device: torch.device | str = "cpu"
) -> Float[Tensor, "height width"]:
    """Return float32 weights in [0, 1] of the inscribed disk, 0 outside; cached, do not modify.

    The mask is exactly symmetric under every flip and quarter turn that the grid allows.

    Args:
        height: Height of the grid, pixels.
        width: Width of the grid, pixels.
        edge: Pixels over which the weight rises from 0 at the rim to 1; 0 makes a hard mask of the
            pixels whose centre lies in the disk.
        device: Device of the mask.
    """
    # In half pixels, and on the CPU, so that a mask is the same on every device.
    x, y = (2 * torch.arange(side, device="cpu") + 1 - side for side in (width, height))
    squared = y[:, None] ** 2 + x**2
    side = min(height, width)
    if edge == 0:
        return (squared <= side**2).float().to(device)
    return ((side - squared.double().sqrt()) / (2 * edge)).clamp(0, 1).float().to(device)


def _per_example(angle: float | Tensor, like: Tensor) -> Float[Tensor, "batch"]:
    """Return one angle per example, in float64: the group law holds only as precisely as theta."""
    if not isinstance(angle, Tensor):
        return torch.full((len(like),), angle, dtype=torch.float64, device=like.device)
    if angle.shape != (len(like),):
        raise ValueError(f"angles of shape {tuple(angle.shape)} for {len(like)} examples")
    return angle.to(like.device, torch.float64)


def _turn_channels(representation: Representation, angles: Tensor, latent: Tensor) -> Tensor:
    """Apply rho(R) at every cell, by slices: no table to copy to the device, no host sync."""
    counts = representation.multiplicities
    dtype = torch.promote_types(latent.dtype, torch.float32)
    fixed, pairs, planes = counts["a1"] + counts["a2"], counts["b1"] + counts["b2"], counts["e"]
    channels = latent.to(dtype)
    charge_0, charge_2, charge_1 = torch.split(channels, [fixed, pairs, 2 * planes], dim=1)

    def turn(x: Tensor, y: Tensor, charge: int) -> tuple[Tensor, Tensor]:
        phase = (charge * angles).view(-1, 1, 1, 1)
        cosine, sine = phase.cos().to(dtype), phase.sin().to(dtype)
        return cosine * x - sine * y, sine * x + cosine * y

    # All B1 channels come before all B2 channels, so the two of a plane lie half the block apart;
    # the channels of E are stored plane by plane.
    doubled = turn(*torch.tensor_split(charge_2, 2, dim=1), charge=2)
    vectors = torch.stack(turn(charge_1[:, 0::2], charge_1[:, 1::2], charge=1), 2).flatten(1, 2)
    return torch.cat([charge_0, *doubled, vectors], 1).to(latent.dtype)


@functools.cache
@torch.inference_mode(False)
def _cosine_transforms(side: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the DCT-II (frequency, pixel) and its inverse (point, frequency) on the fine grid."""
    fine = torch.arange(_OVERSAMPLING * side, dtype=torch.float64, device="cpu")
    frequency = fine[:side]
    pixels = (frequency + 0.5) / side
    points = (fine + 0.5) / _OVERSAMPLING / side
    weights = torch.full_like(frequency, 2 / side)
    weights[0] = 1 / side
    analysis = weights[:, None] * torch.cos(math.pi * frequency[:, None] * pixels)
    synthesis = torch.cos(math.pi * points[:, None] * frequency)
    return analysis.to(device, dtype), synthesis.to(device, dtype)


def _oversample(image: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Band-limit the image and evaluate it at `_OVERSAMPLING` points per pixel along each axis."""
    side = image.shape[-1]
    analysis, synthesis = _cosine_transforms(side, image.device, image.dtype)
    spectrum = analysis @ image @ analysis.T
    frequency = torch.arange(side, device=image.device, dtype=image.dtype)
    along, across = (part.abs().view(-1, 1, 1, 1) * frequency for part in (cosine, sine))
    # A product of cosines contains all four frequencies (+-f, +-f'). `reach` is the largest
    # coordinate that any of them has after the rotation.
    reach = torch.maximum(along + across.mT, across + along.mT)
    kept = (side - reach + 0.5).clamp(0, 1)
    return synthesis @ (spectrum * kept) @ synthesis.T


def _source_points(side: int, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return R^-1 p for every pixel p (batch, side, side, 2), with y down as in `grid_sample`."""
    centres = (2 * torch.arange(side, device=cosine.device) + 1 - side).to(cosine.dtype) / side
    cosine, sine = cosine.view(-1, 1, 1), sine.view(-1, 1, 1)
    x, y = centres, centres[:, None]
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)
