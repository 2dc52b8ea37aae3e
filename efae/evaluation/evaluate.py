"""Evaluation of a tokenizer: reconstruction, equivariance, and the content of its latent.

Element g is measured with coupled noise: D(rho(g) E(x); g eps), undone by g^-1, against x. A small
gap alone says little (a latent that cannot carry pose has gap 0), so it is always shown with PSNR.
Measures that take many decodes use up to CHOSEN evenly spaced images; `Evaluation.protocol`
records how every number was measured.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn

from efae.evaluation.any_angle import choose_angles, measure_rotations
from efae.evaluation.diffusability import interpolate_with_nearest, measure_latents
from efae.evaluation.flow_measures import measure_loss, measure_steps, measure_velocity
from efae.evaluation.linear_reference import LinearReference, fit_linear_reference
from efae.evaluation.measures import (
    Totals,
    check_size,
    draw_noise,
    gather_json,
    gather_vectors,
    psnr,
    ssim,
    symmetric_images,
    to_float,
)
from efae.evaluation.protocol import Tokenizer, has_flow
from efae.evaluation.results import (
    CHOSEN,
    Evaluation,
    Part,
    Pictures,
    describe_protocol,
    join_pictures,
    summarize,
)
from efae.model.autoencoder import Autoencoder
from efae.model.precision import float32_arithmetic

if TYPE_CHECKING:
    from efae.evaluation.lpips_fid import Fid, Lpips

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
_PICTURED, _MOVING = 64, 8
"""Numbers of the first images that are pictured, and whose decoding is."""


@dataclass(frozen=True)
class Measurement:
    """A model and the way to measure it, the same for all parts of the images.

    Attributes:
        model: Tokenizer in eval mode; if it has a `velocity`, flow and sampler are measured too.
        seed: Seed of the noise; image i of the set always gets the same noise.
        batch_size: Number of images per batch; affects rounding only.
        angles: Angles of rotations to measure, in degrees.
        lpips: Network to measure LPIPS with; None skips it.
        fid: Network to measure FID with; None skips it.
        linear: Linear maps to measure beside the model; None skips them.
    """

    model: Tokenizer
    seed: int = 0
    batch_size: int = 64
    angles: Sequence[float] = ()
    lpips: "Lpips | None" = None
    fid: "Fid | None" = None
    linear: LinearReference | None = None

    @float32_arithmetic("fp32")
    @torch.no_grad()
    def measure(
        self,
        images: UInt8[Tensor, "n c h w"],
        first: int,
        total: int,
        progress: Progress = lambda items, _: items,
    ) -> Part:
        """Measure a part of the images.

        Args:
            images: Images in [0, 255], held out from training.
            first: Position of the first of them in the whole set.
            total: Number of images in the whole set.
            progress: Function that wraps the items of a long loop, given its description.
        """
        started = time.monotonic()
        model, seed, batch_size, device = self.model, self.seed, self.batch_size, self.device
        stride = -(-total // CHOSEN)
        totals = Totals()
        latents: list[Tensor] = []
        pictures: list[Pictures] = []
        for start in progress(range(0, len(images), batch_size), "reconstruct and act"):
            part = images[start : start + batch_size]
            image = to_float(part.to(device))
            positions = range(first + start, first + start + len(image))
            noise = draw_noise(positions, tuple(image.shape[1:]), seed).to(device)
            latent, acted = _measure_elements(model, image, noise, totals, self.lpips)
            if has_flow(model):
                measure_loss(model, image, noise, latent, totals)
            if self.fid is not None:
                self.fid.add(image, acted["identity"])
                latents.append(latent.cpu())
            if self.linear is not None:
                self.linear.measure(image, totals)
            if start < _PICTURED:
                left, moving = _PICTURED - start, max(0, _MOVING - start)
                shown = {name: sample[:left].clamp(-1, 1).cpu() for name, sample in acted.items()}
                states = _record_states(model, latent[:moving], noise[:moving])
                pictures.append(Pictures(image[:left].cpu(), shown["identity"], shown, states))
        chosen = list(range(-first % stride, len(images), stride))
        batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
        for places in progress(batches, "few images, closer"):
            image = to_float(images[places].to(device))
            positions = [first + i for i in places]
            noise, other = (
                draw_noise(positions, tuple(image.shape[1:]), seed, stream).to(device)
                for stream in (0, 1)
            )
            latent = model.encode(image)
            _measure_law(model, latent, totals)
            _measure_floor(model, latent, noise, other, totals)
            _measure_symmetric(model, image, noise, totals)
            _measure_half_scale(model, image, latent, positions, seed, totals)
            measure_rotations(model, image, noise, latent, self.angles, totals)
            if has_flow(model):
                measure_steps(model, image, noise, latent, totals)
                measure_velocity(model, image, noise, latent, totals)
        if self.fid is not None:
            self._add_interpolated(latents, tuple(images.shape[1:]), first, progress)
        if not pictures:
            pictures = [Pictures(to_float(images), to_float(images), {}, [])]
        return Part(
            totals.to_host(),
            tuple(images.shape[1:]),
            join_pictures(pictures),
            self.linear and self.linear.multiplicities,
            time.monotonic() - started,
        )

    def _add_interpolated(
        self, latents: list[Tensor], shape: tuple[int, ...], first: int, progress: Progress
    ) -> None:
        """Add decodes between the latents of this part and their neighbours among all to FID."""
        assert self.fid is not None
        count = sum(map(len, latents))
        vector = torch.cat([latent.flatten() for latent in latents] or [torch.zeros(0)])
        latent_shape = latents[0].shape[1:] if latents else ()
        latents.clear()  # a large set has gigabytes of them
        parts = gather_vectors(vector, self.device)
        if not latent_shape:
            return
        everything = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(-1, *latent_shape)
        if len(everything) < 2:
            return  # a single image has no neighbour, and no FID
        batches = interpolate_with_nearest(everything, first, count, self.batch_size)
        starts = range(first, first + count, self.batch_size)
        for start in progress(starts, "interpolate"):
            between = next(batches)
            noise = draw_noise(range(start, start + len(between)), shape, self.seed)
            decoded = self.model.decode(between.to(self.device), noise=noise.to(self.device))
            self.fid.add_interpolated(decoded)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        if isinstance(self.model, nn.Module):
            return next(self.model.parameters()).device
        return torch.device("cpu")

    def summarize(self, part: Part) -> Evaluation:
        """Turn the totals of all images into the numbers."""
        return summarize(
            self.model,
            part,
            self.angles,
            protocol=describe_protocol(
                self.model, part, self.angles, self.seed, self.lpips, self.fid
            ),
            fids=(None, None) if self.fid is None else self.fid.compute(),
        )


def evaluate(
    model: Tokenizer,
    images: UInt8[Tensor, "n c h w"],
    *,
    seed: int = 0,
    batch_size: int = 64,
    angles_degrees: Sequence[float] | None = None,
    lpips: "Lpips | None" = None,
    fid: "Fid | None" = None,
    progress: Progress = lambda items, _: items,
) -> Evaluation:
    """Measure a model in fp32, or at the precision that it has been given.

    If torch.distributed is initialised, every process calls this with its own images, and all get
    the numbers of the whole set: the images of rank 0, then of rank 1, ... The pictures show a
    process's own images.

    Args:
        model: Tokenizer in eval mode; if it has a `velocity`, flow and sampler are measured too.
        images: Images in [0, 255], held out from training.
        seed: Seed of the noise; image i of the set always gets the same noise.
        batch_size: Number of images per batch; affects rounding only.
        angles_degrees: Angles of rotations to measure; None means ANGLES if the model was trained
            on rotations by any angle and the images are square, else none.
        lpips: Network to measure LPIPS with; None skips it.
        fid: Network to measure FID with; None skips it.
        progress: Function that wraps the items of a long loop, given its description.

    Raises:
        ValueError: There are no images, they are too small for SSIM or for `lpips`, or model or
            images cannot turn by any angle.
    """
    check_size(*images.shape[-2:])
    if lpips is not None:
        lpips.check_size(*images.shape[-2:])
    angles = choose_angles(model, angles_degrees, *images.shape[-2:])
    measurement = Measurement(model, seed, batch_size, angles, lpips, fid)
    counts: list[int] = gather_json(len(images), measurement.device)
    if sum(counts) == 0:
        raise ValueError("no images to measure on")
    linear = fit_linear_reference(model, images, measurement.device, batch_size)
    measurement = replace(measurement, linear=linear)
    rank = torch.distributed.get_rank() if len(counts) > 1 else 0
    part = measurement.measure(images, sum(counts[:rank]), sum(counts), progress)
    part.totals.gather(measurement.device)
    return measurement.summarize(part)


@float32_arithmetic("fp32")
@torch.no_grad()
def measure_drift(
    model: Tokenizer, before: Tokenizer, images: UInt8[Tensor, "n c h w"], batch_size: int = 64
) -> float | None:
    """Return E |E(x) - E0(x)|^2 / Var E0(x), how far an encoder has moved from another model's.

    Args:
        model: Tokenizer in eval mode.
        before: Tokenizer in eval mode with the encoder E0.
        images: Images in [0, 255].
        batch_size: Number of images per batch; affects rounding only.

    Returns:
        The distance between what the encoders return, at their own scale and in their own bases, so
        that it is 0 for equal weights, whatever scale the models' latents have; None if the shapes
        differ.
    """
    totals = Totals()
    for start in range(0, len(images), batch_size):
        image = to_float(images[start : start + batch_size])
        now, then = (_encode_unscaled(tokenizer, image) for tokenizer in (model, before))
        if now.shape != then.shape:
            return None
        totals.add("drift", (now - then).square().mean((1, 2, 3)))
        totals.add("latent", then)
        totals.add("latent squared", then.square())
    variance = totals.mean("latent squared") - totals.mean("latent").square()
    return float(totals.mean("drift")) / max(float(variance.mean()), 1e-12)


def _encode_unscaled(model: Tokenizer, image: Tensor) -> Tensor:
    parameter = next(model.parameters()) if isinstance(model, nn.Module) else image
    image = image.to(parameter.device)
    if isinstance(model, Autoencoder):
        latent = model.from_irreps(model.call_filled(model.bounded, image))
    else:
        latent: Tensor = getattr(model, "bounded", model.encode)(image)
    return latent.cpu().double()


def _measure_elements(
    model: Tokenizer, image: Tensor, noise: Tensor, totals: Totals, lpips: "Lpips | None"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Measure encoder, decoder and both together by element; returns latent and decodes."""
    latent = model.encode(image)
    measure_latents(image, latent, model.representation.blocks, totals)
    acted: dict[str, Tensor] = {}
    for g in model.group:
        sample = model.decode(model.act(g, latent), noise=g.act_on_image(noise))
        acted[g.name] = sample
        undone = g.inverse.act_on_image(sample)
        clamped = undone.clamp(-1, 1)
        totals.add(f"psnr {g}", psnr(clamped, image))
        totals.add(f"ssim {g}", ssim(clamped, image))
        totals.add(f"agreement {g}", psnr(undone, acted["identity"]))
        if lpips is not None:
            totals.add(f"lpips {g}", lpips(clamped, image))
        difference = model.encode(g.act_on_image(image)) - model.act(g, latent)
        totals.add(f"encoder {g}", difference.square().mean((2, 3)))
    return latent, acted


def _measure_law(model: Tokenizer, latent: Tensor, totals: Totals) -> None:
    """Measure act(a, act(b, z)) against act(ab, z) for the worst pair."""
    size = latent.square().sum((1, 2, 3)).clamp(min=1e-12)
    worst = torch.zeros_like(size)
    for b in model.group:
        once = model.act(b, latent)
        for a in model.group:
            difference = model.act(a, once) - model.act(a @ b, latent)
            worst = worst.maximum(difference.square().sum((1, 2, 3)) / size)
    totals.add("law", worst.sqrt())


def _measure_floor(
    model: Tokenizer, latent: Tensor, noise: Tensor, other: Tensor, totals: Totals
) -> None:
    sample, again = model.decode(latent, noise=noise), model.decode(latent, noise=other)
    totals.add("floor", psnr(sample, again))
    totals.add("floor difference", (sample - again).square().mean((1, 2, 3)))


def _measure_symmetric(model: Tokenizer, image: Tensor, noise: Tensor, totals: Totals) -> None:
    """Measure PSNR by element on symmetric images, on which equivariance breaks most easily."""
    for kind, symmetric in symmetric_images(image).items():
        latent = model.encode(symmetric)
        for g in model.group:
            sample = model.decode(model.act(g, latent), noise=g.act_on_image(noise))
            undone = g.inverse.act_on_image(sample).clamp(-1, 1)
            totals.add(f"symmetric {kind} {g}", psnr(undone, symmetric))


def _measure_half_scale(
    model: Tokenizer, image: Tensor, latent: Tensor, positions: Sequence[int], seed: int, t: Totals
) -> None:
    """Measure PSNR of the decoded half-size latent against the half-size image, if cells allow."""
    height, width = latent.shape[-2:]
    if height % 2 or width % 2:
        return
    small, half = (
        F.interpolate(part, scale_factor=0.5, mode="bilinear", antialias=True)
        for part in (image, latent)
    )
    noise = draw_noise(positions, tuple(small.shape[1:]), seed).to(small.device)
    t.add("half scale psnr", psnr(model.decode(half, noise=noise).clamp(-1, 1), small))


def _record_states(model: Tokenizer, latent: Tensor, noise: Tensor) -> list[tuple[float, Tensor]]:
    """Return the sampler's states (t, x_t), from noise to image."""
    states: list[tuple[float, Tensor]] = []
    if len(latent) and isinstance(model, Autoencoder) and model.has_flow:
        model.decode(
            latent, steps=16, noise=noise, visit=lambda t, x: states.append((t, x.clone().cpu()))
        )
    return states
