"""The equivariant flow autoencoder: encode, act, decode, training loss.

z = E(x); the decoder's flow models p(x | z); a group element acts on both. Latents are handed out
in the basis of the irreps and at unit scale per irrep, whatever the network works with inside.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from efae.config import Config
from efae.model import flow, pretrained
from efae.model.bottleneck import Bottleneck
from efae.model.decoder import Decoder
from efae.model.encoder import Encoder
from efae.model.sampler import Field, Method, guide, integrate, time_grid
from efae.symmetry import GROUPS, TRIVIAL, Element, Representation
from efae.symmetry.any_angle import check_turns_by_any_angle
from efae.symmetry.learned_basis import Basis


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
            invariant=colours,
        )
    invariant = representation.multiplicities["a1"]
    if invariant < colours:
        raise ValueError(
            f"{representation} has {invariant} invariant channels (A1) for {colours} colours: a"
            " flat patch is symmetric, so only A1 can carry its colour; raise representation.dim"
            f" ({knobs.dim}), or lower representation.rotation_dims ({knobs.rotation_dims}) or"
            f" representation.chirality_split ({knobs.chirality_split})"
        )
    return representation


def check_model(config: Config) -> Representation:
    """The representation of a configuration whose model can be built; no weight is made.

    Raises:
        ValueError: the model cannot be built.
    """
    representation = build_representation(config)
    height, width = config.data.image_size
    if height != width and representation.group.swaps_sides:
        raise ValueError(
            f"data.resolution={height, width}: not square, but representation.group="
            f"{representation.group} holds quarter turns; use square images, or group flips or"
            " mirror"
        )
    if config.loss.rotation_probability:
        check_turns_by_any_angle(representation)
    return representation


class Autoencoder(nn.Module):
    """Encoder and decoder of one configuration.

    Attributes:
        config: all of it.
        group: the group that acts.
        representation: how it acts on latents.

    Raises:
        ValueError: the configuration cannot be built.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.representation = check_model(config)
        self.group = self.representation.group
        layers = self.group if config.model.level == "exact" else TRIVIAL
        self.encoder = Encoder(layers, self.representation, config.data, config.model)
        self.decoder = Decoder(
            layers,
            self.representation,
            config.data,
            config.model,
            null_condition=config.flow.condition_drop > 0,
        )
        self.bottleneck = Bottleneck(
            self.representation, config.model.bottleneck, config.model.latent_noise
        )
        self.basis = None
        if config.representation.learned_basis:
            self.basis = Basis(self.representation.dim)

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write the model as config.json and safetensors, see `efae.model.pretrained`.

        Args:
            folder: made if need be; a model in it is replaced.
            card: becomes README.md.
        """
        pretrained.write_pretrained(
            folder, self.state_dict(), self.config, self.representation, card
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "Autoencoder":
        """The model in a local folder, for inference: evaluation mode, no gradients.

        Args:
            folder: written by `save_pretrained` here, or by the adapter for diffusers.
            device: as torch names devices.

        Raises:
            ValueError: the folder is not as it was saved, or holds a pickle; says which file.
        """
        weights, config = pretrained.read_pretrained(folder)
        model = cls(config)
        pretrained.check_weights(folder, weights, model.state_dict())
        model.load_state_dict(weights, assign=True)  # keeps half precision as it was saved
        return model.to(device).eval().requires_grad_(False)

    def encode(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Image in [-1, 1] to its latent, at unit root mean square per irrep over the training set.

        Raises:
            ValueError: the image has another shape than the model was built for.
        """
        expected = (self.config.data.channels, *self.config.data.image_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"image of shape {tuple(image.shape)}: this model takes (batch, {expected[0]},"
                f" {expected[1]}, {expected[2]}) in [-1, 1]; resize it"
            )
        return self.bottleneck.hand_out(self.bounded(image))

    def act(
        self, element: Element | Sequence[Element] | Tensor, latent: Float[Tensor, "b dim lh lw"]
    ) -> Float[Tensor, "b dim lh lw"]:
        """rho(g) on channels and grid; one element, or one per example."""
        return self.representation.act(element, latent)

    def spread(self) -> Float[Tensor, "dim 1 1"]:
        """Standard deviation of the posterior around `encode`; 0 of bottleneck "rms", a point."""
        bottleneck = self.bottleneck
        if bottleneck.kind == "rms":
            return bottleneck.power.new_zeros(self.representation.dim, 1, 1)
        spread = (bottleneck.log_variance / 2).exp()[bottleneck.copy_of_channel, None, None]
        return bottleneck.hand_out(spread)

    def velocity(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim lh lw"] | None,
    ) -> Float[Tensor, "b c h w"]:
        """dx_t / dt at (x_t, t in (0, 1]) given the latent, or under the null condition for None.

        Raises:
            ValueError: no null condition was trained.
        """
        keep = None
        if latent is None:
            if self.config.flow.condition_drop == 0:
                raise ValueError(
                    "flow.condition_drop=0: this model has no null condition to guide with; train"
                    " one with flow.condition_drop=0.1"
                )
            f, dim = self.config.model.downsampling, self.representation.dim
            b, _, height, width = x_t.shape
            latent = x_t.new_zeros(b, dim, height // f, width // f)
            keep = torch.zeros(b, dtype=torch.bool, device=x_t.device)
        bounded = self.from_irreps(self.bottleneck.take_in(latent))
        output = self.decoder(x_t, t, bounded, keep)
        return flow.velocity_from(output, x_t, t, self.config.flow.prediction)

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b dim lh lw"],
        steps: int | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        seed: int | None = None,
        *,
        sampler: Method | None = None,
        times: Float[Tensor, "points"] | Sequence[float] | None = None,
        guidance_scale: float | None = None,
        visit: Callable[[float, Tensor], None] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """A sample of p(image | latent); what is not given is as the configuration's flow says.

        Args:
            latent: from `encode`, acted on or not, or any grid (b, dim, h / f, w / f).
            steps: of the sampler.
            noise: where the flow starts; standard normal.
            seed: draw the noise from this seed instead.
            sampler: "euler", "midpoint" or "heun".
            times: of the sampler, falling from 1 to 0, instead of `steps`.
            guidance_scale: of classifier-free guidance; 1 is none.
            visit: is shown (t, x_t) along the way.

        Raises:
            ValueError: neither or both of noise and seed are given, or a value out of range.
        """
        if (noise is None) == (seed is None):
            raise ValueError("decode needs either noise or seed, so that it can be repeated")
        if noise is None:
            f = self.config.model.downsampling
            sides = (latent.shape[-2] * f, latent.shape[-1] * f)
            generator = torch.Generator().manual_seed(seed)  # type: ignore[arg-type]
            noise = torch.randn(
                (len(latent), self.config.data.channels, *sides), generator=generator
            ).to(latent.device)
        knobs = self.config.flow
        if times is None:
            times = time_grid(
                knobs.sampler_steps if steps is None else steps,
                power=knobs.sampler_power,
                shift=knobs.sampler_shift,
            )

        def given(latent: Tensor | None) -> Field:
            # Not len(x), which would fix the batch where torch.export traces this.
            return lambda x, t: self.velocity(x, x.new_full(x.shape[:1], t), latent)

        scale = knobs.guidance_scale if guidance_scale is None else guidance_scale
        field = guide(given(latent), given(None), scale, knobs.guidance_interval)
        return integrate(field, noise, times, sampler or knobs.sampler, visit)

    def bounded(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """The latent at the scale that the network works with, in the basis of the irreps."""
        return self.bottleneck.bound(self.to_irreps(self.encoder(image)))

    def to_irreps(self, latent: Tensor) -> Tensor:
        """From the basis that the networks work in."""
        return latent if self.basis is None else self.basis.to_irreps(latent)

    def from_irreps(self, latent: Tensor) -> Tensor:
        """The inverse of `to_irreps`."""
        return latent if self.basis is None else self.basis.from_irreps(latent)
