"""Our autoencoder as a diffusers model, with the calling convention of AutoencoderKL.

Code for latent diffusion trains and samples on it unchanged, and pipelines save and load it.
Latents are those of `Autoencoder.encode`, scaled already: scaling_factor is 1, shift_factor 0.
A saved pipeline names this module, and diffusers loads it only where the caller has imported it.

The decoder is a flow, so an image also depends on noise. `decode` draws it from the generator that
it receives; without one, from a fixed seed, the same for every image, which makes `decode` a
function of each latent alone.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import (
    AutoencoderMixin,
    DecoderOutput,
    DiagonalGaussianDistribution,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import accelerate_utils, torch_utils
from jaxtyping import Float
from torch import Tensor

from efae.config import forms as configuration
from efae.model import pretrained
from efae.model.autoencoder import Autoencoder
from efae.model.stored_files import CONFIG
from efae.symmetry import Element, Group, Representation

_HALVES = (torch.bfloat16, torch.float16)
_CHANGE_NOTHING = {
    *("cache_dir", "disable_mmap", "force_download", "local_files_only", "low_cpu_mem_usage"),
    *("max_memory", "offload_folder", "offload_state_dict", "proxies", "revision", "token"),
    "use_safetensors",
}
"""Options on downloads and memory that pipelines pass to every model; ignored."""


class AutoencoderEFAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """An `Autoencoder` that diffusers can use as an AutoencoderKL.

    Args:
        efae: Model, whose weights are shared; or a configuration as a dict, for random weights.

    Attributes:
        autoencoder: Model.
        decoding_steps: Steps of the sampler; None: the configuration's. Not saved.
        decoding_seed: Seed of the noise if `decode` receives no generator. Not saved.
        tile_sample_min_size: Side of a tile, in pixels, after `enable_tiling`; see
            `Autoencoder.encode`. Not saved.

    Raises:
        ValueError: The configuration cannot be built, or its pixels per latent cell are no power
            of two.
    """

    config_name = CONFIG
    _supports_group_offloading = False  # our modules use each other's weights
    _repeated_blocks = ("Block", "ConvolutionBlock")  # of `compile_repeated_blocks`

    def __init__(self, efae: Autoencoder | dict[str, Any]):
        super().__init__()
        if not isinstance(efae, Autoencoder):
            efae = Autoencoder(configuration.from_dict(efae)).eval()
        described = pretrained.describe_latent(efae.config, efae.representation)
        if "block_out_channels" not in described:
            raise ValueError(
                f"model.downsampling={efae.config.model.downsampling}: pipelines of diffusers"
                " compute the pixels of a latent cell as a power of two; use efae without them"
            )
        self.register_to_config(efae=asdict(efae.config), **described)
        self.autoencoder = efae
        self.decoding_steps: int | None = None
        self.decoding_seed = 0
        self.use_slicing: bool = False
        self.use_tiling: bool = False
        self.tile_sample_min_size = max(512, efae.config.model.downsampling)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks, as `Autoencoder.compile_blocks` does, with options of torch.compile.

        Raises:
            ValueError: As that of `ModelMixin`.
        """
        super().compile_repeated_blocks(*args, **kwargs)
        self.autoencoder.compiled = True

    @property
    def group(self) -> Group:
        """Group that acts on images and latents."""
        return self.autoencoder.group

    @property
    def representation(self) -> Representation:
        """Representation by which the group acts on latents."""
        return self.autoencoder.representation

    def act(
        self, element: Element | Sequence[Element] | Tensor, z: Float[Tensor, "b dim lh lw"]
    ) -> Float[Tensor, "b dim lh lw"]:
        """Return the latent of the transformed image; one element, or one per example."""
        return self.autoencoder.act(element, z)

    @accelerate_utils.apply_forward_hook
    def encode(
        self, x: Float[Tensor, "b c h w"], return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode images in [-1, 1] to the distribution of their latents.

        With bottleneck "rms" it is a point: `sample` returns the mode. A fine-tuned AutoencoderKL
        has its own posterior. Images of any size are taken and padded as in `Autoencoder.encode`.

        Raises:
            ValueError: The images have another number of channels than the model, or its layers
                are offloaded one by one.
        """
        self._check_offloading()
        with self._precision():
            parts = [
                self.autoencoder.encode_posterior(part.to(self.dtype), tile=self._tile)
                for part in self._slices(x)
            ]
        mean = torch.cat([latent for latent, _ in parts]).to(self.dtype)
        spreads = [spread for _, spread in parts if spread is not None]
        spread = torch.cat(spreads).to(mean) if spreads else torch.zeros_like(mean)
        posterior = DiagonalGaussianDistribution(
            torch.cat([mean, 2 * spread.log()], 1), deterministic=not spreads
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @accelerate_utils.apply_forward_hook
    def decode(
        self,
        z: Float[Tensor, "b dim lh lw"],
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        size: tuple[int, int] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents to images near [-1, 1], without gradients.

        Args:
            z: Latents from `encode` or a diffusion model, acted on or not.
            return_dict: Whether to return a DecoderOutput instead of a tuple.
            generator: Generator of the noise, or one per example; None: `decoding_seed`.
            size: Size to crop to, as in `Autoencoder.decode`.

        Raises:
            ValueError: The size does not belong to the latents, or the model's layers are offloaded
                one by one.
        """
        self._check_offloading()
        wide = torch.promote_types(self.dtype, torch.float32)
        f, colours = self.autoencoder.config.model.downsampling, self.config["in_channels"]
        shape = (len(z), colours, z.shape[-2] * f, z.shape[-1] * f)
        if generator is None:
            fixed = torch.Generator().manual_seed(self.decoding_seed)
            noise = torch.randn((1, *shape[1:]), generator=fixed).to(z.device).expand(shape)
        else:
            noise = torch_utils.randn_tensor(shape, generator=generator, device=z.device)
        with self._precision():
            parts = [
                self.autoencoder.decode(
                    latent.to(wide), self.decoding_steps, start.to(wide), size=size, tile=self._tile
                )
                for latent, start in zip(self._slices(z), self._slices(noise), strict=True)
            ]
        sample = torch.cat(parts).to(self.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Float[Tensor, "b c h w"],
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode at the images' size, from the mode or a sample of the posterior."""
        posterior: DiagonalGaussianDistribution = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        height, width = sample.shape[-2:]
        return self.decode(z, return_dict, generator, (height, width))

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        card: str = "",
        **kwargs: Any,
    ) -> None:
        """Write the folder that `Autoencoder.save_pretrained` writes, always as one file.

        Args:
            save_directory: Folder, created if missing; a model in it is replaced.
            is_main_process: Whether to write; False for the other processes of a training.
            save_function: Ignored.
            safe_serialization: Must be True.
            variant: Must be None.
            max_shard_size: Ignored.
            push_to_hub: Must be False; call the method of that name instead.
            use_flashpack: Must be False.
            card: Text of README.md.
            kwargs: No other options are accepted.

        Raises:
            ValueError: An option is unknown or unsupported.
        """
        asked = {"variant": variant, "push_to_hub": push_to_hub, "use_flashpack": use_flashpack}
        _refuse_unknown({**asked, "safe_serialization=False": not safe_serialization, **kwargs})
        if is_main_process:
            self.autoencoder.save_pretrained(Path(save_directory), card)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, **kwargs: Any
    ) -> "AutoencoderEFAE":
        """Load a model from a local folder, in evaluation mode, without gradients.

        Args:
            pretrained_model_name_or_path: Folder; nothing is downloaded.
            kwargs: Options of diffusers: `subfolder`; `torch_dtype` or `dtype` to convert the
                weights to, by default and with "auto" as saved; `device_map`, a device or {"":
                device}. Options on downloads and memory are ignored.

        Raises:
            ValueError: The folder was changed since it was saved, or holds a pickle; or an option
                is unknown, no dtype or no device.
        """
        if pretrained_model_name_or_path is None:
            raise ValueError("from_pretrained needs the folder that save_pretrained wrote")
        folder = Path(pretrained_model_name_or_path) / (kwargs.pop("subfolder", None) or "")
        dtypes = [kwargs.pop(name, None) for name in ("torch_dtype", "dtype")]
        device_map = kwargs.pop("device_map", None)
        _refuse_unknown(
            {name: value for name, value in kwargs.items() if name not in _CHANGE_NOTHING}
        )
        dtype = _read_dtype(dtypes[1] or dtypes[0])
        loaded = Autoencoder.from_pretrained(folder, _read_device(device_map))
        return cls(loaded.to(dtype=dtype)).eval()

    def _check_offloading(self) -> None:
        # Our modules use each other's weights, which hooks on each module alone do not bring back.
        if any(parameter.device.type == "meta" for parameter in self.parameters()):
            raise ValueError(
                f"{pretrained.CLASS_NAME}: its weights are on device meta, as after"
                " enable_sequential_cpu_offload, which it does not support: use"
                " enable_model_cpu_offload"
            )

    @property
    def _tile(self) -> int | None:
        return self.tile_sample_min_size if self.use_tiling else None

    @contextmanager
    def _precision(self) -> Generator[None]:
        """Compute in the dtype of the weights, but for the bottleneck and the sampler, in fp32.

        In fp16, activations of some fine-tuned autoencoders overflow, SDXL's for one: their weights
        are widened meanwhile, as pipelines widen those of an AutoencoderKL with force_upcast.
        """
        start = self.autoencoder.config.start
        overflows = start.is_diffusers and json.loads(start.architecture).get("force_upcast")
        if self.dtype is torch.float16 and overflows:
            self.autoencoder.float()
            try:
                yield
            finally:
                self.autoencoder.half()
        elif self.dtype in _HALVES:
            with torch.autocast(self.device.type, dtype=self.dtype):
                yield
        else:
            yield

    def _slices(self, batch: Tensor) -> tuple[Tensor, ...]:
        return tuple(batch[i : i + 1] for i in range(len(batch))) if self.use_slicing else (batch,)


def _read_dtype(wanted: Any) -> torch.dtype | None:
    """Return the dtype to convert weights to; None: as saved."""
    if wanted is None or wanted == "auto":
        return None
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ValueError(
            f"torch_dtype={wanted!r}: give a floating-point dtype, such as torch.float16, or"
            ' "auto" for the saved one'
        )
    return wanted


def _read_device(device_map: Any) -> str:
    found = device_map.get("") if hasattr(device_map, "get") else device_map
    try:
        return "cpu" if found is None else str(torch.device(found))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map={device_map!r}: names no device here; give one for the whole model, such"
            ' as "cpu" or "cuda:0"'
        ) from error


def _refuse_unknown(options: dict[str, Any]) -> None:
    if unknown := sorted(name for name, value in options.items() if value):
        raise ValueError(f"{', '.join(unknown)}: no such option of {pretrained.CLASS_NAME}")
