"""Tokenizers of diffusers, wrapped to be evaluated like ours, or read as models of ours."""

import dataclasses
import importlib
import json
import re
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from data_pipelines import storage
from data_pipelines.storage import Location
from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.networks.diffusers_vae import (
    describe,
    name_in_diffusers,
    name_in_efae,
    read_factors,
    read_size,
)
from efae.model.pretrained import StoredModel, check_weights, pack_model
from efae.model.representation import build_representation
from efae.symmetry import D4, Element, Group, Representation

PREFIX = "diffusers:"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_VARIANT = re.compile(r"diffusion_pytorch_model\.([A-Za-z0-9_]+)\.safetensors")
_LATENT_OF: dict[str, Callable[[Any], Tensor]] = {
    "AutoencoderKL": lambda encoded: encoded.latent_dist.mode(),
    "AutoencoderTiny": lambda encoded: encoded.latents,
    "AutoencoderDC": lambda encoded: encoded.latent,
}
"""Classes that can be loaded, and the latent in what their `encode` returns."""


class DiffusersTokenizer(nn.Module):
    """An AutoencoderKL, AutoencoderTiny or AutoencoderDC of diffusers; deterministic both ways.

    Its latent is the one that diffusion models are trained on: what the encoder returns (the mode
    of a posterior), shifted and scaled as pipelines do, by the configuration's `scaling_factor` and
    its `shift_factor`, or `latents_mean` and `latents_std`.
    The group acts as on an image, by moving the cells of the grid: the only action that such a
    latent has by construction.

    Args:
        network: Network, in evaluation mode.
        group: Group that acts on images and latents.

    Attributes:
        group: Group that acts on images and latents.
        representation: Trivial representation: every channel is invariant.
        symmetrize: Whether both networks are averaged over the group, as by `Autoencoder`.
    """

    def __init__(self, network: Any, group: Group = D4):
        super().__init__()
        self.network: Any = network
        self.group = group
        self.symmetrize = False
        settings = network.config
        self.representation = Representation(group, a1=settings.latent_channels)
        self._class = type(network).__name__
        self._factors = read_factors(settings)

    @property
    def channels(self) -> int:
        """Colours of an image."""
        settings = self.network.config
        return int(settings.in_channels)

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell; each stage of the encoder after the first halves the image."""
        return describe({**self.network.config, "_class_name": self._class})[2]

    def check_images(self, channels: int, height: int, width: int) -> None:
        """Raise ValueError for images that this network does not accept."""
        if channels != self.channels:
            raise ValueError(
                f"images of {channels} colours: this {self._class} takes {self.channels}"
            )
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"images of {height} x {width} pixels: this {self._class} needs multiples of"
                f" {self.downsampling}; set such a --resolution"
            )

    def encode(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Encode images in [-1, 1] to latents.

        Raises:
            ValueError: The network does not accept the shape.
        """
        return self._factors.apply(self.bounded(image))

    def bounded(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Encode images at the network's own scale, as `Autoencoder.bounded` does.

        Raises:
            ValueError: The network does not accept the shape.
        """
        self.check_images(*image.shape[1:])
        return self._average(lambda x: _LATENT_OF[self._class](self.network.encode(x)), image)

    def act(
        self, element: Element, latent: Float[Tensor, "b dim lh lw"]
    ) -> Float[Tensor, "b dim lh lw"]:
        """Apply the element to the grid, as to an image."""
        return self.representation.act(element, latent)

    def decode(
        self,
        latent: Float[Tensor, "b dim lh lw"],
        steps: int | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
        seed: int | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Decode to images near [-1, 1]; steps, noise and seed are ignored."""
        return self._average(lambda z: self.network.decode(z).sample, self._factors.undo(latent))

    def _average(self, network: Callable[[Tensor], Tensor], grid: Tensor) -> Tensor:
        """Return the mean of g^-1 N(g x) over the group, if that is asked for, or N(x)."""
        if not self.symmetrize:
            return network(grid)
        views = [g.inverse.act_on_image(network(g.act_on_image(grid))) for g in self.group]
        return torch.stack(views).mean(0)


def load_diffusers(path: str, group: Group = D4, device: str = "cpu") -> DiffusersTokenizer:
    """Load the autoencoder in a folder, in evaluation mode and fp32, without a model hub.

    Args:
        path: Folder, local or on object storage, with config.json and
            diffusion_pytorch_model.safetensors, or instead one variant of it, such as
            diffusion_pytorch_model.fp16.safetensors.
        group: Group that acts on images and latents.
        device: Device, as torch names it.

    Raises:
        ValueError: The package diffusers is missing, or the folder does not hold such a model.
        StorageError: The object storage refuses or does not answer.
    """
    with _fetched(path, with_weights=True) as (folder, name, weights):
        return _load(path, folder, name, weights, group).to(device)


def read_architecture(path: str) -> dict[str, Any]:
    """Read the configuration of the autoencoder in a folder, without its weights.

    Args:
        path: Folder, as `load_diffusers` takes it.

    Raises:
        ValueError: The folder does not hold such a model.
        StorageError: The object storage refuses or does not answer.
    """
    with _fetched(path) as (folder, _, _):
        return json.loads((folder / CONFIG).read_text())


def read_pretrained(config: Config) -> StoredModel:
    """Read the autoencoder that start.model names, as a model of kind "diffusers".

    Raises:
        ValueError: There is no such autoencoder, or a number in it is not finite.
        CheckpointError: Its weights are not its configuration's.
        StorageError: The storage refuses or does not answer.
    """
    # As it is, without an average over the group; a basis is refused at level none.
    based = config.representation.learned_basis or config.start.action == "fitted"
    level = "objective" if based else "none"
    kept = dataclasses.replace(config.model, kind="diffusers", level=level)
    settings = dataclasses.replace(config.start, symmetrize=False)
    config = dataclasses.replace(config, model=kept, start=settings)
    network = load_diffusers(config.start.model.removeprefix(PREFIX)).network
    weights: dict[str, Tensor] = {
        name_in_efae(name): weight for name, weight in network.state_dict().items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)  # of a learned basis
        model = Autoencoder(config)
    factors = read_factors(network.config)
    # The mean square of latents whose mean is the shift, and whose deviation is one over the scale.
    powers = [m**2 + s**-2 for m, s in zip(factors.shift, factors.scale, strict=True)]
    model.bottleneck.power.fill_(fmean(powers))
    expected = model.state_dict()
    weights |= {n: w for n, w in expected.items() if name_in_diffusers(n) is None}
    stored = pack_model(weights, config, model.representation)
    stored = dataclasses.replace(stored, uri=config.start.model)
    check_weights(stored, expected)
    return stored


def read_diffusers(uri: str) -> StoredModel:
    """Read an autoencoder as it is, as a model of kind "diffusers" over the trivial group.

    Its latents are those of its pipelines.

    Args:
        uri: "diffusers:PATH", a folder as `load_diffusers` takes it.

    Raises:
        ValueError, CheckpointError, StorageError: As in `read_pretrained`.
    """
    architecture = read_architecture(uri.removeprefix(PREFIX))
    try:
        colours, channels, f = describe(architecture)
        height, width = read_size(architecture) or (0, 0)
    except ValueError as error:
        raise ValueError(f"{uri}: {CONFIG} {error}") from error
    if not height or height % f or width % f:
        height = width = 32 * f
    settings = {
        "data.channels": colours,
        "data.resolution": height if height == width else (height, width),
        "representation.group": "trivial",
        "representation.dim": channels,
        "representation.multiplicities": (channels, 0, 0, 0, 0),
        "model.kind": "diffusers",
        "model.level": "none",
        "model.bottleneck": "posterior",
        "model.downsampling": f,
        "model.patch_size": min(Config().model.patch_size, f),
        "flow.sampler_steps": 1,
        "start.model": uri,
        "start.train": "decoder",  # an encoder that stays, and so its factors
        "start.architecture": json.dumps(architecture, sort_keys=True),
    }
    stored = read_pretrained(with_overrides(Config(), settings))
    # Latent sets record the settings, and the place of the folder does not decide the latents.
    named = {"start.model": f"{PREFIX}{architecture['_class_name']}"}
    config = with_overrides(stored.config, named)
    packed = pack_model(stored.weights, config, build_representation(config))
    return dataclasses.replace(packed, uri=uri)


@contextmanager
def _fetched(path: str, with_weights: bool = False) -> Generator[tuple[Path, str, str]]:
    """Check a folder, and lend a local one with its files; and its class and its weights' name."""
    location = Location.parse(path)
    if location.path is not None:
        folder = location.path
        if folder.is_file():
            raise ValueError(f"diffusers:{path} is a file: {_explain_single(folder.name)}")
        if not folder.is_dir():
            raise ValueError(
                f"diffusers:{path}: no such folder; models are not downloaded from hubs: fetch it"
                f" where you trust it ({CONFIG} and {WEIGHTS}), then give the folder's path"
            )
        names = {p.relative_to(folder).as_posix() for p in folder.glob(f"vae/{CONFIG}")}
        names |= {p.name for p in folder.iterdir()}
        yield folder, *_check_folder(path, folder, names)
        return
    with tempfile.TemporaryDirectory() as copy:
        folder, sizes = Path(copy), storage.list_files(location)
        if CONFIG in sizes:
            storage.download(location / CONFIG, folder / CONFIG, sizes[CONFIG])
        name, weights = _check_folder(path, folder, set(sizes))
        if with_weights:
            storage.download(location / weights, folder / weights, sizes[weights])
        yield folder, name, weights


def _check_folder(path: str, folder: Path, names: set[str]) -> tuple[str, str]:
    """Return class and weights of the model; ValueError if a folder with these files is refused."""
    if CONFIG not in names:
        hint = ""
        if f"vae/{CONFIG}" in names:
            hint = f"; did you mean diffusers:{path}/vae?"
        elif single := sorted(filter(re.compile(r"[^/]+\.safetensors").fullmatch, names)):
            hint = f", beside {single[0]}: {_explain_single(single[0])}"
        raise ValueError(f"diffusers:{path}: no {CONFIG} in it{hint}")
    try:
        name = str(json.loads((folder / CONFIG).read_text()).get("_class_name"))
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"diffusers:{path}: {CONFIG} is not a configuration of diffusers"
        ) from error
    if name not in _LATENT_OF:
        raise ValueError(
            f"diffusers:{path}: {CONFIG} describes the class {name}; use one of"
            f" {', '.join(_LATENT_OF)}"
        )
    if WEIGHTS in names:
        return name, WEIGHTS
    variants = sorted(filter(_VARIANT.fullmatch, names))
    if len(variants) == 1:
        return name, variants[0]
    others = sorted(names - {CONFIG})
    if variants:
        reason = f"rename one of them to {WEIGHTS}"
    elif single := [other for other in others if other.endswith(".safetensors")]:
        reason = _explain_single(single[0])
    else:
        reason = "other formats are pickles that can run code, so convert them where you trust them"
    raise ValueError(
        f"diffusers:{path}: no {WEIGHTS} in it (found: {', '.join(others) or 'nothing'}); {reason}"
    )


def _explain_single(name: str) -> str:
    """Return what to do with a file of weights that is not named as diffusers names it."""
    return (
        f"weights in several files, or in the format of one file, are not read: where you trust"
        f" them, load them in diffusers (from_single_file({name!r}) for one file), call"
        f" save_pretrained(FOLDER), and give that folder, with {CONFIG} and {WEIGHTS}"
    )


def _load(path: str, folder: Path, name: str, weights: str, group: Group) -> DiffusersTokenizer:
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(
            f"diffusers:{path}: the package diffusers is missing; pip install diffusers"
        ) from error
    try:
        loaded, report = getattr(diffusers, name).from_pretrained(
            folder,
            variant=variant[1] if (variant := _VARIANT.fullmatch(weights)) else None,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AssertionError,
    ) as error:
        raise ValueError(f"diffusers:{path}: cannot be loaded: {error}") from error
    if report["missing_keys"]:  # diffusers draws them at random, and warns
        raise ValueError(f"diffusers:{path}: {weights} lacks {', '.join(report['missing_keys'])}")
    if unknown := sorted(report["unexpected_keys"]):
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"diffusers:{path}: {weights} has {', '.join(unknown[:3])}{more}, which {CONFIG} does"
            " not describe: use the two files of one model"
        )
    for tensor, values in loaded.state_dict().items():
        if not values.isfinite().all():
            raise ValueError(
                f"diffusers:{path}: {weights} has NaN or infinity in {tensor}: use another copy"
            )
    try:
        tokenizer = DiffusersTokenizer(loaded, group)
    except ValueError as error:
        raise ValueError(f"diffusers:{path}: {CONFIG}: {error}") from error
    return tokenizer.eval().requires_grad_(False)
