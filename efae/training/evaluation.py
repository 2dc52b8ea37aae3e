"""What is measured about a model: reconstruction, equivariance, and what its latent carries.

Images are in [-1, 1], so PSNR = 10 log10(4 / MSE) per example, clamped samples, then averaged.
Element g is measured with coupled noise: D(rho(g) E(x); g eps) against g x. A small gap alone is
worthless (a latent that cannot carry pose has gap 0), so it always stands beside PSNR.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from efae.model import flow
from efae.model.autoencoder import Autoencoder
from efae.symmetry.group import Element
from efae.symmetry.representation import group_law_error

STEP_COUNTS = (1, 2, 4, 8, 16, 32)
TIME_BINS = 10


@dataclass(frozen=True)
class Pictures:
    """A few held-out examples for figures; images (n, c, h, w) in [-1, 1]."""

    original: Tensor
    reconstruction: Tensor
    acted: dict[str, Tensor]
    """By element: decodes of act(g, z)."""


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one model on one held-out set; PSNR and gaps in dB."""

    images: int
    sampler_steps: int
    psnr: float
    ssim: float
    psnr_by_element: dict[str, float]
    gap_db: dict[str, float]
    worst_gap_db: float
    """The largest |gap|."""
    symmetric_worst_gap_db: float
    """The same on a batch of the images made mirror-symmetric."""
    noise_floor_db: float
    """PSNR between two decodes of one latent from different noise."""
    encoder_error: dict[str, float]
    """E |E(gx) - rho(g) E(x)|^2 / Var E(x), by element."""
    decoder_error_db: dict[str, float]
    """PSNR of D(rho(g) z; g eps) against g D(z; eps), by element."""
    group_law_error: float
    energy_by_irrep: dict[str, float]
    """Share of the latent's energy."""
    psnr_by_steps: dict[int, float]
    sharpness_by_steps: dict[int, float]
    """Gradient energy of the samples over that of the images."""
    loss_by_time: list[float]
    """Flow loss in equal bins of t over [0, 1]."""
    seconds: float
    pictures: Pictures = field(repr=False)

    def numbers(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "pictures"}


def psnr(image: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Peak signal to noise ratio per example, dB; the peak-to-peak range is 2."""
    error = (image - other).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def ssim(image: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Structural similarity per example (Wang et al. 2004), Gaussian window of 11, sigma 1.5."""
    offsets = torch.arange(11, device=image.device) - 5.0
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = torch.outer(window, window)
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=x.shape[1])

    mean_a, mean_b = blur(image), blur(other)
    variance_a = blur(image.square()) - mean_a.square()
    variance_b = blur(other.square()) - mean_b.square()
    covariance = blur(image * other) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    score = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2)
    )
    return score.mean((1, 2, 3))


def to_float(image: Tensor) -> Tensor:
    """uint8 pixels to float in [-1, 1]."""
    return image.float() / 127.5 - 1


@torch.no_grad()
def evaluate(
    model: Autoencoder,
    images: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 128,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> Evaluation:
    """Measure a model in fp32.

    Args:
        model: in eval mode.
        images: uint8 (n, c, h, w), held out from training.
        seed: of the noise; example i always meets the same noise.
        batch_size: images at a time.
        progress: wraps the long loops, given a description.
    """
    started = time.monotonic()
    device = next(model.parameters()).device
    steps = model.config.flow.sampler_steps
    batches = [
        (to_float(part.to(device)), _noise(part.shape, seed + i, device))
        for i, part in enumerate(images.split(batch_size))
    ]
    latents = [model.encode(image) for image, _ in batches]
    plain = [
        model.decode(latent, noise=noise)
        for latent, (_, noise) in zip(latents, progress(batches, "reconstruct"), strict=True)
    ]
    psnr_by_element, decoder_error, encoder_error = {}, {}, {}
    # One variance for all elements; over images, as the mean latent carries no information.
    spread = torch.cat(latents).var(0).mean()
    pictures: dict[str, Tensor] = {}
    for g in progress(model.group, "elements"):
        scores, agreements, errors = [], [], []
        for (image, noise), latent, reference in zip(batches, latents, plain, strict=True):
            sample = reference
            if g != model.group.identity:
                sample = model.decode(model.act(g, latent), noise=g.act_on_image(noise))
            pictures.setdefault(g.name, sample.clamp(-1, 1).cpu())
            scores.append(_clamped_psnr(sample, g.act_on_image(image)))
            agreements.append(psnr(sample, g.act_on_image(reference)))
            difference = model.encode(g.act_on_image(image)) - model.act(g, latent)
            errors.append(difference.square().mean((1, 2, 3)))
        psnr_by_element[g.name] = _mean(scores)
        decoder_error[g.name] = _mean(agreements)
        encoder_error[g.name] = _mean(errors) / max(float(spread), 1e-12)
    base = psnr_by_element["identity"]
    gaps = {name: base - value for name, value in psnr_by_element.items()}
    by_steps = _measure_steps(model, batches[0], latents[0])
    other = model.decode(latents[0], seed=seed + 10_000)
    return Evaluation(
        images=len(images),
        sampler_steps=steps,
        psnr=base,
        ssim=_mean(
            [ssim(x.clamp(-1, 1), image) for x, (image, _) in zip(plain, batches, strict=True)]
        ),
        psnr_by_element=psnr_by_element,
        gap_db=gaps,
        worst_gap_db=max(map(abs, gaps.values())),
        symmetric_worst_gap_db=_symmetric_gap(model, batches[0]),
        noise_floor_db=float(psnr(plain[0], other).mean()),
        encoder_error=encoder_error,
        decoder_error_db=decoder_error,
        group_law_error=group_law_error(
            model.group, {g.name: model.representation.matrix(g) for g in model.group}
        )[0],
        energy_by_irrep=_energy(model, torch.cat(latents)),
        psnr_by_steps={count: score for count, (score, _) in by_steps.items()},
        sharpness_by_steps={count: sharpness for count, (_, sharpness) in by_steps.items()},
        loss_by_time=_loss_by_time(model, batches, latents),
        seconds=time.monotonic() - started,
        pictures=Pictures(
            original=batches[0][0].cpu(),
            reconstruction=plain[0].clamp(-1, 1).cpu(),
            acted=pictures,
        ),
    )


def _noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())


def _clamped_psnr(sample: Tensor, image: Tensor) -> Tensor:
    return psnr(sample.clamp(-1, 1), image)


def _symmetric_gap(model: Autoencoder, batch: tuple[Tensor, Tensor]) -> float:
    """The worst gap on images whose right half is the mirrored left half."""
    image, noise = batch
    left = image[..., : image.shape[-1] // 2]
    image = torch.cat([left, left.flip(-1)], -1)
    latent = model.encode(image)

    def score(g: Element) -> float:
        sample = model.decode(model.act(g, latent), noise=g.act_on_image(noise))
        return float(_clamped_psnr(sample, g.act_on_image(image)).mean())

    base = score(model.group.identity)
    return max(abs(base - score(g)) for g in model.group)


def _measure_steps(
    model: Autoencoder, batch: tuple[Tensor, Tensor], latent: Tensor
) -> dict[int, tuple[float, float]]:
    """PSNR and sharpness against sampler steps, on one batch."""
    image, noise = batch
    measured = {}
    for count in STEP_COUNTS:
        sample = model.decode(latent, steps=count, noise=noise).clamp(-1, 1)
        score = float(psnr(sample, image).mean())
        measured[count] = (score, float(_gradient_energy(sample) / _gradient_energy(image)))
    return measured


def _gradient_energy(image: Tensor) -> Tensor:
    return image.diff(dim=-1).square().mean() + image.diff(dim=-2).square().mean()


def _energy(model: Autoencoder, latent: Tensor) -> dict[str, float]:
    total = latent.square().sum()
    return {
        irrep: float(latent[:, channels].square().sum() / total)
        for irrep, channels in model.representation.blocks.items()
    }


def _loss_by_time(
    model: Autoencoder, batches: list[tuple[Tensor, Tensor]], latents: list[Tensor]
) -> list[float]:
    """The flow loss at the middle of each bin of t."""
    losses = []
    for i in range(TIME_BINS):
        parts = []
        for (image, noise), latent in zip(batches, latents, strict=True):
            t = torch.full((len(image),), (i + 0.5) / TIME_BINS, device=image.device)
            x_t = flow.interpolate(image, noise, t)
            parts.append(flow.flow_loss(model.velocity(x_t, t, latent), image, noise))
        losses.append(_mean(parts))
    return losses
