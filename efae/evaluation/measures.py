"""Definitions of the measures, and their totals over images and processes.

Images are in [-1, 1]: the range of PSNR and SSIM is 2. Both are torchmetrics', per image. Totals
are sums over images, so neither the batch size nor the number of processes changes a result.

torchmetrics takes two seconds to import, and a driver that only checks and submits never needs it:
the functions that use it import it.
"""

import json
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from efae.symmetry import D4, Element

SMALLEST_SIDE = 6
"""Pixels that SSIM needs, which mirrors five beyond each border."""
LARGEST_PSNR = 126.02
"""Largest PSNR, dB: images are equal up to rounding, with a mean squared error of 1e-12."""
_SYMMETRIC_UNDER = {
    "mirror": ("flip_h",),
    "half_turn": ("rot180",),
    "diagonal": ("transpose",),
    "all_elements": ("transpose", "flip_h", "flip_v"),
}


def check_size(height: int, width: int) -> None:
    """Raise ValueError for images that SSIM cannot take."""
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"images of {height} x {width} pixels: SSIM takes {SMALLEST_SIDE} x {SMALLEST_SIDE} or"
            " more; measure larger images"
        )


def to_float(image: Tensor) -> Tensor:
    """Convert uint8 pixels to float in [-1, 1]."""
    return image.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Convert floats to uint8 pixels; values beyond [-1, 1] become the nearest ones."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def psnr(image: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Return the peak signal-to-noise ratio per image, dB, at most LARGEST_PSNR; range 2."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ratio = peak_signal_noise_ratio(
        image, other, data_range=2.0, reduction="none", dim=(1, 2, 3), base=10.0
    )
    return ratio.clamp(max=LARGEST_PSNR)


def masked_psnr(
    image: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"], mask: Float[Tensor, "h w"]
) -> Float[Tensor, "b"]:
    """Return `psnr` with each pixel weighed by the mask.

    20 log10(2) - 10 log10(sum m d^2 / sum m), like EQ-R of StyleGAN3 (Karras et al. 2021,
    arXiv:2106.12423) with a fixed range.
    """
    error = (mask * (image - other).square()).sum((1, 2, 3)) / (mask.sum() * image.shape[1])
    return (10 * torch.log10(4 / error)).clamp(max=LARGEST_PSNR)


def ssim(image: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Return the structural similarity per image (Wang et al. 2004), Gaussian window 11, sigma 1.5.

    torchmetrics reflects the borders, so images may be as small as SMALLEST_SIDE.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    score = structural_similarity_index_measure(
        image, other, gaussian_kernel=True, sigma=1.5, kernel_size=11, reduction="none",
        data_range=2.0, k1=0.01, k2=0.03,
    )  # fmt: skip
    assert isinstance(score, Tensor)
    return score.reshape(len(image))  # torchmetrics drops the axis of a single image


def gradient_energy(image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Return the mean squared difference of adjacent pixels, per image; ratios are sharpness."""
    return image.diff(dim=-1).square().mean((1, 2, 3)) + image.diff(dim=-2).square().mean((1, 2, 3))


def draw_noise(
    positions: Iterable[int], shape: tuple[int, ...], seed: int, stream: int = 0
) -> Float[Tensor, "b c h w"]:
    """Draw standard normal noise for images of a set; that of image i depends on (seed, stream, i).

    Args:
        positions: Positions of the images in the whole set.
        shape: Shape (c, h, w) of one image.
        seed: Seed of the whole set.
        stream: Number of an independent stream of noise.
    """
    return torch.stack(
        [torch.randn(shape, generator=_generator(seed, stream, i)) for i in positions]
    )


def _generator(*numbers: int) -> torch.Generator:
    # torch seeds its CPU generator with 32 bits.
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]))


def symmetric_images(image: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b c h w"]]:
    """Make the images exactly symmetric, in each way that their shape allows; returned by name.

    Half of each image is copied onto the other half, for the left-right mirror, the half turn, a
    diagonal, and all eight elements (or the four that keep a non-square shape). "constant" is each
    image's mean colour.
    """
    square = image.shape[-2] == image.shape[-1]
    found: dict[str, Tensor] = {}
    for kind, names in _SYMMETRIC_UNDER.items():
        elements = [D4[name] for name in names if square or not D4[name].swaps_sides]
        if elements:
            found[kind] = image
            for element in elements:
                found[kind] = _fold(found[kind], element)
    found["constant"] = image.mean((-2, -1), keepdim=True).expand_as(image).contiguous()
    return found


def _fold(image: Tensor, involution: Element) -> Tensor:
    """Make an image symmetric under an involution by copying one half onto the other."""
    place = torch.arange(image.shape[-2] * image.shape[-1], device=image.device)
    place = place.view(image.shape[-2:])
    keep = place <= involution.act_on_image(place)
    return torch.where(keep, image, involution.act_on_image(image))


class Totals:
    """Sums over images by name, float64; the same on every process once gathered."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Float[Tensor, "b *rest"]) -> None:
        """Add one value per image."""
        total = values.double().sum(0)  # on the device: the host need not wait
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + len(values)

    def mean(self, name: str) -> Float[Tensor, "*rest"]:
        """Return the mean over all images that were added."""
        return self._sums[name].cpu() / self._counts[name]

    def count(self, name: str) -> int:
        """Return the number of images that were added."""
        return self._counts.get(name, 0)

    def to_host(self) -> "Totals":
        """Return the same totals on the CPU."""
        moved = Totals()
        moved._sums = {name: total.cpu() for name, total in self._sums.items()}
        moved._counts = dict(self._counts)
        return moved

    def merge(self, other: "Totals") -> None:
        """Add the totals of other images."""
        for name, total in other._sums.items():
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + other._counts[name]

    def gather(self, device: torch.device) -> None:
        """Add the totals of the other processes, if torch.distributed is initialised."""
        mine = {
            name: [self._counts[name], cast(Any, total).tolist()]
            for name, total in self._sums.items()
        }
        self._sums, self._counts = {}, {}
        for theirs in gather_json(mine, device):
            for name, (count, total) in theirs.items():
                value = torch.tensor(total, dtype=torch.float64)
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + count


def gather_json(value: Any, device: torch.device) -> list[Any]:
    """Gather a JSON value from every process, in the order of the ranks.

    Values travel as text: torch's own `all_gather_object` pickles them.
    """
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in gather_vectors(text, device)]


def gather_vectors(vector: Shaped[Tensor, "n"], device: torch.device) -> list[Tensor]:
    """Gather a vector from every process, in the order of the ranks; their lengths may differ.

    Args:
        vector: Vector in the memory of the host, of one type on all processes.
        device: Device that the process group communicates from.

    Returns:
        The vectors, in the memory of the host.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [vector]
    gather = cast(Any, dist).all_gather
    vector = vector.to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    gather(sizes, torch.tensor([len(vector)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.cat([vector, vector.new_zeros(longest - len(vector))])
    parts = [torch.empty_like(padded) for _ in sizes]
    gather(parts, padded)
    return [part[: int(size)].cpu() for part, size in zip(parts, sizes, strict=True)]
