"""What rotations by any angle cost a tokenizer, angle by angle, inside the inscribed disk.

Everything is as for the elements of the group, but for the noise: all angles start from the same,
since interpolation would leave rotated noise neither white nor of unit variance.
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
"""Degrees that are measured where a model was trained to be turned by any angle."""


def choose_angles(
    model: Tokenizer, asked: Sequence[float] | None, height: int, width: int
) -> tuple[float, ...]:
    """The angles to measure, in degrees: 0 first, each once; () for none.

    Args:
        model: what is measured.
        asked: degrees; None for ANGLES if the model was trained on rotations by any angle, and
            for none otherwise.
        height: of the images.
        width: of the images.

    Raises:
        ValueError: an angle is not a number, the images are not square, or the representation
            does not extend to all rotations.
    """
    if asked is None:
        trained = isinstance(model, Autoencoder) and model.config.loss.rotation_probability > 0
        asked = ANGLES if trained else ()
    if not asked:
        return ()
    if not all(map(math.isfinite, asked)):
        raise ValueError(f"angles {asked}: give numbers of degrees")
    if height != width:
        raise ValueError(
            f"images of {height} x {width} pixels: only square ones can turn by any angle; measure"
            " on square images, or without angles"
        )
    check_turns_by_any_angle(model.representation)
    return tuple(dict.fromkeys((0.0, *map(float, asked))))


def measure_rotations(
    model: Tokenizer,
    image: Float[Tensor, "b c s s"],
    noise: Float[Tensor, "b c s s"],
    latent: Float[Tensor, "b dim l l"],
    angles_degrees: Sequence[float],
    totals: Totals,
) -> None:
    """Count what `summarize_rotations` needs of one batch, for R = rotation by each angle.

    Args:
        model: in eval mode, with a representation that turns by any angle.
        image: in [-1, 1].
        noise: that decoding starts from.
        latent: of the image.
        angles_degrees: counter-clockwise.
        totals: receives the sums.

    Raises:
        ValueError: the images are not square, or the representation does not extend.
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
    """What was counted, angle by angle.

    Args:
        totals: of all images, from `measure_rotations`.
        angles_degrees: the same; with 0.
        variance: of the latent over images.

    Returns:
        For each angle in degrees:
            encoder_error: E |E(Rx) - rho(R) E(x)|^2 / Var E(x), over cells inside the disk.
            psnr: of D(rho(R) E(x)) against Rx, dB, mean over images.
            gap_db: psnr at angle 0 minus this one.
            resampling_floor_db: psnr of R^-1 R x against x, what two resamplings alone cost.
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
