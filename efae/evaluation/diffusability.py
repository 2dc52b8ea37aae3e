"""Diffusability: how easily a flow or diffusion model should learn a tokenizer's latents.

Four numbers that need neither labels nor a trained generator. All are taken of the latents z as a
flow trains on them: less the mean of each channel over images and cells, and divided by one number,
the standard deviation of the rest. A shift and a scaling factor, as in the configurations of
diffusers, therefore change only the similarity, which is of the latents as they are. Acting on all
latents by one element of the group changes no number, up to rounding.

The definitions are those of Zhong et al. 2026 (arXiv:2606.03578) and Singh et al. 2025
(arXiv:2512.10794), except where a function says otherwise. Over 86 tokenizers, Zhong et al. relate
them to the FID of a generator. Two of their numbers need masks of the foreground, and are not
measured here: the share of the nearest neighbours, of latents restricted to the foreground, that
have the same label (latent neighbour consistency, LNC), and the similarity within the foreground
(SRSS).

Everything follows from sums over images, so the batch size and the number of processes affect
rounding only.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from efae.evaluation.measures import Totals

_fft, _linalg = cast(Any, torch.fft), cast(Any, torch.linalg)  # have no types
FEWEST_CELLS = 3
"""Cells of the smallest grid that has more than one distance, and more than one frequency."""
_HIGH = 0.25
"""Share of the largest frequency above which energy counts as high-frequency, rho in eq. 9 of
Zhong et al."""
_ROUNDING = 1e-12
"""Share of all energy that counts as rounding, and so as 0."""
_LARGEST_WINDOW = 16
"""Largest side, in cells, of the windows whose covariance is measured."""


@dataclass(frozen=True)
class Diffusability:
    """The numbers of one encoder on one set of images; None on grids under FEWEST_CELLS."""

    velocity_irreducible_variance: float
    """See `velocity_irreducible_variance`: from 0 to pi / 2, lower is easier."""
    spectral_energy_concentration: float | None
    """See `spectral_energy_concentration`: from 0 to 1, lower is smoother."""
    spectral_energy_concentration_by_irrep: dict[str, float] | None
    """The same for the channels of each irrep."""
    local_distant_similarity: float | None
    """See `local_distant_similarity`: from -2 to 2, higher is more structured."""
    spectral_slope: float | None
    """Slope of the latents' spectrum, see `spectral_slope`."""
    image_spectral_slope: float | None
    """Slope of the images' spectrum, up to the highest frequency of the latent's grid."""
    spectral_slope_gap: float | None
    """The absolute difference of the two slopes."""

    def scores(self) -> dict[str, float]:
        """Return the numbers that validation logs and a sweep can optimise, without the Nones."""
        found = {
            "velocity_irreducible_variance": self.velocity_irreducible_variance,
            "spectral_energy_concentration": self.spectral_energy_concentration,
            "local_distant_similarity": self.local_distant_similarity,
            "spectral_slope_gap": self.spectral_slope_gap,
        }
        return {name: value for name, value in found.items() if value is not None}


def measure_latents(
    image: Float[Tensor, "b c h w"],
    latent: Float[Tensor, "b dim lh lw"],
    blocks: Mapping[str, slice],
    totals: Totals,
) -> None:
    """Measure one batch for `summarize_diffusability`.

    Args:
        image: Images in [-1, 1].
        latent: Latents of the images.
        blocks: Channels of each irrep, by name.
        totals: Totals that the measurements are added to.
    """
    height, width = latent.shape[-2:]
    exact = latent.double()
    windows = _cut_windows(exact)
    totals.add("latent", exact)
    totals.add("latent squared", exact.square())
    totals.add("latent channels", torch.einsum("bihw,bjhw->bij", exact, exact))
    totals.add("latent cells", torch.einsum("bcns,bcnt->bst", windows, windows))
    if height * width < FEWEST_CELLS:
        return
    energy = _transform(exact, height, width).square()
    for irrep, channels in blocks.items():
        totals.add(f"latent spectrum {irrep}", energy[:, channels].sum(1))
    energy = _transform(image.double(), height, width).square()
    totals.add("image spectrum", energy.sum(1))
    totals.add("similarity", local_distant_similarity(latent))


def summarize_diffusability(totals: Totals, blocks: Mapping[str, slice]) -> Diffusability:
    """Turn the totals of all images into the numbers.

    Args:
        totals: Totals of all images, from `measure_latents`.
        blocks: Channels of each irrep, by name.
    """
    mean = totals.mean("latent")
    offset = mean.mean((1, 2))
    square = float(totals.mean("latent squared").mean())
    power = square - float(offset.square().mean())
    count = totals.count("latent")
    windows = _cut_windows(mean[None])
    unbiased = count / max(count - 1, 1)
    variance = velocity_irreducible_variance(
        (totals.mean("latent channels") - torch.einsum("ihw,jhw->ij", mean, mean)) * unbiased,
        (totals.mean("latent cells") - torch.einsum("bcns,bcnt->st", windows, windows)) * unbiased,
        power * windows.shape[2] if power > _ROUNDING * square else 0.0,
    )
    if mean[0].numel() < FEWEST_CELLS:
        return Diffusability(variance, None, None, None, None, None, None)
    spectra: dict[str, Tensor] = {}
    for irrep, channels in blocks.items():
        spectra[irrep] = totals.mean(f"latent spectrum {irrep}").clone()
        # What the means of the channels add is at frequency 0.
        spectra[irrep][0, 0] -= mean[0].numel() * offset[channels].square().sum()
        spectra[irrep][spectra[irrep] <= _ROUNDING * mean.numel() * square] = 0
    whole = torch.stack(list(spectra.values())).sum(0)
    slope, image_slope = (spectral_slope(e) for e in (whole, totals.mean("image spectrum")))
    return Diffusability(
        velocity_irreducible_variance=variance,
        spectral_energy_concentration=spectral_energy_concentration(whole),
        spectral_energy_concentration_by_irrep={
            irrep: spectral_energy_concentration(energy) for irrep, energy in spectra.items()
        },
        local_distant_similarity=float(totals.mean("similarity")),
        spectral_slope=slope,
        image_spectral_slope=image_slope,
        spectral_slope_gap=abs(slope - image_slope),
    )


def velocity_irreducible_variance(
    channels: Float[Tensor, "dim dim"], cells: Float[Tensor, "s s"], power: float
) -> float:
    """Return the variance of a flow's target that no predictor explains, per number of the latent.

    On the path x_t = (1 - t) z + t eps, the target is v = eps - z = (x_t - z) / t, so that
    Var(v | x_t) = Var(z | x_t) / t^2. Where z is Gaussian and lambda are the eigenvalues of its
    covariance, its mean over a latent's d numbers, and over uniform t, is (Zhong et al., eq. 4, 5)

        1/d sum_i int_0^1 lambda_i / ((1 - t)^2 lambda_i + t^2) dt = pi/2 mean_i sqrt(lambda_i).

    White noise of unit variance has pi/2, and a constant 0. Strong correlations, of cells or of
    channels, lower it. The covariance is taken as a Kronecker product, of channels and of the cells
    of a window (that of the largest divisor of each side up to 16). Unlike in the paper, the
    factors are the two partial traces instead of the maximum-likelihood ones: equal if the
    covariance is such a product, and sums over images. And the latents of all images count as one
    class, since validation knows no labels. From fewer images than channels or cells the estimate
    is too low: compare models on equally many images.

    Args:
        channels: Covariance over images of the channels, summed over cells.
        cells: Covariance over images of the cells of a window, summed over channels and windows.
        power: Mean square of the numbers of a latent less their channel's mean, times the number
            of windows; the latent has unit scale if it is divided by the root of that mean square.
    """
    if not (channels.isfinite().all() and cells.isfinite().all()):
        return math.nan  # of a model that has diverged; eigenvalues would be refused
    by_channel: Tensor = _linalg.eigvalsh(channels).clamp(min=0)
    by_cell: Tensor = _linalg.eigvalsh(cells).clamp(min=0)
    # The product of the traces is the product's trace times that of either.
    scale = math.sqrt(float(by_channel.sum()) * power)
    if not scale:
        return 0.0
    return math.pi / 2 * float(by_channel.sqrt().mean() * by_cell.sqrt().mean()) / scale


def spectral_energy_concentration(energy: Float[Tensor, "h w"]) -> float:
    """Return the share of high frequencies in a spectrum's energy (Zhong et al., eq. 9).

    With E_uv the mean square of coefficient (u, v) of the orthonormal cosine transform (DCT-II),

        SEC = sum_{u + v > rho (h - 1 + w - 1)} E_uv / sum_uv E_uv,   rho = 1/4 here.

    It is 0 for latents without energy.
    """
    height, width = energy.shape
    frequency = torch.arange(height)[:, None] + torch.arange(width)
    high = energy[frequency > _HIGH * (height + width - 2)].sum()
    return float(high / energy.sum().clamp(min=1e-30))


def spectral_slope(energy: Float[Tensor, "h w"]) -> float:
    """Return the slope a of a spectrum E ~ f^-a, defined here as a least-squares fit.

    The fit is of log E_uv to log f over all coefficients of the cosine transform but the constant
    one, where f = sqrt((u/h)^2 + (v/w)^2). White noise has 0, natural images about 2. Skorokhodov
    et al. 2025 (arXiv:2502.14831) compare the spectra of latents and images by eye: those of many
    autoencoders fall less steeply, and generation improves if they are made to fall alike.

    It is 0 if fewer than two frequencies have energy.
    """
    height, width = energy.shape
    u, v = torch.arange(height) / height, torch.arange(width) / width
    frequency = (u[:, None].square() + v.square()).sqrt().double()
    kept = (energy > _ROUNDING * energy.sum()) & (frequency > 0)
    x, y = frequency[kept].log(), energy[kept].log()
    if len(x) < 2 or not (spread := float((x - x.mean()).square().sum())) > 1e-12:
        return 0.0
    return -float(((x - x.mean()) * y).sum()) / spread


def local_distant_similarity(latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b"]:
    """Return how much more similar near cells are than distant ones, per image (Singh et al.).

        LDS = E[K(p, q) | d(p, q) < r] - E[K(p, q) | d(p, q) >= r],
        K(p, q) = <z_p, z_q> / (|z_p| |z_q|),   r = half the longer side, at least 2 cells,

    over pairs of different cells p and q at Manhattan distance d. White noise has 0 in the mean,
    and so does a constant, whose distant cells are as similar as its near ones.
    """
    height, width = latent.shape[-2:]
    cells = F.normalize(latent.float(), dim=1, eps=1e-12)
    # Sums over all pairs by their offset: the autocorrelation, padded so that no offset wraps.
    padded = (2 * height, 2 * width)
    spectrum: Tensor = _fft.rfft2(cells, s=padded)
    sums: Tensor = _fft.irfft2(spectrum.abs().square().sum(1), s=padded)
    rows, columns = (
        side - (torch.arange(2 * side, device=latent.device) - side).abs()
        for side in (height, width)
    )
    pairs = (height - rows)[:, None] * (width - columns)
    distance = rows[:, None] + columns
    radius = max(max(height, width) / 2, 2)
    near = (distance > 0) & (distance < radius)
    far = distance >= radius
    mean = (sums * near).sum((1, 2)) / (pairs * near).sum()
    return mean - (sums * far).sum((1, 2)) / (pairs * far).sum()


def interpolate_with_nearest(
    everything: Float[Tensor, "n dim h w"], first: int, count: int, batch_size: int
) -> Iterator[Float[Tensor, "b dim h w"]]:
    """Yield latents half-way to their nearest neighbours, for the interpolated FID.

    The neighbour is the latent of greatest cosine similarity, and the way an arc (Xu et al. 2026,
    arXiv:2603.05630). Acting on all latents by one element acts on the result.

    Args:
        everything: Latents of all images, two at least.
        first: Position of the first latent to interpolate.
        count: Number of latents to interpolate.
        batch_size: Number of latents per batch.
    """
    vectors = everything.flatten(1)
    lengths = vectors.square().sum(1).sqrt().clamp(min=1e-12)
    for start in range(first, first + count, batch_size):
        rows = torch.arange(start, min(start + batch_size, first + count))
        cosine = vectors[rows] @ vectors.T / lengths / lengths[rows, None]
        cosine[torch.arange(len(rows)), rows] = -math.inf
        cosine, nearest = cosine.max(1)
        weight = (2 + 2 * cosine).clamp(min=1e-6).rsqrt()  # sin(angle / 2) / sin(angle)
        yield weight[:, None, None, None] * (everything[rows] + everything[nearest])


def _transform(field: Float[Tensor, "b c h w"], rows: int, columns: int) -> Tensor:
    """Return the lowest `rows` x `columns` coefficients of the orthonormal DCT-II."""

    def basis(count: int, side: int) -> Tensor:
        angle = torch.arange(count, device=field.device)[:, None] * (
            torch.arange(side, device=field.device, dtype=torch.float64) + 0.5
        )
        scale = torch.full((count, 1), 2 / side, dtype=torch.float64, device=field.device)
        scale[0] = 1 / side
        return scale.sqrt() * torch.cos(angle * math.pi / side)

    return basis(rows, field.shape[-2]) @ field @ basis(columns, field.shape[-1]).T


def _cut_windows(latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b dim n s"]:
    """Cut latents into windows whose sides divide the grid's, at most _LARGEST_WINDOW."""
    height, width = latent.shape[-2:]
    rows, columns = (
        max(n for n in range(1, _LARGEST_WINDOW + 1) if side % n == 0) for side in (height, width)
    )
    tiled = latent.reshape(
        *latent.shape[:2], height // rows, rows, width // columns, columns
    ).transpose(3, 4)
    return tiled.flatten(4).flatten(2, 3)
