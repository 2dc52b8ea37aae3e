"""Batches and samples, and how a sample's bytes become a row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from data_pipelines.images.codec import decode_into
from data_pipelines.loading.options import Crop
from data_pipelines.shards.latent_bits import BitAction, torch_dtype
from data_pipelines.shards.latent_format import LatentFormat, read_bits
from efae.symmetry import Element

_CROP, _ELEMENT = 0, 1


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch.

    Raises:
        AttributeError: A batch of latents has no `image`, one of images no `latent` or `element`.
    """

    values: torch.Tensor
    """(b, C, H, W); b = 0 in some ragged last batches."""
    key: list[str]
    members: dict[str, list[bytes]]
    """Members that the loader's options name, by extension."""
    elements: list[Element] | None = field(default=None, repr=False)

    @property
    def image(self) -> torch.Tensor:
        """uint8 (b, C, H, W), a view of (b, H, W, C) memory."""
        if self.elements is not None:
            raise AttributeError("a batch of latents has no image: use batch.latent")
        return self.values

    @property
    def latent(self) -> torch.Tensor:
        """(b, dim, h, w) in the set's dtype, each acted on by its `element`."""
        if self.elements is None:
            raise AttributeError("a batch of images has no latent: use batch.image")
        return self.values

    @property
    def element(self) -> list[Element]:
        """Group element that acted on each latent; the identity without `augment`."""
        if self.elements is None:
            raise AttributeError("a batch of images has no element: only latents are acted on")
        return self.elements


@dataclass(frozen=True)
class Sample:
    """One sample of a set.

    Raises:
        AttributeError: A latent has no `image`, an image no `latent`.
    """

    key: str
    values: torch.Tensor = field(repr=False)
    """(C, H, W)."""
    is_latent: bool = field(default=False, repr=False)

    @property
    def image(self) -> torch.Tensor:
        """uint8 (C, H, W), at the image's own size."""
        if self.is_latent:
            raise AttributeError("a latent has no image: use sample.latent")
        return self.values

    @property
    def latent(self) -> torch.Tensor:
        """(dim, h, w) in the set's dtype."""
        if not self.is_latent:
            raise AttributeError("an image has no latent: use sample.image")
        return self.values


class SampleForm(Protocol):
    """How samples of one kind are decoded; thread-safe."""

    @property
    def shapes(self) -> Sequence[tuple[int, int, int]]:
        """Shape of a row of `dtype`, in each bucket."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def draw(self, epoch: int, sample: int) -> Any:
        """Draw this sample's random choice in this epoch; the same at any rank and world size."""
        ...

    def decode(self, row: np.ndarray, data: bytes, drawn: Any, /) -> None:
        """Decode into `row`; raise ValueError if the data are damaged."""
        ...

    def make_batch(
        self,
        rows: torch.Tensor,
        key: list[str],
        members: dict[str, list[bytes]],
        drawn: Sequence[Any],
    ) -> Batch:
        """Make a batch of decoded rows."""
        ...


@dataclass(frozen=True)
class ImageForm:
    """Images, uint8 (H, W, C), cropped to the size of their bucket."""

    shapes: Sequence[tuple[int, int, int]]
    crop: Crop
    seed: int
    dtype = np.dtype(np.uint8)
    decode = staticmethod(decode_into)

    def draw(self, epoch: int, sample: int) -> tuple[float, float]:
        """Draw the crop's place in the image: (down, right), each in [0, 1)."""
        if self.crop == "center":
            return 0.5, 0.5
        down, right = _generator(self.seed, epoch, sample, _CROP).random(2)
        return float(down), float(right)

    def make_batch(
        self,
        rows: torch.Tensor,
        key: list[str],
        members: dict[str, list[bytes]],
        drawn: Sequence[tuple[float, float]],
    ) -> Batch:
        return Batch(rows.permute(0, 3, 1, 2), key, members)


class LatentForm:
    """Bits of latents (dim, h, w), each acted on by one group element, or by none.

    Args:
        form: Format of the set.
        augment: Whether to draw an element for each sample, anew in every epoch.
        seed: Seed of the draw.
    """

    def __init__(self, form: LatentFormat, augment: bool, seed: int):
        dim, height, width = form.shape
        self.shapes, self.dtype = [(dim, height, width)], form.bits
        self._form, self._act, self._augment, self._seed = form, BitAction(form), augment, seed

    def draw(self, epoch: int, sample: int) -> Element:
        group = self._act.group
        if not self._augment:
            return group.identity
        return group[int(_generator(self._seed, epoch, sample, _ELEMENT).integers(len(group)))]

    def decode(self, row: np.ndarray, data: bytes, drawn: Element) -> None:
        self._act(drawn, read_bits(data, self._form), row)

    def make_batch(
        self,
        rows: torch.Tensor,
        key: list[str],
        members: dict[str, list[bytes]],
        drawn: Sequence[Element],
    ) -> Batch:
        return Batch(rows.view(torch_dtype(self._form)), key, members, list(drawn))


def _generator(seed: int, epoch: int, sample: int, purpose: int) -> np.random.Generator:
    key = np.array([seed, epoch], np.uint64)
    counter = np.array(
        [sample, purpose, 0, 2**64 - 1], np.uint64
    )  # never a counter of the epoch order
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
