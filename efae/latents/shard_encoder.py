"""Encoding of one shard of images into one shard of latents, on any node, without Ray.

A shard is always encoded in the same batches, so its bytes are reproducible on the same kind of
machine.
"""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from webdataset.writer import TarWriter

from data_pipelines import storage
from data_pipelines.building import unfinished
from data_pipelines.loading.batch import Batch
from data_pipelines.loading.dataset import ImageSet, LatentSet, ShardDataset
from data_pipelines.shards.index import ShardIndex, index_tar
from data_pipelines.shards.latent_bits import pack_latents, torch_dtype
from data_pipelines.shards.latent_format import EXTENSION, LatentFormat
from data_pipelines.storage import Location, LocationLike
from efae.config import Config
from efae.evaluation.held_out import read_held_out
from efae.evaluation.measures import to_float
from efae.latents.certificate import certify
from efae.model.autoencoder import Autoencoder
from efae.model.octic.layers import expanded_once
from efae.model.precision import Precision, float32_arithmetic

_TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 2e-1}
"""Tolerance for numbers of unit scale, beside rounding: batch size changes the order of sums."""


@dataclass(frozen=True)
class Source:
    """Images and model of an encoding, the same for every shard.

    Attributes:
        uri: URI of the shard set of images.
        index: Index of that set.
        weights: Weights of the model.
        config: Configuration of the model.
        members: Extensions of the sample members that are copied along with the latents.
        batch_size: Images per batch.
        device: Torch device.
        precision: Precision of the encoder's arithmetic.
        cache_dir: Folder of the node's shard cache; None as in `ShardDataset.loader`.
        image_size: Height and width of the images; None: those of the configuration.
        tile: Side of the tiles that are encoded one at a time; None: whole images.
        symmetrize: Whether to average the encoder over the group.
        compile: Which blocks to compile, as `Autoencoder.compile_blocks` takes it.
    """

    uri: str
    index: ShardIndex
    weights: Mapping[str, Tensor]
    config: Config
    members: tuple[str, ...]
    batch_size: int
    device: str
    precision: Precision = "fp32"
    cache_dir: str | None = None
    image_size: tuple[int, int] | None = None
    tile: int | None = None
    symmetrize: bool = False
    compile: Literal["auto", "none", "blocks"] = "auto"


class ShardEncoder:
    """Model on its device that encodes shards of one source."""

    def __init__(self, source: Source):
        self.source = source
        self._encoding = threading.Lock()
        self.image_size = source.image_size or source.config.data.image_size
        self.model = Autoencoder(source.config)
        self.model.load_state_dict(dict(source.weights), strict=True)
        self.model.to(source.device).eval().requires_grad_(False)
        self.model.precision, self.model.tile = source.precision, source.tile
        self.model.symmetrize = self.model.symmetrize or source.symmetrize
        self.model.compile_blocks(source.compile)

    def write_shard(self, number: int, output: Location, form: LatentFormat) -> ShardIndex:
        """Encode and upload shard `number`, then write its record.

        Threads may call this at once: one encodes while others upload.

        Args:
            number: Position of the shard in the source's index.
            output: Folder of the latent set.
            form: Format of the latent set.

        Returns:
            An index of this shard alone.

        Raises:
            ShardError: The shard, or an image in it, cannot be read.
            ValueError: Latents are not finite in the set's dtype.
            StorageError: The output cannot be written.
        """
        shard = self.source.index.shards[number]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / shard.name.replace("/", "-")
            with (
                self._encoding,
                # A compiled block expands its weights in the pass that multiplies by them.
                nullcontext() if self.model.compiled else expanded_once(self.model.encoder),
                path.open("wb") as file,
                TarWriter(file, mtime=0, encoder=False) as writer,
            ):
                for batch, latent in self._encode_ahead(number):
                    latents = pack_latents(latent, form)
                    for row, (key, data) in enumerate(zip(batch.key, latents, strict=True)):
                        others = {name: values[row] for name, values in batch.members.items()}
                        writer.write({"__key__": key, EXTENSION: data, **others})
            record = ShardIndex((index_tar(path, shard.name),), None)
            storage.upload(path, output / shard.name)
        unfinished.keep_record(output, shard.name, record)
        return record

    def measure(self, data: LocationLike, count: int) -> dict[str, Any]:
        """Return the certificate over the first `count` images of the set at `data`.

        Raises:
            ValueError: There is no such set, or the model's latents are not finite.
            ShardError: The set cannot be read.
        """
        config = replace(
            self.source.config.data,
            held_out_uri=str(data),
            resolution=self.image_size,
            cache_dir=self.source.cache_dir,
        )
        images = read_held_out(config, count)
        size = self.source.batch_size
        return certify(self.model, (images[i : i + size] for i in range(0, len(images), size)))

    def compare(self, latents: LatentSet, count: int) -> float:
        """Return the largest difference between stored and fresh latents of about `count` samples.

        It compares the first samples of every shard.

        Args:
            latents: Latent set that was made from the source.
            count: Minimum number of samples to compare; all are compared if there are fewer.

        Raises:
            ShardError: Latents or images cannot be read.
            ValueError: A shard's keys are not those of its images, or a latent differs by more
                than rounding to the set's dtype.
        """
        shards, images = latents.index.shards, self.source.index.shards
        filled = [number for number, shard in enumerate(shards) if shard.keys]
        filled.sort(key=lambda number: len(shards[number].keys))  # larger ones make up for these
        worst, left = 0.0, count
        for turn, number in enumerate(filled):
            name = shards[number].name
            if shards[number].keys != images[number].keys:
                where = Location.parse(latents.uri).uri_of(name)
                raise ValueError(
                    f"{where}: its keys differ from those of the images: encode it again"
                )
            least = max(1, -(-left // (len(filled) - turn)))
            compared, difference = self._compare_shard(latents, number, least)
            worst, left = max(worst, difference), left - compared
        return worst

    def _compare_shard(self, latents: LatentSet, number: int, least: int) -> tuple[int, float]:
        """Compare at least so many samples; return their number and the largest difference."""
        rounding = torch.finfo(torch_dtype(latents.format)).eps
        tolerance = _TOLERANCES[self.source.precision]
        size, compared, worst = min(self.source.batch_size, least), 0, 0.0
        stored_batches = _read_shard(latents, number, size, self.source.cache_dir)
        for fresh, stored in zip(self._read(number, size), stored_batches, strict=True):
            expected = self._encode(fresh.image).cpu()
            difference = (stored.latent.float() - expected).abs()
            off = (difference > rounding * expected.abs() + tolerance).flatten(1).any(1)
            if bool(off.any()):
                where = Location.parse(latents.uri).uri_of(latents.index.shards[number].name)
                key = stored.key[int(off.int().argmax())]
                raise ValueError(
                    f"{where}, sample {key!r}: differs by {float(difference.max()):.2g} from the"
                    " model's output: encode it again"
                )
            worst = max(worst, float(difference.max()))
            compared += len(fresh.key)
            if compared >= least:
                break
        return compared, worst

    def _encode_ahead(self, number: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches of a shard with their latents on the CPU, one batch behind the encoder.

        A GPU works on the next batch while the caller packs and writes this one, whose copy to the
        CPU was queued before it.
        """
        waiting: tuple[Batch, Callable[[], Tensor]] | None = None
        for batch in self._read(number):
            encoded = batch, _start_copy(self._encode(batch.image))
            if waiting:
                yield waiting[0], waiting[1]()
            waiting = encoded
        if waiting:
            yield waiting[0], waiting[1]()

    @torch.no_grad()
    def _encode(self, image: Tensor) -> Tensor:
        count, missing = len(image), self.source.batch_size - len(image)
        image = image.to(self.source.device, non_blocking=True)
        if self.model.compiled and missing > 0:  # another size would be compiled anew
            image = F.pad(image, (0, 0, 0, 0, 0, 0, 0, missing))
        with float32_arithmetic("fp32"):
            return self.model.encode(to_float(image))[:count]

    def _read(self, number: int, most: int | None = None) -> Iterator[Batch]:
        """Yield the images of one shard in order, in batches of at most `most`."""
        size = min(self.source.batch_size, most or self.source.batch_size)
        return _read_shard(
            ImageSet(self.source.uri, self.source.index),
            number,
            size,
            self.source.cache_dir,
            channels=self.source.config.data.channels,
            resolution=self.image_size,
            members=self.source.members,
            pin_memory=self.source.device == "cuda",
        )


def _start_copy(latent: Tensor) -> Callable[[], Tensor]:
    """Start a copy to the CPU; the result waits for it, but not for what is queued afterwards."""
    copy = latent.to("cpu", non_blocking=True)  # from a GPU, in pinned memory
    if not latent.is_cuda:
        return lambda: copy
    copied = torch.cuda.current_stream(latent.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


def _read_shard(
    dataset: ShardDataset, number: int, size: int, cache_dir: str | None, **options: Any
) -> Iterator[Batch]:
    shard = dataset.index.shards[number]
    if not shard.keys:
        return
    one = type(dataset)(dataset.uri, replace(dataset.index, shards=(shard,)))
    yield from one.loader(size, shuffle=False, cache_dir=cache_dir, **options)
