"""The equivariant flow autoencoder: encode, act, decode.

z = E(x); the decoder's flow models p(x | z); a group element acts on both. `encode` returns latents
in the basis of the irreps and at unit scale per irrep, whatever basis and scale the network uses.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from efae.config import Config
from efae.model import flow, pretrained
from efae.model.bottleneck import Bottleneck
from efae.model.networks import transformer, unet
from efae.model.octic.layers import expanded_once
from efae.model.precision import Precision, at_precision
from efae.model.sampler import Field, Method, guide, integrate, time_grid
from efae.symmetry import GROUPS, TRIVIAL, Element, Representation
from efae.symmetry.any_angle import check_turns_by_any_angle
from efae.symmetry.learned_basis import Basis


def build_representation(config: Config) -> Representation:
    """Build the representation that a configuration describes.

    Raises:
        ValueError: No such representation exists, or it has fewer invariant channels than the
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
    """Check that a model can be built, without allocating weights, and return its representation.

    Raises:
        ValueError: The model cannot be built.
    """
    representation = build_representation(config)
    height, width = config.data.image_size
    if height != width and representation.group.swaps_sides:
        raise ValueError(
            f"data.resolution={height, width}: not square, but representation.group="
            f"{representation.group} has quarter turns; use square images, or group flips or"
            " mirror"
        )
    if config.loss.rotation_probability:
        check_turns_by_any_angle(representation)
    return representation


class Autoencoder(nn.Module):
    """Encoder and decoder of one configuration.

    Attributes:
        config: Configuration of the experiment.
        group: Group that acts on images and latents.
        representation: Representation of the group on the channels of a latent.
        precision: Precision in which `encode`, `decode` and `velocity` run the networks; None
            leaves it to the caller (`torch.autocast`). Latents and images are float32 throughout.

    Raises:
        ValueError: The configuration cannot be built.
    """

    precision: Precision | None = None

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.representation = check_model(config)
        self.group = self.representation.group
        layers = self.group if config.model.level == "exact" else TRIVIAL
        networks = {"transformer": transformer, "unet": unet}[config.model.kind]
        self.encoder = networks.Encoder(layers, self.representation, config.data, config.model)
        self.decoder = networks.Decoder(
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
        """Write the model as one folder, see `efae.model.pretrained`.

        Args:
            folder: Folder, created if need be; a model in it is replaced.
            card: Text of README.md.
        """
        pretrained.pack_model(self.state_dict(), self.config, self.representation).write(
            Path(folder), card
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "Autoencoder":
        """Load a model from a local folder for inference: evaluation mode, no gradients.

        Args:
            folder: Folder that `save_pretrained` wrote, here or in the adapter for diffusers.
            device: Device, as torch names them.

        Raises:
            CheckpointError: The folder is not as it was saved, or holds a pickle; names the file.
        """
        return cls.restore(pretrained.read_folder(folder), device)

    @classmethod
    def restore(cls, stored: pretrained.StoredModel, device: str = "cpu") -> "Autoencoder":
        """The model that was read from a folder, for inference: evaluation mode, no gradients.

        Args:
            stored: Model as its folder holds it; its weights become the model's own.
            device: Device, as torch names them.

        Raises:
            CheckpointError: Its weights are not its configuration's.
            ValueError: Its configuration cannot be built.
        """
        model = cls(stored.config)
        pretrained.check_weights(stored, model.state_dict())
        model.load_state_dict(stored.weights, assign=True)  # keeps half precision as it was saved
        return model.to(device).eval().requires_grad_(False)

    def encode(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Encode an image in [-1, 1].

        Over the training images, each irrep of the latent has unit root mean square.

        Raises:
            ValueError: The image does not have the shape that the model was built for.
        """
        expected = (self.config.data.channels, *self.config.data.image_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"image of shape {tuple(image.shape)}: this model takes (batch, {expected[0]},"
                f" {expected[1]}, {expected[2]}) in [-1, 1]; resize it"
            )
        return self.bottleneck.normalize(self.bounded(image))

    def act(
        self, element: Element | Sequence[Element] | Tensor, latent: Float[Tensor, "b dim lh lw"]
    ) -> Float[Tensor, "b dim lh lw"]:
        """Act on channels and grid of a latent by one element, or by one element per example."""
        return self.representation.act(element, latent)

    def spread(self) -> Float[Tensor, "dim 1 1"]:
        """Return the posterior's standard deviation around `encode`; 0 but for bottleneck "kl"."""
        bottleneck = self.bottleneck
        if bottleneck.kind != "kl":
            return bottleneck.power.new_zeros(self.representation.dim, 1, 1)
        spread = (bottleneck.log_variance / 2).exp()[bottleneck.copy_of_channel, None, None]
        return bottleneck.normalize(spread)

    def velocity(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim lh lw"] | None,
    ) -> Float[Tensor, "b c h w"]:
        """Return dx_t / dt at (x_t, t in (0, 1]) given the latent; None is the null condition.

        Raises:
            ValueError: The latent is None, but no null condition was trained.
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
        bounded = self.from_irreps(self.bottleneck.denormalize(latent))
        with self._at_precision(x_t.device):
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
        """Draw a sample of p(image | latent); None takes a value from the configuration's flow.

        Args:
            latent: Latent from `encode`, acted on or not, or any grid (b, dim, h / f, w / f).
            steps: Number of sampler steps.
            noise: Standard normal noise that the flow starts from.
            seed: Seed of the noise, instead of `noise`.
            sampler: Solver, "euler", "midpoint" or "heun".
            times: Times of the sampler, falling from 1 to 0, instead of `steps`.
            guidance_scale: Scale of classifier-free guidance; 1 is none.
            visit: Function that receives (t, x_t) at every time of the sampler.

        Raises:
            ValueError: Neither or both of noise and seed are given, or a value is out of range.
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
            # x.shape[0], unlike len(x), does not fix the batch size when torch.export traces this.
            return lambda x, t: self.velocity(x, x.new_full(x.shape[:1], t), latent)

        scale = knobs.guidance_scale if guidance_scale is None else guidance_scale
        field = guide(given(latent), given(None), scale, knobs.guidance_interval)
        with expanded_once(self.decoder):
            return integrate(field, noise, times, sampler or knobs.sampler, visit)

    def bounded(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Encode an image at the network's own scale, in the basis of the irreps."""
        with self._at_precision(image.device):
            encoded = self.encoder(image)
        return self.bottleneck.bound(self.to_irreps(encoded))

    def _at_precision(self, device: torch.device) -> AbstractContextManager[None]:
        return at_precision(self.precision, device) if self.precision else nullcontext()

    def to_irreps(self, latent: Tensor) -> Tensor:
        """Map a latent from the basis of the networks to the basis of the irreps."""
        return latent if self.basis is None else self.basis.to_irreps(latent)

    def from_irreps(self, latent: Tensor) -> Tensor:
        """Invert `to_irreps`."""
        return latent if self.basis is None else self.basis.from_irreps(latent)
