"""The laws on the device in every precision, and the distance from float64 on the CPU."""

import copy
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.gpu.models import imagenet, photographs, quickstart, wake
from benchmarks.gpu.rows import Rows
from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.objective import Objective
from efae.model.precision import Precision, at_precision
from efae.training.compilation import prepare

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def measure(rows: Rows) -> None:
    """Add a row per model and precision; all are relative errors but the group law's."""
    models = (
        ("quickstart", quickstart(rows.smoke), 4),
        ("imagenet_256", imagenet(rows.smoke), 1),
        ("photos_f8_b", photographs(rows.smoke), 1),
    )
    for name, config, count in models:
        check = Check(config, count, rows.device)
        for precision in PRECISIONS:
            rows.add("exactness", f"{name}, {precision}", lambda c=check, p=precision: c.measure(p))
        if name == "quickstart" and not rows.smoke:
            check.compile()
            for precision in ("fp32", "bf16"):
                label = f"{name}, {precision}, blocks compiled"
                rows.add("exactness", label, lambda c=check, p=precision: c.measure(p))


class Check:
    """A model with random weights, images, and what float64 makes of them.

    Args:
        config: Configuration of the model.
        count: Number of images.
        device: Device to check.
    """

    @torch.no_grad()
    def __init__(self, config: Config, count: int, device: torch.device):
        torch.manual_seed(0)
        model = wake(Autoencoder(config)).eval().requires_grad_(False)
        shape = (count, config.data.channels, *config.data.image_size)
        generator = torch.Generator().manual_seed(1)
        image = torch.rand(shape, generator=generator) * 2 - 1
        noise = torch.randn(shape, generator=generator)
        x_t, t = 0.4 * image + 0.6 * noise, torch.full((count,), 0.6)
        exact = copy.deepcopy(model).double()
        self.latent = exact.bounded(image.double())
        self.output = exact.decoder(x_t.double(), t.double(), self.latent, None)
        self.device, self.config, self.model = device, config, model.to(device)
        self.image, self.x_t, self.t = image.to(device), x_t.to(device), t.to(device)
        self.given = self.latent.float().to(device)

    def compile(self) -> None:
        """Compile the blocks, as training does."""
        config = with_overrides(self.config, {"training.compile": "blocks"})
        prepare(Objective(self.model), config, self.device, one_pass=True)

    @torch.no_grad()
    def measure(self, precision: Precision) -> dict[str, Any]:
        """Return the errors of all elements of the group, the largest of each kind."""
        model, given = self.model, self.given
        encoder = decoder = law = 0.0
        with at_precision(precision, self.device):
            latent = model.bounded(self.image)
            output = model.decoder(self.x_t, self.t, given, None)
            for g in model.group:
                encoded = model.bounded(g.act_on_image(self.image))
                encoder = max(encoder, relative(encoded, model.act(g, latent)))
                decoded = model.decoder(g.act_on_image(self.x_t), self.t, model.act(g, given), None)
                decoder = max(decoder, relative(decoded, g.act_on_image(output)))
                for h in model.group:
                    difference = model.act(h, model.act(g, given)) - model.act(h @ g, given)
                    law = max(law, float(difference.abs().max()))
        return {
            "encoder_commutes": encoder,
            "decoder_commutes": decoder,
            "group_law": law,
            "encoder_from_float64": relative(latent.cpu(), self.latent),
            "decoder_from_float64": relative(output.cpu(), self.output),
        }


def relative(value: Tensor, expected: Tensor) -> float:
    """Return |value - expected| / |expected|, in the Euclidean norm."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())
