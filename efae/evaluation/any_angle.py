"""Errors of a tokenizer under rotations by any angle, inside the inscribed disk.

The protocol is that for group elements, except that every angle starts from the same noise:
interpolation would leave rotated noise neither white nor of unit variance.
"""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from efae.evaluation.measures import Totals, masked_psnr
from efae.evaluation.protocol import Tokenizer
from efae.model.autoencoder import Autoencoder
from efae.symmetry.any_angle import act_by_angle, check_turns_by_any_angle, disk_mask, rotate_image

ANGLES = (15.0, 30.0, 45.0, 60.0, 75.0, 90.0)
"""Angles, in degrees, to measure by default if a model was trained on rotations by any angle."""


def choose_angles(
    model: Tokenizer, asked: Sequence[float] | None, height: int, width: int
) -> tuple[float, ...]:
    """Return the angles to measure, in degrees: 0 first, each once; () for none.

    Args:
        model: Tokenizer to measure.
        asked: Angles in degrees; None means ANGLES if the model was trained on rotations by any
            angle and the images are square, else no angles.
        height: Height of the images.
        width: Width of the images.

    Raises:
        ValueError: An angle is not finite, the images are not square, or the representation does
            not extend to all rotations.
    """
    ours = model if isinstance(model, Autoencoder) else None
    if asked is None:
        trained = ours is not None and ours.config.loss.rotation_probability > 0
        split = ours is not None and ours.bottleneck.splits_planes
        asked = ANGLES if trained and height == width and not split else ()
    if not asked:
        return ()
    if not all(map(math.isfinite, asked)):
        raise ValueError(f"angles {asked}: give numbers of degrees")
    if height != width:
        raise ValueError(
            f"images of {height} x {width} pixels: only square images can turn by any angle;"
            " measure on square images, or without angles"
        )
    check_turns_by_any_angle(model.representation)
    if ours is not None:
        ours.bottleneck.check_planes()
    return tuple(dict.fromkeys((0.0, *map(float, asked))))


def measure_rotations(
    model: Tokenizer,
    image: Float[Tensor, "b c s s"],
    noise: Float[Tensor, "b c s s"],
    latent: Float[Tensor, "b dim l l"],
    angles_degrees: Sequence[float],
    totals: Totals,
) -> None:
    """Measure one batch under the rotation R by each angle, for `summarize_rotations`.

    Args:
        model: Tokenizer in eval mode, with a representation that extends to all rotations.
        image: Images in [-1, 1].
        noise: Noise that decoding starts from.
        latent: Latents of the images.
        angles_degrees: Angles, counter-clockwise.
        totals: Totals that the measurements are added to.

    Raises:
        ValueError: The images are not square, or the representation does not extend.
    """
    mask = disk_mask(*image.shape[-2:], device=image.device)
    for degrees in angles_degrees:
        angle = math.radians(degrees)
        turned = rotate_image(image, angle).clamp(-1, 1)
        moved = act_by_angle(model.representation, angle, latent)
        error = (model.encode(turned) - moved).square().mean(1)
        sample = model.decode(moved, noise=noise).clamp(-1, 1)
        back = rotate_image(turned, -angle).clamp(-1, 1)
        totals.add(f"turned {degrees} encoder", error)
        totals.add(f"turned {degrees} psnr", masked_psnr(sample, turned, mask))
        totals.add(f"turned {degrees} floor", masked_psnr(back, image, mask))


def summarize_rotations(
    totals: Totals, angles_degrees: Sequence[float], variance: Float[Tensor, "dim l l"]
) -> dict[float, dict[str, float]]:
    """Summarise what `measure_rotations` measured, angle by angle.

    Args:
        totals: Totals of all images, from `measure_rotations`.
        angles_degrees: Angles that were measured; 0 is one of them.
        variance: Variance of the latent over images.

    Returns:
        For each angle in degrees:
            encoder_error: E |E(Rx) - rho(R) E(x)|^2 / Var E(x), over cells inside the disk.
            psnr: PSNR of D(rho(R) E(x)) against Rx, dB, mean over images.
            gap_db: psnr at angle 0 minus psnr at this angle.
            resampling_floor_db: PSNR of R^-1 R x against x: the error of two resamplings alone.
    """
    cells = disk_mask(*variance.shape[-2:]).to(variance.dtype)
    spread = max(float((cells * variance.mean(0)).sum()), 1e-12)

    def found(degrees: float) -> dict[str, float]:
        error = totals.mean(f"turned {degrees} encoder")
        score = totals.mean(f"turned {degrees} psnr")
        return {
            "encoder_error": float((cells * error).sum()) / spread,
            "psnr": float(score),
            "gap_db": float(totals.mean("turned 0.0 psnr") - score),
            "resampling_floor_db": float(totals.mean(f"turned {degrees} floor")),
        }

    return {degrees: found(degrees) for degrees in angles_degrees}
