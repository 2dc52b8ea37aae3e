"""Encoder and sampler by precision, and the noise that a sampler's seed stands for."""

from typing import Any, get_args

import torch

from benchmarks.gpu.models import imagenet, wake
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.timing import median_ms
from efae.model.autoencoder import Autoencoder
from efae.model.precision import Precision, at_precision


@torch.no_grad()
def measure(rows: Rows, batch: int) -> None:
    """Add rows by precision: images per second that are encoded, and decoded in 1, 2, 4 steps."""
    config, device = imagenet(rows.smoke), rows.device
    model = wake(Autoencoder(config)).to(device).eval().requires_grad_(False)
    repeats = (1, 1) if rows.smoke else (4, 2)

    def run(batch: int, precision: Precision) -> dict[str, Any]:
        shape = (batch, config.data.channels, *config.data.image_size)
        image, noise = torch.rand(shape, device=device) * 2 - 1, torch.randn(shape, device=device)
        row: dict[str, Any] = {"precision": precision}
        with at_precision(precision, device):
            ms = median_ms(lambda: model.encode(image), device, *repeats)
            row["encode_images_per_s"] = round(batch / ms * 1e3, 1)
            latent = model.encode(image)
            for steps in (1, 2, 4):
                ms = median_ms(
                    lambda n=steps: model.decode(latent, steps=n, noise=noise), device, *repeats
                )
                row[f"decode_{steps}_images_per_s"] = round(batch / ms * 1e3, 1)
            ms = median_ms(
                lambda: model.decode(latent[:1], steps=1, noise=noise[:1]), device, *repeats
            )
            row["decode_1_of_one_image_ms"] = round(ms, 2)
        return row

    for precision in get_args(Precision):
        rows.add_halving("sampler", precision, batch, lambda b, p=precision: run(b, p))
    if not rows.smoke:  # a compiler takes a minute
        model.compile_blocks()
        rows.add_halving("sampler", "bf16, compiled", batch, lambda b: run(b, "bf16"))

    def draw_on_host() -> dict[str, Any]:
        shape = (batch, config.data.channels, *config.data.image_size)
        generator = torch.Generator().manual_seed(0)
        ms = median_ms(lambda: torch.randn(shape, generator=generator).to(device), device, *repeats)
        return {"batch": batch, "ms": round(ms, 2)}

    rows.add("sampler", "noise of decode(seed=...), drawn on the host", draw_on_host)
