"""The equivariant flow autoencoder: encode, act, decode.

z = E(x); the decoder's flow models p(x | z); a group element acts on both. `encode` returns latents
in the basis of the irreps and at unit scale per irrep, whatever basis and scale the network uses;
or, if they stay those of a pretrained encoder, at the scale that its diffusion models know.
"""

import operator
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from efae.config import Config
from efae.model import flow, pretrained
from efae.model.bottleneck import Bottleneck
from efae.model.execution.compilation import Compilable
from efae.model.execution.padding import check_size, crop, pad_to_cells
from efae.model.execution.tiling import decode_in_tiles, encode_in_tiles
from efae.model.networks import diffusers_vae, transformer, unet
from efae.model.octic.layers import expanded_once
from efae.model.precision import Precision, at_precision
from efae.model.representation import check_model
from efae.model.sampler import Field, Method, guide, integrate, time_grid
from efae.symmetry import TRIVIAL, Element
from efae.symmetry.learned_basis import Basis

if TYPE_CHECKING:
    from efae.exchange.hub import HubFile


class Autoencoder(Compilable):
    """Encoder and decoder of one configuration.

    Attributes:
        config: Configuration of the experiment.
        group: Group that acts on images and latents.
        representation: Representation of the group on the channels of a latent.
        precision: Precision in which `encode`, `decode` and `velocity` run the networks; None
            leaves it to the caller (`torch.autocast`). Latents and images are float32 throughout.
        symmetrize: Whether both networks are averaged over the group, which makes any model exactly
            equivariant and as many times slower as the group has elements; except a decoder that
            is exact already.
        has_flow: Whether the decoder follows a velocity field from noise; else it ignores noise,
            seed and everything about the sampler.
        tile: Value of `tile` for `encode`, `decode` and `velocity` where they are given None.
        compiled: Whether `compile_blocks` has compiled the blocks of both networks.

    Raises:
        ValueError: The configuration cannot be built.
    """

    precision: Precision | None = None
    tile: int | None = None
    _warned_of_padding = False

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.representation = check_model(config)
        self.group = self.representation.group
        layers = self.group if config.model.level == "exact" else TRIVIAL
        self.symmetrize = config.start.symmetrize
        self.has_flow = config.model.kind != "diffusers"
        architecture = config.start.architecture
        recomputes = config.training.activation_memory < 1
        if config.model.kind == "diffusers":
            self.encoder = diffusers_vae.Encoder(architecture, recomputes)
            self.decoder = diffusers_vae.Decoder(architecture, recomputes)
        else:
            networks = {"transformer": transformer, "unet": unet}[config.model.kind]
            sizes = (layers, self.representation, config.data, config.model)
            if config.start.is_diffusers:
                self.encoder = diffusers_vae.Encoder(architecture, recomputes)
            else:
                self.encoder = networks.Encoder(*sizes)
            self.decoder = networks.Decoder(*sizes, config.flow)
        self.bottleneck = Bottleneck(
            self.representation,
            config.model.bottleneck,
            config.model.latent_noise,
            self.encoder.factors if config.keeps_latents else None,
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

    def push_to_hub(
        self, repo_id: str, *, credit: str = "", token: str | None = None, **options: Any
    ) -> "list[HubFile]":
        """Send the model to the Hugging Face Hub, or list what would be sent.

        Its repository receives the files of `save_pretrained`, a model card and ONNX programs, in
        one commit; `options` can also name a Space for the page that flips its latents. Files of an
        earlier upload are replaced.

        Args:
            repo_id: Repository, USER/NAME; created if missing.
            credit: Credit of the training images, for card and page.
            token: Token that may write, neither logged nor stored; None takes HF_TOKEN or that of
                `hf auth login`.
            options: Fields of `efae.exchange.hub.HubOptions`: licence, report, space, onnx,
                private, revision, commit_message, dry_run.

        Returns:
            The files that were sent, or with dry_run=True would be: repository, path and bytes.

        Raises:
            ValueError: A name is malformed, there is no token, a package is missing, or a
                repository holds other things. Then nothing was sent.
            ConnectionError: The Hub refuses or does not answer.
        """
        from efae.exchange.hub import HubOptions
        from efae.web_page.publication import publish

        stored = pretrained.pack_model(self.state_dict(), self.config, self.representation)
        return publish(stored, repo_id, HubOptions(**options), credit=credit, token=token)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "Autoencoder":
        """Load a model from a local folder for inference: evaluation mode, no gradients.

        Weights keep the dtype that they were saved in; those in half precision need
        `torch.autocast`.

        Args:
            folder: Folder that `save_pretrained` wrote, here or in the adapter for diffusers.
            device: Device, as torch names them.

        Raises:
            CheckpointError: The folder is not as it was saved, or holds a pickle; names the file.
        """
        return cls.restore(pretrained.read_folder(folder), device, widens=False)

    @classmethod
    def restore(
        cls, stored: pretrained.StoredModel, device: str = "cpu", widens: bool = True
    ) -> "Autoencoder":
        """The model that was read from a folder, for inference: evaluation mode, no gradients.

        Args:
            stored: Model as its folder holds it; its weights become the model's own.
            device: Device, as torch names them.
            widens: Whether weights in half precision become float32.

        Raises:
            CheckpointError: Its weights are not its configuration's.
            ValueError: Its configuration cannot be built.
        """
        model = cls(stored.config)
        pretrained.check_weights(stored, model.state_dict())
        model.load_state_dict(stored.weights, assign=True)
        return model.to(device, model._dtype if widens else None).eval().requires_grad_(False)

    def encode(
        self, image: Float[Tensor, "b c h w"], *, tile: int | None = None
    ) -> Float[Tensor, "b dim lh lw"]:
        """Encode an image in [-1, 1] of any height and width.

        Over the training images, each irrep of the latent has unit root mean square; latents that
        stay those of a pretrained encoder (`config.keeps_latents`) are those of its pipelines.

        Where f = `config.model.downsampling` does not divide a side, the pixels at its edges are
        repeated up to the next multiple, half of the missing ones on each side, and the first time
        a warning names the sizes. An odd pixel goes to the bottom or right, so flips and turns of
        such an image commute with `encode` only up to a shift by this pixel.
        ``decode(..., size=(h, w))`` crops the padding off.

        Args:
            image: Images.
            tile: Side, in pixels, of the overlapping squares of the image that the encoder sees one
                at a time, to bound memory; a multiple of f. None: `self.tile`, or, if that is
                None too, the whole image at once. The result is the same to rounding if
                `config.model.kind` is "unet", and an approximation without visible seams if it is
                "transformer", see `efae.model.execution.tiling`.

        Raises:
            ValueError: The image is no batch of one image or more, has no pixels, no floating-point
                dtype, or another number of channels than the model; or the tile is no multiple of
                f, or too small.
        """
        padded = self._pad(image)

        def bounded(image: Tensor) -> Tensor:
            return self.bounded(image, tile)

        return self.normalize(self.call_filled(bounded, padded))

    def encode_posterior(
        self, image: Float[Tensor, "b c h w"], *, tile: int | None = None
    ) -> tuple[Float[Tensor, "b dim lh lw"], Float[Tensor, "b dim lh lw"] | None]:
        """Encode images to latents and the standard deviations of the posteriors around them.

        Args:
            image: Images.
            tile: Side of a tile in pixels, as `encode` takes it.

        Returns:
            What `encode` returns, and deviations; None for points. Those of a pretrained encoder
            are its own for each image as it is and, in a learned basis, for each channel alone.

        Raises:
            ValueError: As that of `encode`.
        """
        bottleneck = self.bottleneck
        if bottleneck.kind == "posterior" and tile is None and self.tile is None:
            padded = self._pad(image)
            with self._at_precision(padded.device):
                bounded, spread = self.posterior(padded)
            if spread is not None:
                spread = bottleneck.normalize_spread(spread, self.basis)
            return self.normalize(bounded), spread
        latent = self.encode(image, tile=tile)
        if bottleneck.kind != "kl":
            return latent, None
        spread = (bottleneck.log_variance / 2).exp()[bottleneck.copy_of_channel, None, None]
        return latent, bottleneck.normalize(spread).expand_as(latent)

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of latents and images: float32, or that of wider weights."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    def _cast(self, given: Tensor) -> Tensor:
        """Cast what a network takes to the dtype of its weights, or where autocast acts, wider."""
        weights = next(self.parameters()).dtype
        if given.dtype == weights == self._dtype:
            return given
        casts = self.precision in ("bf16", "fp16") or torch.is_autocast_enabled(given.device.type)
        return given.to(self._dtype if casts else weights)

    def _pad(self, image: Tensor) -> Tensor:
        """Check images, and pad them to whole cells; the first time with a warning."""
        _require_floats(
            "image",
            image,
            "encode takes a tensor of floats in [-1, 1]; for bytes, image / 127.5 - 1",
        )
        _require_batch("image", image, self.config.data.channels)
        image, f = self._cast(image), self.config.model.downsampling
        padded = pad_to_cells(image, f)
        if padded is not image and not self._warned_of_padding:
            self._warned_of_padding = True
            (h, w), (height, width) = image.shape[2:], padded.shape[2:]
            warnings.warn(
                f"images of {h} x {w} pixels are padded to {height} x {width}: model.downsampling="
                f"{f} does not divide them; decode(..., size=({h}, {w})) crops the padding off"
                " (this warning is shown once per model)",
                stacklevel=3,
            )
        return padded

    def act(
        self, element: Element | Sequence[Element] | Tensor, latent: Float[Tensor, "b dim lh lw"]
    ) -> Float[Tensor, "b dim lh lw"]:
        """Act on channels and grid of a latent by one element, or by one element per example."""
        return self.representation.act(element, latent)

    def velocity(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim lh lw"] | None,
        tile: int | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return dx_t / dt at (x_t, t in (0, 1]) given the latent; None is the null condition.

        Raises:
            ValueError: The latent is None, but no null condition was trained; or the tile, as
                `decode` takes it, is no multiple of f, or too small.
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

        def predict(x_t: Tensor, t: Tensor, latent: Tensor, keep: Tensor | None) -> Tensor:
            return self.predict(x_t, t, latent, keep, tile)

        with self._at_precision(x_t.device):
            # The flow's state stays in the dtype of the noise; only the network rounds it.
            given = (self._cast(part) for part in (x_t, t, self.denormalize(latent)))
            output = self.call_filled(predict, *given, keep)
        return flow.velocity_from(output, x_t, t, self.config.flow.prediction)

    def predict(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        latent: Float[Tensor, "b dim lh lw"],
        keep: Bool[Tensor, "b"] | None = None,
        tile: int | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return what the decoder predicts, at the scale of `bounded` latents.

        Args:
            x_t: Noisy images.
            t: Times in (0, 1].
            latent: Bounded latents, in the basis of the irreps.
            keep: Whether the decoder sees the latent, not the null condition; None: always.
            tile: Side of a tile in pixels, as `decode` takes it.
        """
        tile = self.tile if tile is None else tile

        def once(x_t: Tensor, latent: Tensor) -> Tensor:
            latent = self.from_irreps(latent)
            if tile is None:
                return self.decoder(x_t, t, latent, keep)
            return decode_in_tiles(self.decoder, x_t, t, latent, keep, tile)

        if not self.symmetrize or (self.has_flow and self.config.model.level == "exact"):
            return once(x_t, latent)
        views = [
            g.inverse.act_on_image(once(g.act_on_image(x_t), self.act(g, latent)))
            for g in self.group
        ]
        return torch.stack(views).mean(0)

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b dim lh lw"],
        steps: int | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        seed: int | torch.Generator | None = None,
        *,
        sampler: Method | None = None,
        times: Float[Tensor, "points"] | Sequence[float] | None = None,
        guidance_scale: float | None = None,
        visit: Callable[[float, Tensor], None] | None = None,
        size: tuple[int, int] | None = None,
        tile: int | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Draw a sample of p(image | latent); None takes a value from the configuration's flow.

        Args:
            latent: Latent from `encode`, acted on or not, or any grid (b, dim, h / f, w / f), of
                any floating-point dtype.
            steps: Number of sampler steps.
            noise: Standard normal noise that the flow starts from, f pixels per cell and side.
            seed: Seed of the noise, instead of `noise`, which is drawn on the CPU and so the same
                for every device; or a generator, which draws on its own device.
            sampler: Solver, "euler", "midpoint" or "heun".
            times: Times of the sampler, falling from 1 to 0, instead of `steps`.
            guidance_scale: Scale of classifier-free guidance; 1 is none.
            visit: Function that receives (t, x_t) at every time of the sampler.
            size: Height and width of the image that was encoded (exchanged if an element that
                exchanges them acted on the latent), to crop off the padding of `encode`.
            tile: Side, in pixels, of the overlapping squares that the decoder computes one at a
                time, as in `encode`. Here attention in the middle of a "unet" is approximated, too.

        Raises:
            ValueError: Neither or both of noise and seed are given, a value is out of range, the
                latent is no batch of this model's latents or has no floating-point dtype, noise or
                size do not belong to a latent of this shape, or the tile does not to the model.
        """
        if self.has_flow and (noise is None) == (seed is None):
            raise ValueError("decode needs either noise or seed, so that it can be repeated")
        _require_floats("latent", latent, "decode takes the tensor of floats that encode returns")
        _require_batch("latent", latent, self.representation.dim)
        latent = self._cast(latent)
        f, (rows, columns) = self.config.model.downsampling, latent.shape[-2:]
        shape = (latent.shape[0], self.config.data.channels, rows * f, columns * f)
        if size is not None:
            check_size(size, (rows, columns), f)
        if not self.has_flow:
            sample = self._decode_at_once(latent, shape, tile)
            return sample if size is None else crop(sample, size)
        if noise is None:
            if not isinstance(seed, torch.Generator):
                seed = torch.Generator().manual_seed(operator.index(cast(int, seed)))
            noise = torch.randn(shape, generator=seed, device=seed.device).to(latent.device)
        elif noise.shape != shape:
            raise ValueError(
                f"noise of shape {tuple(noise.shape)}: a latent of shape {tuple(latent.shape)}"
                f" starts from noise of {shape}"
            )
        defaults = self.config.flow
        if times is None:
            times = time_grid(
                defaults.default_steps if steps is None else steps,
                power=defaults.sampler_power,
                shift=defaults.sampler_shift,
            )

        def given(latent: Tensor | None) -> Field:
            # x.shape[0], unlike len(x), does not fix the batch size when torch.export traces this.
            return lambda x, t: self.velocity(x, x.new_full(x.shape[:1], t), latent, tile)

        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        field = guide(given(latent), given(None), scale, defaults.guidance_interval)
        # A compiled block expands its weights in the same pass that multiplies by them.
        with nullcontext() if self.compiled else expanded_once(self.decoder):
            sample = integrate(field, noise, times, sampler or defaults.sampler, visit)
        return sample if size is None else crop(sample, size)

    def _decode_at_once(self, latent: Tensor, shape: tuple[int, ...], tile: int | None) -> Tensor:
        bounded = self.denormalize(latent)
        ignored = latent.new_zeros(shape)
        with self._at_precision(latent.device):
            sample = self.predict(ignored, ignored[:, 0, 0, 0], bounded, tile=tile)
        return sample.to(self._dtype)

    def bounded(
        self, image: Float[Tensor, "b c h w"], tile: int | None = None
    ) -> Float[Tensor, "b dim lh lw"]:
        """Encode an image at the network's own scale, in the basis of the irreps."""
        tile = self.tile if tile is None else tile
        f = self.config.model.downsampling

        def once(image: Tensor) -> Tensor:
            if tile is None:
                return self.to_irreps(self.encoder(image))
            return self.to_irreps(encode_in_tiles(self.encoder, image, tile, f))

        with self._at_precision(image.device):
            encoded = self._average(image, once) if self.symmetrize else once(image)
        return self.bottleneck.bound(encoded)

    def posterior(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor | None]:
        """Return the bounded latents of a pretrained encoder, and its posteriors' deviations.

        Args:
            image: Images in [-1, 1].

        Returns:
            Means in the basis of the irreps and, in the encoder's own basis, standard deviations,
            of the images as they are; None for an encoder without posterior.
        """
        mean, log_variance = self.encoder.posterior(image)
        spread = None if log_variance is None else (log_variance.float() / 2).exp()
        if self.symmetrize:
            return self.bounded(image), spread
        return self.bottleneck.bound(self.to_irreps(mean)), spread

    def _average(self, image: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean of rho(g)^-1 E(gx) over the group."""
        views = [self.act(g.inverse, encode(g.act_on_image(image))) for g in self.group]
        return torch.stack(views).mean(0)

    def _at_precision(self, device: torch.device) -> AbstractContextManager[None]:
        return at_precision(self.precision, device) if self.precision else nullcontext()

    def normalize(self, bounded: Tensor) -> Tensor:
        """Map bounded latents to those that `encode` returns."""
        return self.bottleneck.normalize(bounded, self.basis)

    def denormalize(self, latent: Tensor) -> Tensor:
        """Invert `normalize`."""
        return self.bottleneck.denormalize(latent, self.basis)

    def to_irreps(self, latent: Tensor) -> Tensor:
        """Map a latent from the basis of the networks to the basis of the irreps."""
        return latent if self.basis is None else self.basis.to_irreps(latent)

    def from_irreps(self, latent: Tensor) -> Tensor:
        """Invert `to_irreps`."""
        return latent if self.basis is None else self.basis.from_irreps(latent)


def _require_floats(name: str, value: Any, expected: str) -> None:
    """Raise a ValueError, which says what is expected, unless the value is a tensor of floats."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} of {found}: {expected}")


def _require_batch(name: str, value: Tensor, channels: int) -> None:
    """Raise a ValueError unless the value is a batch of grids, none of them empty."""
    if value.ndim != 4 or value.shape[1] != channels or 0 in value.shape:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)}: this model takes (batch, {channels}, height,"
            " width), one or more of any height and width"
        )
