"""The equivariant flow autoencoder: encode, act, decode, training loss.

z = E(x); the decoder's flow models p(x | z). The training loss draws a group element g per
example and fits p(gx | rho(g) z); at level `exact` every layer commutes with the group, so g would
change nothing and is not drawn.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from efae.config import Config
from efae.model import flow
from efae.model.decoder import Decoder
from efae.model.encoder import Encoder
from efae.symmetry import GROUPS, TRIVIAL, Element, Representation
from efae.symmetry.group import act_on_grid


def build_representation(config: Config) -> Representation:
    """The representation that a configuration names.

    Raises:
        ValueError: no such representation exists, or it has fewer invariant channels than the
            image has colours.
    """
    knobs, colours = config.representation, config.data.channels
    group = GROUPS[knobs.group]
    if knobs.multiplicities is not None:
        representation = Representation(
            group, **dict(zip(("a1", "a2", "b1", "b2", "e"), knobs.multiplicities, strict=True))
        )
        if representation.dim != knobs.dim:
            raise ValueError(
                f"representation.multiplicities={knobs.multiplicities} has"
                f" {representation.dim} channels, but representation.dim={knobs.dim}"
            )
    else:
        representation = Representation.from_split(
            group=group,
            dim=knobs.dim,
            rotation_dims=knobs.rotation_dims,
            chirality_split=knobs.chirality_split,
        )
    invariant = representation.multiplicities["a1"]
    if invariant < colours:
        raise ValueError(
            f"{representation} has {invariant} invariant channels (A1) for {colours} colours: a"
            " flat patch is symmetric, so only A1 can carry its colour; lower"
            f" representation.rotation_dims ({knobs.rotation_dims}) or"
            f" representation.chirality_split ({knobs.chirality_split})"
        )
    return representation


class Autoencoder(nn.Module):
    """Encoder and decoder of one configuration.

    Raises:
        ValueError: the configuration cannot be built.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.representation = build_representation(config)
        self.group = self.representation.group
        height, width = config.data.image_size
        if height != width and self.group.swaps_sides:
            raise ValueError(
                f"data.resolution={height, width}: not square, but representation.group="
                f"{self.group} holds quarter turns; use square images, or group flips or mirror"
            )
        layers = self.group if config.model.level == "exact" else TRIVIAL
        sizes = {
            "image_size": config.data.image_size,
            "channels": config.data.channels,
            "patch_size": config.model.patch_size,
            "downsampling": config.model.downsampling,
            "num_heads": config.model.num_heads,
            "mlp_ratio": config.model.mlp_ratio,
        }
        self.encoder = Encoder(
            layers,
            self.representation,
            hidden_size=config.model.encoder_hidden_size,
            depth=config.model.encoder_depth,
            **sizes,
        )
        self.decoder = Decoder(
            layers,
            self.representation,
            hidden_size=config.model.hidden_size,
            depth=config.model.depth,
            **sizes,
        )

    def encode(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Image in [-1, 1] to its latent, at unit root mean square per example.

        One scale for all channels and cells commutes with the orthogonal action.
        """
        expected = (self.config.data.channels, *self.config.data.image_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"image of shape {tuple(image.shape)}: this model takes (batch, {expected[0]},"
                f" {expected[1]}, {expected[2]}) in [-1, 1]; resize it"
            )
        latent = self.encoder(image)
        latent = latent.to(torch.promote_types(latent.dtype, torch.float32))
        return latent * torch.rsqrt(latent.square().mean((1, 2, 3), keepdim=True) + 1e-6)

    def act(self, element: Element | Sequence[Element] | Tensor, latent: Tensor) -> Tensor:
        """rho(g) on channels and grid; one element, or one per example."""
        return self.representation.act(element, latent)

    def velocity(self, x_t: Tensor, t: Float[Tensor, "b"], latent: Tensor) -> Tensor:
        """dx_t / dt at (x_t, t) given the latent."""
        output = self.decoder(x_t, t, latent)
        return flow.velocity_from(output, x_t, t, self.config.flow.prediction)

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b dim lh lw"],
        steps: int | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        seed: int | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """A sample of p(image | latent).

        Args:
            latent: from `encode`, acted on or not.
            steps: Euler steps; flow.sampler_steps of the configuration when not given.
            noise: where the flow starts; standard normal.
            seed: draw the noise from this seed instead.
        """
        if (noise is None) == (seed is None):
            raise ValueError("decode needs either noise or seed, so that it can be repeated")
        if noise is None:
            data = self.config.data
            shape = (len(latent), data.channels, *data.image_size)
            generator = torch.Generator().manual_seed(seed)  # type: ignore[arg-type]
            noise = torch.randn(shape, generator=generator).to(latent.device)
        return flow.sample_euler(
            lambda x, t: self.velocity(x, t, latent), noise, steps or self.config.flow.sampler_steps
        )

    def forward(
        self, image: Float[Tensor, "b c h w"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """The training loss per example, and the t of each.

        Per example it draws t, noise, latent noise and, at level `objective`, a group element.
        """
        count, device = len(image), image.device
        t = flow.draw_time(count, self.config.flow, generator, device)
        noise = torch.randn(image.shape, generator=generator, device=device)
        latent = self.encode(image)
        if self.config.model.level == "objective":
            chosen = torch.randint(len(self.group), (count,), generator=generator, device=device)
            latent = self.act(chosen, latent)
            image = act_on_grid(self.group, chosen, image)
        jitter = torch.randn(latent.shape, generator=generator, device=device)
        latent = latent + self.config.model.latent_noise * jitter
        x_t = flow.interpolate(image, noise, t)
        return flow.flow_loss(self.velocity(x_t, t, latent), image, noise), t
