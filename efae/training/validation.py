"""A look at held-out images during training: a few numbers and a picture."""

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import UInt8
from torch import Tensor

from efae.evaluation.flow_measures import TIME_BINS, measure_loss
from efae.evaluation.measures import Totals, draw_noise, full_precision, psnr, to_float
from efae.training.state import TrainState

if TYPE_CHECKING:
    from efae.tracking.sender import Tracker

_BATCH_SIZE = 64
_PICTURED = 16
_TURNED = 32
"""Images whose gap is measured: eight decodes each."""


class Preview:
    """Measures the averaged weights on the same images and noise at every look.

    Args:
        images: held out, in [0, 255], on the device of training.
        state: of training; read at each look.
        tracker: receives numbers and picture.
    """

    def __init__(
        self, images: UInt8[Tensor, "n c h w"], state: TrainState, tracker: "Tracker | None"
    ):
        self._images, self._state, self._tracker = images, state, tracker

    @full_precision()
    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """What the model is worth now.

        Returns:
            "psnr" of reconstructions in dB; "held_out_loss", the flow loss averaged over t; and
            "worst_gap_db", the largest |difference| to the identity's PSNR over the group, on the
            first images.
        """
        model = copy.deepcopy(self._state.model).eval()
        self._state.average.copy_to(model)
        totals, step = Totals(), self._state.step
        for start in range(0, len(self._images), _BATCH_SIZE):
            image = to_float(self._images[start : start + _BATCH_SIZE])
            positions = range(start, start + len(image))
            noise = draw_noise(positions, tuple(image.shape[1:]), 0).to(image.device)
            latent = model.encode(image)
            sample = model.decode(latent, noise=noise).clamp(-1, 1)
            totals.add("psnr", psnr(sample, image))
            measure_loss(model, image, noise, latent, totals)
            if start == 0:
                self._show(image, sample)
                few = slice(_TURNED)
                for g in model.group:
                    turned = model.decode(
                        model.act(g, latent[few]), noise=g.act_on_image(noise[few])
                    )
                    undone = g.inverse.act_on_image(turned).clamp(-1, 1)
                    totals.add(f"turned {g}", psnr(undone, image[few]))
        by_element = {g.name: float(totals.mean(f"turned {g}")) for g in model.group}
        measured = {
            "psnr": float(totals.mean("psnr")),
            "held_out_loss": sum(float(totals.mean(f"loss {i}")) for i in range(TIME_BINS))
            / TIME_BINS,
            "worst_gap_db": max(abs(by_element["identity"] - p) for p in by_element.values()),
        }
        if self._tracker:
            curves = {
                f"held_out/{name.removeprefix('held_out_')}": measured[name] for name in measured
            }
            self._tracker.log_metrics(step, curves)
        return measured

    def _show(self, image: Tensor, sample: Tensor) -> None:
        if not self._tracker:
            return
        from efae.report.card import draw_reconstructions  # matplotlib, of rank 0 alone

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"step-{self._state.step:08d}.png"
            draw_reconstructions(image[:_PICTURED].cpu(), sample[:_PICTURED].cpu(), path)
            self._tracker.log_figure(path, f"reconstructions/{path.name}")
