"""A shard set on storage: its samples by number, and loaders over them."""

import math
import operator
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from data_pipelines.images.codec import decode_image
from data_pipelines.images.tiles import draw_rows, draw_tile
from data_pipelines.loading.batch import Crop, ImageForm, LatentForm, Sample, SampleForm
from data_pipelines.loading.cache_folder import default_cache_dir
from data_pipelines.loading.epoch_plan import Tail
from data_pipelines.loading.loader import ShardLoader
from data_pipelines.loading.pixel_cache import PixelCache
from data_pipelines.loading.sample_reader import SampleReader
from data_pipelines.loading.shard_cache import ShardCache
from data_pipelines.shards.chunks import cut_chunks
from data_pipelines.shards.index import Members, ShardIndex, load_index
from data_pipelines.shards.latent_bits import torch_dtype
from data_pipelines.shards.latent_format import EXTENSION, find_format, read_bits
from data_pipelines.storage import uris

_CACHE_BYTES = 20 * 2**30
_COLUMNS = 12


class ShardDataset:
    """A shard set; it reads nothing but the index until a loader is iterated."""

    def __init__(self, uri: str, index: ShardIndex):
        self.uri = uri
        self.index = index
        self.latents = find_format(index.provenance, uri)
        """What the latents are, of a set that jobs/encode.py wrote; None of a set of images."""
        self.chunks = cut_chunks(index)
        self._length = sum(len(shard.keys) for shard in index.shards)

    @classmethod
    def open(cls, uri: str) -> "ShardDataset":
        """Open the shard set at `uri` (a path, s3://, gs://, http://).

        Raises:
            ValueError: no index there, or a damaged one; the message says what to do.
        """
        return cls(uri, load_index(uri))

    def __len__(self) -> int:
        return self._length

    def __reduce__(self):  # without open files and locks
        return ShardDataset, (self.uri, self.index)

    def __getitem__(self, number: int) -> Sample:
        """One sample, in the order of the shards; as in a list, -1 is the last.

        To look at a set; training reads much faster from a `loader`.

        Raises:
            IndexError: there are fewer samples.
            TypeError: a slice, or another value that is no integer.
            ShardError: the sample cannot be read.
        """
        wanted = operator.index(number)
        if not -len(self) <= wanted < len(self):
            raise IndexError(f"sample {wanted} of {self.uri}, which has {len(self)}")
        key, values = self._reader.read_one(wanted % len(self), self._decode)
        if self.latents is None:
            return Sample(key, torch.from_numpy(values))
        return Sample(key, torch.from_numpy(values).view(torch_dtype(self.latents)), True)

    def show(self, count: int = 24) -> Image.Image:
        """Draw `count` images, at equal distances in the set; all of them where it has fewer.

        Raises:
            ValueError: a set of latents, an empty one, or a count below 1.
            ShardError: an image cannot be read.
        """
        if self.latents is not None:
            raise ValueError(f"{self.uri} holds latents: show the images that a model decodes")
        if count < 1 or not len(self):
            raise ValueError(f"cannot show {count} of the {len(self)} images of {self.uri}")
        numbers = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int).tolist()
        images = [self[number].image for number in numbers]
        tiles = [draw_tile(image.expand(3, -1, -1).numpy()) for image in images]
        return draw_rows(tiles, columns=min(len(tiles), _COLUMNS))

    @property
    def id(self) -> str:
        """A hash of the content."""
        return self.index.id

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of every image, or None when heights or widths differ."""
        return self.index.image_shape

    @property
    def certificate(self) -> dict[str, Any]:
        """How exactly the encoder of these latents commutes with the group.

        Keys: `max_abs_difference`, the largest |act(g, encode(x)) - encode(g x)| of any number of
        any latent, which have unit scale; `by_element`, the same for each g; `images` and `data`,
        how many were measured and where they lie; `model_digest` and `representation`.

        Raises:
            AttributeError: a set of images.
        """
        if self.latents is None:
            raise AttributeError(
                f"{self.uri} holds images: only a set of latents has a certificate"
            )
        return {
            **self.latents.certificate,
            "model_digest": self.latents.model_digest,
            "representation": {"group": self.latents.group, **self.latents.multiplicities},
        }

    @property
    def keys(self) -> list[str]:
        """The key of every sample, in the order of the shards."""
        return [key for shard in self.index.shards for key in shard.keys]

    def columns(self, extension: str | None = None) -> Members:
        """Where each sample's member with this extension lies; its image for None.

        Raises:
            ValueError: a sample has none.
        """
        parts: list[Members] = []
        for shard in self.index.shards:
            part = shard.images() if extension is None else shard.members.get(extension)
            if shard.keys and (part is None or (part.offset < 0).any()):
                key = shard.keys[0 if part is None else int(np.argmax(part.offset < 0))]
                there = sorted({name for shard in self.index.shards for name in shard.members})
                raise ValueError(
                    f"sample {key!r} of {uris.join(self.uri, shard.name)} has no member"
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
        shuffle: bool = True,
        tail: Tail = "ragged",
        channels: Literal[1, 3] | None = None,
        resolution: int | tuple[int, int] | None = None,
        crop: Crop = "center",
        augment: Literal["group"] | None = None,
        members: tuple[str, ...] = (),
        bad_samples: Literal["fail", "replace"] = "fail",
        most_bad_samples: int = 100,
        decode_threads: int | None = None,
        cache_bytes: int = _CACHE_BYTES,
        cache_dir: str | Path | None = None,
        pixel_cache_bytes: int = 0,
        pin_memory: bool = False,
    ) -> ShardLoader:
        """Batches for rank `rank` of `world_size`.

        Args:
            global_batch_size: samples per batch over all ranks; where `world_size` does not divide
                it, some ranks get one more than others.
            rank: this process, 0 <= rank < world_size.
            world_size: processes that share the set.
            seed: of the order, of random crops and of `augment`; the same on all ranks.
            shuffle: False keeps the order of the shards.
            tail: "ragged": an iteration is an epoch and its last batch may be smaller; "carry":
                endless, every batch full, those at a border mix two epochs.
            channels: 1 or 3 converts between grey and RGB; None keeps the set's own.
            resolution: side, or height and width, of the images handed out; None keeps the set's
                own, which must then be the same for all.
            crop: which part of an image that is not of that shape, once its shorter side fits:
                its "center", or a "random" one, drawn anew in every epoch.
            augment: "group" acts on every latent by an element drawn for it, uniformly and anew in
                every epoch; batches say which. Only of latents, which need no copy for that.
            members: extensions of other members to hand out, as bytes: ("cls", "json").
            bad_samples: what to do with an image that is damaged or cannot be decoded: "fail", or
                "replace" it by its neighbour and count it.
            most_bad_samples: more different bad ones than this fail all the same.
            decode_threads: decoder threads of this rank; None: one for samples as small as 64 x 64
                pixels or latents, which two decode more slowly, or where this process may use one
                CPU only, else two.
            cache_bytes: bound of the node's shard cache, for sets that are not local files.
            cache_dir: where that cache is; None is a folder of the user's in the temporary folder.
            pixel_cache_bytes: bound of the decoded images that are kept there, so that later epochs
                need not decode them; 0 keeps none.
            pin_memory: hand out page-locked images, for copies to a GPU that do not block.

        Raises:
            ValueError: sizes that do not fit together, images of differing size, an empty set, or
                an option of images for latents or the reverse; `augment` where the encoder does
                not commute with the group.
        """
        if not len(self):
            raise ValueError(f"{self.uri} holds no samples")
        if bad_samples not in ("fail", "replace"):
            raise ValueError(f"{bad_samples=}: use fail or replace")
        form = (
            self._image_form(channels, resolution, crop, augment, seed)
            if self.latents is None
            else self._latent_form(channels, resolution, crop, augment, seed)
        )
        where = self.index.base or self.uri
        largest = int((self.chunks.end - self.chunks.start).max())
        if uris.local_path(where) is None and cache_bytes < largest:
            raise ValueError(
                f"cache_bytes={cache_bytes} is less than the largest piece of {self.uri} that is"
                f" fetched at once ({largest}): raise it"
            )
        folder = Path(cache_dir) if cache_dir else default_cache_dir()
        cache = ShardCache(where, self.index, self.chunks, folder, cache_bytes)
        size = sum(shard.bytes for shard in self.index.shards)
        reader = SampleReader(
            self.index,
            cache,
            columns={
                None: self.columns(EXTENSION if self.latents else None),
                **{name: self.columns(name) for name in members},
            },
            form=form,
            replace=bad_samples == "replace",
            most_bad=most_bad_samples,
            pin_memory=pin_memory,
            pixels=self._keep_pixels(form, crop, folder, pixel_cache_bytes),
        )
        return ShardLoader(
            self.id,
            reader,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            tail=tail,
            decode_threads=_choose_threads(form) if decode_threads is None else decode_threads,
            prefetch_bytes=0 if cache.local else min(_PREFETCH_BYTES, cache_bytes // 4, size),
        )

    @cached_property
    def _reader(self) -> SampleReader:
        """For single samples."""
        channels = self.image_shape[0] if self.image_shape else 3
        return SampleReader(
            self.index,
            ShardCache(
                self.index.base or self.uri,
                self.index,
                self.chunks,
                default_cache_dir(),
                _CACHE_BYTES,
            ),
            columns={None: self.columns(EXTENSION if self.latents else None)},
            form=ImageForm((1, 1, channels), "center", 0),  # of batches, which it never reads
            replace=False,
            most_bad=0,
            pin_memory=False,
            pixels=None,
        )

    def _decode(self, data: bytes) -> np.ndarray:
        """The pixels (C, H, W) of an image file, or the bits (dim, h, w) of a latent's."""
        if self.latents is not None:
            return read_bits(data, self.latents).copy()
        channels = self.image_shape[0] if self.image_shape else 3
        return np.ascontiguousarray(decode_image(data, channels))

    def _keep_pixels(
        self, form: SampleForm, crop: Crop, folder: Path, capacity_bytes: int
    ) -> PixelCache | None:
        if not capacity_bytes:
            return None
        if capacity_bytes < 0 or self.latents is not None:
            raise ValueError(
                f"pixel_cache_bytes={capacity_bytes}: must not be negative, and 0 for latents,"
                " which are not decoded"
            )
        if crop == "random":
            raise ValueError(
                f"pixel_cache_bytes={capacity_bytes}: random crops differ in every epoch; use 0, or"
                ' crop="center"'
            )
        return PixelCache(folder, self.id, len(self), form.shape, capacity_bytes)

    def _image_form(
        self,
        channels: int | None,
        resolution: int | tuple[int, int] | None,
        crop: Crop,
        augment: str | None,
        seed: int,
    ) -> SampleForm:
        if channels not in (None, 1, 3):
            raise ValueError(f"channels={channels}: use 1 (grey), 3 (RGB) or None")
        if crop not in ("center", "random"):
            raise ValueError(f"{crop=}: use center or random")
        if augment is not None:
            raise ValueError(
                f"{augment=}: {self.uri} holds images; act on these where they are used"
                " (Element.act_on_image), or encode the set with jobs/encode.py"
            )
        height, width = self._image_size(resolution)
        own_channels = self.image_shape[0] if self.image_shape else 3
        return ImageForm((height, width, channels or own_channels), crop, seed)

    def _latent_form(
        self, channels: object, resolution: object, crop: str, augment: str | None, seed: int
    ) -> SampleForm:
        assert self.latents is not None
        if channels is not None or resolution is not None or crop != "center":
            raise ValueError(
                f"{channels=}, {resolution=}, {crop=}: {self.uri} holds latents of shape"
                f" {tuple(self.latents.shape)}, which are handed out as they are"
            )
        if augment not in (None, "group"):
            raise ValueError(f'{augment=}: use "group" or None')
        if augment:
            self._check_certificate()
        return LatentForm(self.latents, augment is not None, seed)

    def _check_certificate(self) -> None:
        found = float(self.certificate["max_abs_difference"])
        if self.latents is not None and self.latents.group == "trivial":
            raise ValueError(
                f"augment='group': the model of {self.uri} has the trivial group, so nothing acts"
                " on its latents: encode with a model of --representation.group D4"
            )
        if not found <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"augment='group': act(g, encode(x)) and encode(g x) differ by up to {found:.2g}"
                f" in {self.uri}, more than {LARGEST_DIFFERENCE:g}: these latents would not be"
                " those of flipped and turned images; encode with a model of --model.level exact"
            )

    def _image_size(self, resolution: int | tuple[int, int] | None) -> tuple[int, int]:
        if resolution is None:
            if self.image_shape is None:
                raise ValueError(
                    f"the images of {self.uri} differ in size and make no batch: pass resolution=N,"
                    " or build the shards with --resolution N"
                )
            return self.image_shape[1:]
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        if min(size) < 1:
            raise ValueError(f"resolution={resolution}: must be positive")
        return size


def _choose_threads(form: SampleForm) -> int:
    alone = len(os.sched_getaffinity(0)) == 1
    return 1 if alone or math.prod(form.shape) <= _SMALL_SAMPLE else 2


LARGEST_DIFFERENCE = 0.01
"""Between act(g, encode(x)) and encode(g x), for latents of unit scale: what bfloat16 loses."""
_SMALL_SAMPLE = 3 * 64 * 64
"""Values of a sample that is decoded as soon as Python's lock has gone to another thread."""
_PREFETCH_BYTES = 512 * 2**20
"""Images that are fetched ahead of the decoders, at most."""
