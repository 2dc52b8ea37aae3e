"""The loss that makes a pretrained autoencoder equivariant.

The decoder reconstructs gx from rho(g) E(x), as in EQ-VAE (Kouzelis et al. 2025, arXiv:2502.09509),
whose rho moves cells alone; level `regularized` adds the pair term |E(gx) - rho(g) E(x)|^2 on the
encoder. Image and latent may be shrunk together (2502.09509; Skorokhodov et al. 2025,
arXiv:2502.14831), and an anchor keeps the latents near those of the encoder before fine-tuning. KL
and noise are those of the autoencoder itself (Rombach et al. 2022, arXiv:2112.10752).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from efae.model.autoencoder import Autoencoder
from efae.model.objective import Draws, Perceptual, draw, pair_error, sample_posterior, scale
from efae.symmetry.group import act_on_grid


class FineTuning(nn.Module):
    """The loss as a module around the model, with the interface of `Objective`.

    Args:
        model: Model of kind "diffusers"; in training mode, every batch updates its latent scale.
        perceptual: Perceptual loss of the reconstruction; None for none.
        original: Model before fine-tuning, to stay near to; None if the anchor has no weight.
    """

    def __init__(
        self,
        model: Autoencoder,
        perceptual: Perceptual | None = None,
        original: Autoencoder | None = None,
    ):
        super().__init__()
        self.model = model
        self.perceptual = perceptual
        # In a list, which keeps it out of the weights that are trained, averaged and saved.
        self._original = [original] if original else []

    def forward(
        self, image: Float[Tensor, "b c h w"], draws: Draws | torch.Generator
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Return the loss of each example, and t = 1, where a decoder without flow works.

        Args:
            image: Images in [-1, 1].
            draws: Draws of these images, or a generator to make them with, on the images' device.
        """
        model = self.model
        weights, bottleneck = model.config.loss, model.bottleneck
        if isinstance(draws, torch.Generator):
            draws = draw(model.config, tuple(image.shape), draws)
        mean, latent, nats = sample_posterior(model, image, draws.latent_noise)
        acted, terms = mean, weights.kl_weight * nats
        if self._original:
            terms = terms + model.config.start.anchor_weight * self._drift(image, mean)
        if draws.element is not None:
            latent, acted = model.act(draws.element, latent), model.act(draws.element, mean)
            image = act_on_grid(model.group, draws.element, image)
        if model.config.model.level == "regularized" and not model.config.freezes_latent:
            pair = pair_error(model.bounded(image), acted, bottleneck.mean_power())
            terms = terms + weights.pair_weight * pair
        if model.training and not model.config.freezes_latent:
            bottleneck.update_power(mean)
        if draws.cells is not None:
            image, latent = scale(image, latent, draws.cells)
        t = torch.ones_like(draws.t)
        output = model.predict(image, t, latent).float()
        error = (output - image).abs() if weights.reconstruction == "l1" else (output - image) ** 2
        if self.perceptual is not None:
            terms = terms + weights.perceptual_weight * self.perceptual(output, image)
        return error.mean((1, 2, 3)) + terms, t

    def _drift(self, image: Tensor, mean: Tensor) -> Tensor:
        """Return |E(x) - E0(x)|^2 over the latent's power, by example."""
        (original,) = self._original
        with torch.no_grad():
            before = self.model.to_irreps(original.encoder(image)).float()
            # Not the original's: its scaling factor may never have been measured.
            power = self.model.bottleneck.mean_power().clamp(min=1e-6)
        return (mean - before).square().mean((1, 2, 3)) / power
