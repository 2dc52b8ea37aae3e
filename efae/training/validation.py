"""Validation on held-out images during training: a few measures and a picture."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from efae.evaluation.diffusability import measure_latents, summarize_diffusability
from efae.evaluation.flow_measures import TIME_BINS, measure_loss
from efae.evaluation.measures import Totals, draw_noise, psnr, to_float
from efae.model.autoencoder import Autoencoder
from efae.model.precision import Precision, float32_arithmetic
from efae.training.micro_batches import fit_batches
from efae.training.state import TrainState

_BATCH_SIZE = 64
"""Number of images per batch, as long as they fit into memory."""
_PICTURED = 16
_TURNED = 32
"""Number of images whose gap is measured, with one decode per group element."""


class Validation:
    """Measures the averaged weights, always on the same images and noise, split over the ranks.

    Args:
        images: All held-out images, in [0, 255].
        device: Device of training.
        rank: Rank of this process, which measures its share of the images.
        world_size: Number of processes.
        precision: Precision that the model runs in.
        show: Function that takes a PNG file, which is removed afterwards, and a name for it; rank 0
            calls it.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "n c h w"],
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        precision: Precision = "fp32",
        show: Callable[[Path, str], None] | None = None,
    ):
        count = len(images)
        self._first, end = (count * part // world_size for part in (rank, rank + 1))
        self._images, self._device = images[self._first : end].to(device), device
        self._stride = -(-count // _TURNED)
        self._batch_size = max(1, min(_BATCH_SIZE, end - self._first))
        self._precision: Precision = precision
        self._show = show

    @float32_arithmetic("fp32")
    @torch.no_grad()
    def measure(self, state: TrainState) -> dict[str, float]:
        """Measure the averaged weights of `state`, and show reconstructions.

        All ranks call it together, since it sums over them.

        Returns:
            "psnr" of reconstructions in dB; "held_out_loss", the flow loss averaged over t, or the
            squared error of a decoder without flow; "worst_gap_db", the largest |difference| to
            the identity's PSNR over the group, on evenly spaced images; and those of
            `Diffusability.scores`.
        """
        model = copy.deepcopy(state.model).eval()
        model.precision = self._precision
        state.average.copy_to(model)
        if model.config.choose_compilation(self._device.type) != "none":
            model.compile_blocks()
        (totals, pictures), self._batch_size = fit_batches(
            lambda batch_size: self._measure(model, batch_size), self._batch_size
        )
        if pictures and self._show:
            image, sample = map(torch.cat, zip(*pictures, strict=True))
            self._draw(self._show, state.step, image, sample)
        totals.gather(self._device)
        by_element = {g.name: float(totals.mean(f"turned {g}")) for g in model.group}
        errors = [f"loss {i}" for i in range(TIME_BINS)] if model.has_flow else ["squared error"]
        return {
            "psnr": float(totals.mean("psnr")),
            "held_out_loss": sum(float(totals.mean(error)) for error in errors) / len(errors),
            "worst_gap_db": max(abs(by_element["identity"] - p) for p in by_element.values()),
            **summarize_diffusability(totals, model.representation.blocks).scores(),
        }

    def _measure(
        self, model: Autoencoder, batch_size: int
    ) -> tuple[Totals, list[tuple[Tensor, Tensor]]]:
        """Measure this rank's images; returns totals, and images and reconstructions to show."""
        totals, pictures = Totals(), list[tuple[Tensor, Tensor]]()
        for start in range(0, len(self._images), batch_size):
            image = to_float(self._images[start : start + batch_size])
            positions = range(self._first + start, self._first + start + len(image))
            noise = draw_noise(positions, tuple(image.shape[1:]), 0).to(image.device)
            latent = model.encode(image)
            measure_latents(image, latent, model.representation.blocks, totals)
            sample = model.decode(latent, noise=noise).clamp(-1, 1)
            totals.add("psnr", psnr(sample, image))
            if model.has_flow:
                measure_loss(model, image, noise, latent, totals)
            else:
                totals.add("squared error", (sample - image).square().mean((1, 2, 3)))
            if self._show and start < _PICTURED:
                left = _PICTURED - start
                pictures.append((image[:left].cpu(), sample[:left].cpu()))
            few = [i for i, position in enumerate(positions) if position % self._stride == 0]
            for g in model.group if few else ():
                turned = model.decode(model.act(g, latent[few]), noise=g.act_on_image(noise[few]))
                undone = g.inverse.act_on_image(turned).clamp(-1, 1)
                totals.add(f"turned {g}", psnr(undone, image[few]))
        return totals, pictures

    def _draw(
        self, show: Callable[[Path, str], None], step: int, image: Tensor, sample: Tensor
    ) -> None:
        from efae.report.card import draw_reconstructions  # matplotlib, of rank 0 alone

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"step-{step:08d}.png"
            draw_reconstructions(image, sample, path)
            show(path, f"reconstructions/{path.name}")
