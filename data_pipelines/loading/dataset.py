"""A shard set on storage: its samples by number, and loaders over them."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

from data_pipelines.images.codec import decode_image
from data_pipelines.images.tiles import draw_rows, draw_tile
from data_pipelines.loading.batch import ImageForm, LatentForm, Sample, SampleForm
from data_pipelines.loading.buckets import (
    Buckets,
    Size,
    explain_missing_sizes,
    sort_into_buckets,
)
from data_pipelines.loading.cache_folder import choose_cache_dir
from data_pipelines.loading.loader import ShardLoader
from data_pipelines.loading.options import CacheOptions, LoaderOptions, choose_options
from data_pipelines.loading.pixel_cache import PixelCache
from data_pipelines.loading.sample_reader import MemberReader, SampleReader
from data_pipelines.loading.shard_cache import ShardCache
from data_pipelines.shards.chunks import cut_chunks
from data_pipelines.shards.index import Members, ShardIndex, load_index
from data_pipelines.shards.latent_bits import torch_dtype
from data_pipelines.shards.latent_format import EXTENSION, FORMAT, find_format, read_bits
from data_pipelines.storage import Location, LocationLike

_COLUMNS = 12


class ShardDataset(ABC):
    """A shard set; reads only the index until a sample or a batch is requested."""

    _member: str | None = None
    """Extension of the member that samples are decoded from; None: the image."""

    def __init__(self, uri: LocationLike, index: ShardIndex):
        self.uri = str(uri)
        self._base = Location.parse(index.base or uri)
        """Folder of the shards."""
        self.index = index
        self.chunks = cut_chunks(index)
        self._length = sum(len(shard.keys) for shard in index.shards)

    @staticmethod
    def open(uri: LocationLike) -> "ImageSet | LatentSet":
        """Open the shard set at `uri` (a path, s3://, gs://, http://).

        Raises:
            ValueError: The index is missing or damaged; the message says what to do.
        """
        index = load_index(uri)
        return LatentSet(uri, index) if FORMAT in index.provenance else ImageSet(uri, index)

    def __len__(self) -> int:
        return self._length

    def __reduce__(self):  # without open files and locks
        return type(self), (self.uri, self.index)

    def __getitem__(self, number: int) -> Sample:
        """Return one sample, in the order of the shards; as in a list, -1 is the last.

        This is for inspection; training reads much faster from a `loader`.

        Raises:
            IndexError: The set has fewer samples.
            TypeError: The number is a slice, or another value that is no integer.
            ShardError: The sample cannot be read.
        """
        wanted = operator.index(number)
        if not -len(self) <= wanted < len(self):
            raise IndexError(f"sample {wanted} of {self.uri}, which has {len(self)}")
        return self._reader.read_one(wanted % len(self), self._decode)

    @property
    def id(self) -> str:
        """A hash of the content."""
        return self.index.id

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of every image, or None when heights or widths differ."""
        return self.index.image_shape

    @property
    def keys(self) -> list[str]:
        """The key of every sample, in the order of the shards."""
        return [key for shard in self.index.shards for key in shard.keys]

    def columns(self, extension: str | None = None) -> Members:
        """Return the place of each sample's member with this extension; None: the image.

        Raises:
            ValueError: A sample has no such member.
        """
        parts: list[Members] = []
        for shard in self.index.shards:
            part = shard.images() if extension is None else shard.members.get(extension)
            if shard.keys and (part is None or (part.offset < 0).any()):
                key = shard.keys[0 if part is None else int(np.argmax(part.offset < 0))]
                there = sorted({name for shard in self.index.shards for name in shard.members})
                raise ValueError(
                    f"sample {key!r} of {self._base.uri_of(shard.name)} has no member"
                    f" {extension!r}; the set has {', '.join(there)}"
                )
            if part is not None:
                parts.append(part)
        if not parts:
            return Members(*np.zeros((3, 0), np.int64))
        return Members(
            np.concatenate([part.offset for part in parts]),
            np.concatenate([part.size for part in parts]),
            np.concatenate([part.crc32 for part in parts]),
        )

    def loader(
        self,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        *,
        options: CacheOptions | None = None,
        **changes: Any,
    ) -> ShardLoader:
        """Return a loader of the batches of rank `rank` of `world_size`.

        Args:
            global_batch_size: Samples per batch over all ranks; where `world_size` does not divide
                it, some ranks get one more than others.
            rank: Rank of this process, 0 <= rank < world_size.
            world_size: Number of processes that share the set.
            seed: Seed of the order, of random crops and of `augment`; the same on all ranks.
            options: How samples are read; None: the defaults of `LoaderOptions`.
            **changes: Options by name that replace those of `options`: `resolution=256`,
                `crop="random"`, `shuffle=False`, `tail="carry"`, ... `LoaderOptions` has them all.

        Raises:
            ValueError: Sizes do not fit together, images differ in size, the set is empty, an
                option belongs to the other kind of set, `augment` is given and the encoder does
                not commute with the group, or `buckets` and the index has no sizes of images.
            TypeError: There is no option of this name.
        """
        chosen = choose_options(options or LoaderOptions(), **changes)
        if not len(self):
            raise ValueError(f"{self.uri} holds no samples")
        form = self._choose_form(chosen, seed)
        columns = {name: self.columns(name) for name in chosen.members}
        pixels = None
        if room := chosen.pixel_cache_bytes:
            folder = choose_cache_dir(chosen.cache_dir)
            pixels = PixelCache(folder, self.id, len(self), form.shapes[0], room)
        reader = SampleReader(
            self.index,
            self._open_cache(chosen),
            {None: self.columns(self._member), **columns},
            form,
            chosen,
            pixels,
            self._sort_into(chosen.buckets) if chosen.buckets else None,
        )
        return ShardLoader(reader, chosen, global_batch_size, rank, world_size, seed)

    def _sort_into(self, buckets: Sequence[Size]) -> Buckets:
        if not self.index.has_sizes:
            raise ValueError(explain_missing_sizes(self.uri, buckets))
        return sort_into_buckets(self.index.image_sizes(), self.chunks.count, buckets)

    def _open_cache(self, options: CacheOptions) -> ShardCache:
        cache = ShardCache(
            self._base,
            self.index,
            self.chunks,
            choose_cache_dir(options.cache_dir),
            options.cache_bytes,
        )
        largest = int((self.chunks.end - self.chunks.start).max())
        if not cache.local and options.cache_bytes < largest:
            raise ValueError(
                f"cache_bytes={options.cache_bytes} is less than the largest piece of {self.uri}"
                f" that is fetched at once ({largest}): raise it"
            )
        return cache

    @cached_property
    def _reader(self) -> MemberReader:
        """Reader of single samples."""
        cache = self._open_cache(CacheOptions())
        return MemberReader(self.index, cache, {None: self.columns(self._member)})

    @abstractmethod
    def _decode(self, key: str, data: bytes) -> Sample:
        """Decode a sample from the bytes of its file."""

    @abstractmethod
    def _choose_form(self, options: LoaderOptions, seed: int) -> SampleForm:
        """Choose what samples are decoded to; ValueError for options of another kind of set."""


class ImageSet(ShardDataset):
    """A shard set of images."""

    @property
    def certificate(self) -> NoReturn:
        """Raise an AttributeError: only latents have one."""
        raise AttributeError(f"{self.uri} holds images: only a set of latents has a certificate")

    def show(self, count: int = 24) -> Image.Image:
        """Draw `count` images, at equal distances in the set; all of them where it has fewer.

        Raises:
            ValueError: The set is empty, or the count below 1.
            ShardError: An image cannot be read.
        """
        if count < 1 or not len(self):
            raise ValueError(f"cannot show {count} of the {len(self)} images of {self.uri}")
        numbers = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int).tolist()
        images = [self[number].image for number in numbers]
        tiles = [draw_tile(image.expand(3, -1, -1).numpy()) for image in images]
        return draw_rows(tiles, columns=min(len(tiles), _COLUMNS))

    def _decode(self, key: str, data: bytes) -> Sample:
        pixels = np.ascontiguousarray(decode_image(data, self._channels))
        return Sample(key, torch.from_numpy(pixels))

    def _choose_form(self, options: LoaderOptions, seed: int) -> ImageForm:
        if options.augment is not None:
            raise ValueError(
                f"augment={options.augment!r}: {self.uri} holds images; act on these where they are"
                " used (Element.act_on_image), or encode the set with jobs/encode.py"
            )
        size = options.image_size or (self.image_shape and self.image_shape[1:])
        sizes = options.buckets or (size and (size,))
        if sizes is None:
            raise ValueError(
                f"the images of {self.uri} differ in size and make no batch: pass resolution=N or"
                " buckets, or build the shards with --resolution N"
            )
        channels = options.channels or self._channels
        return ImageForm([(*sides, channels) for sides in sizes], options.crop, seed)

    @property
    def _channels(self) -> int:
        return self.image_shape[0] if self.image_shape else 3


class LatentSet(ShardDataset):
    """A shard set of latents, as jobs/encode.py writes it.

    Raises:
        ValueError: The index does not describe the latents.
    """

    _member = EXTENSION

    def __init__(self, uri: LocationLike, index: ShardIndex):
        super().__init__(uri, index)
        found = find_format(index.provenance, self.uri)
        assert found is not None
        self.format = found
        """Format of the latents, and the model that made them."""

    @property
    def certificate(self) -> dict[str, Any]:
        """How exactly the encoder of these latents commutes with the group.

        Keys: `max_abs_difference`, the largest |act(g, encode(x)) - encode(g x)| over all
        latents, which have unit scale; `by_element`, the same for each g; `images` and `data`,
        number and URI of the images measured; `model_digest` and `representation`.
        """
        return {
            **self.format.certificate,
            "model_digest": self.format.model_digest,
            "representation": {"group": self.format.group, **self.format.multiplicities},
        }

    def show(self, count: int = 24) -> NoReturn:
        """Raise a ValueError: only images can be drawn."""
        raise ValueError(f"{self.uri} holds latents: show the images that a model decodes")

    def _decode(self, key: str, data: bytes) -> Sample:
        bits = read_bits(data, self.format).copy()
        return Sample(key, torch.from_numpy(bits).view(torch_dtype(self.format)), True)

    def _choose_form(self, options: LoaderOptions, seed: int) -> LatentForm:
        for name in ("resolution", "buckets", "crop", "channels", "pixel_cache_bytes"):
            value = getattr(options, name)
            if value != getattr(LoaderOptions, name):
                raise ValueError(
                    f"{name}={value!r}: {self.uri} holds latents of shape"
                    f" {tuple(self.format.shape)}, which are loaded as they are stored"
                )
        if options.augment:
            self.format.require_action(self.uri)
        return LatentForm(self.format, options.augment is not None, seed)
