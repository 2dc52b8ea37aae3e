"""Images sampled by a generator and decoded by the tokenizer of its latents.

Image number i depends on (seed, i) and on the batch's size only, the latter by rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from efae.evaluation.measures import draw_noise
from efae.generation.network import Generator
from efae.generation.sampling import Guidance, sample_latents
from efae.model.autoencoder import Autoencoder
from efae.model.precision import Precision, at_precision

_LATENT_NOISE, _IMAGE_NOISE = 0, 1
"""Streams of noise."""


@dataclass(frozen=True)
class ImageSampler:
    """A generator and a tokenizer on one device, in evaluation mode.

    Attributes:
        generator: Generator of latents.
        tokenizer: Autoencoder that made the latents it was trained on.
        seed: Seed of all images.
        precision: Precision of the generator's arithmetic; the tokenizer has its own.
    """

    generator: Generator
    tokenizer: Autoencoder
    seed: int = 0
    precision: Precision = "fp32"

    @torch.no_grad()
    def draw(
        self, positions: Sequence[int], labels: Sequence[int] | None, guidance: Guidance
    ) -> Float[Tensor, "n c h w"]:
        """Draw the images of these numbers, on the device; white is 1, black -1.

        Args:
            positions: Numbers of the images.
            labels: Class of each image; None for a generator without classes.
            guidance: Sampler steps and guidance.

        Raises:
            ValueError: The guidance needs what the generator lacks.
        """
        device = next(self.generator.parameters()).device
        noise = draw_noise(positions, self.generator.shape, self.seed, _LATENT_NOISE).to(device)
        label = None if labels is None else torch.tensor(list(labels), device=device)
        with at_precision(self.precision, device):
            latent = sample_latents(self.generator, noise, label, guidance)
        data, f = self.tokenizer.config.data, self.tokenizer.config.model.downsampling
        shape = data.channels, latent.shape[-2] * f, latent.shape[-1] * f
        noise = draw_noise(positions, shape, self.seed, _IMAGE_NOISE).to(device)
        return self.tokenizer.decode(latent.float(), noise=noise)
