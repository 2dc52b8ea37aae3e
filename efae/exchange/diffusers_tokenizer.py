"""Tokenizers of diffusers, wrapped so that they can be evaluated like ours."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from efae.symmetry import D4, Element, Group, Representation

WEIGHTS = "diffusion_pytorch_model.safetensors"


class DiffusersTokenizer(nn.Module):
    """An AutoencoderKL of diffusers; deterministic both ways.

    Its latent is the posterior's mode, shifted and scaled as its configuration prescribes for
    diffusion models. The group acts as on an image, by moving the cells of the grid: the only
    action that such a latent has by construction.

    Args:
        network: AutoencoderKL, in evaluation mode.
        group: Group that acts on images and latents.

    Attributes:
        group: Group that acts on images and latents.
        representation: Trivial representation: every channel is invariant.
    """

    def __init__(self, network: Any, group: Group = D4):
        super().__init__()
        self.network: Any = network
        self.group = group
        settings = network.config
        self.representation = Representation(group, a1=settings.latent_channels)
        self._scale = float(settings.get("scaling_factor") or 1.0)
        self._shift = float(settings.get("shift_factor") or 0.0)

    @property
    def channels(self) -> int:
        """Colours of an image."""
        settings = self.network.config
        return int(settings.in_channels)

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell."""
        settings = self.network.config
        return 2 ** (len(settings.block_out_channels) - 1)

    def check_images(self, channels: int, height: int, width: int) -> None:
        """Raise ValueError for images that this network does not accept."""
        if channels != self.channels:
            raise ValueError(
                f"images of {channels} colours: this AutoencoderKL takes {self.channels}"
            )
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"images of {height} x {width} pixels: this AutoencoderKL needs multiples of"
                f" {self.downsampling}; build the shards with such a --resolution"
            )

    def encode(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim lh lw"]:
        """Encode images in [-1, 1] to latents.

        Raises:
            ValueError: The network does not accept the shape.
        """
        self.check_images(*image.shape[1:])
        encoded = self.network.encode(image)
        mode: Tensor = encoded.latent_dist.mode()
        return (mode - self._shift) * self._scale

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
        decoded = self.network.decode(latent / self._scale + self._shift)
        sample: Tensor = decoded.sample
        return sample


def load_diffusers(path: str, group: Group = D4, device: str = "cpu") -> DiffusersTokenizer:
    """Load the AutoencoderKL in a local folder, in evaluation mode and fp32, without downloads.

    Args:
        path: Folder with config.json and diffusion_pytorch_model.safetensors.
        group: Group that acts on images and latents.
        device: Device, as torch names it.

    Raises:
        ValueError: The package diffusers is missing, or the folder does not hold such a model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"diffusers:{path}: no such folder; models are not downloaded here: fetch it where you"
            " trust it (config.json and the .safetensors file), then give the folder's path"
        )
    _check_folder(folder)
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(
            f"diffusers:{path}: the package diffusers is missing; pip install diffusers"
        ) from error
    try:
        loaded = diffusers.AutoencoderKL.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        )
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"diffusers:{path}: cannot be loaded: {error}") from error
    return DiffusersTokenizer(loaded, group).to(device).eval().requires_grad_(False)


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        inside = folder / "vae" / "config.json"
        hint = f"; did you mean diffusers:{inside.parent}?" if inside.is_file() else ""
        raise ValueError(f"diffusers:{folder}: no config.json in it{hint}")
    try:
        name = json.loads(config.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config}: not a configuration of diffusers") from error
    if name != "AutoencoderKL":
        raise ValueError(f"{config}: describes {name}, but only AutoencoderKL can be measured")
    if not (folder / WEIGHTS).is_file():
        others = sorted(p.name for p in folder.iterdir() if p.name != config.name)
        raise ValueError(
            f"diffusers:{folder}: no {WEIGHTS} in it (found: {', '.join(others) or 'nothing'});"
            " other formats are pickles that can run code, so convert them where you trust them"
        )
