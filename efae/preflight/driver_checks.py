"""What must hold before any work starts, as seen from the driver; the nodes' are `node_checks`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from data_pipelines import ShardDataset, storage
from data_pipelines.storage import Location, LocationLike
from efae.checkpoints.checkpoint import checkpoint_name
from efae.checkpoints.run_folder import locate_run
from efae.config import Config, DataConfig
from efae.model.autoencoder import Autoencoder
from efae.model.objective import load_perceptual
from efae.preflight.checks import Check
from efae.symmetry import GROUPS
from efae.tracking.server import Server


@dataclass(frozen=True)
class SetFacts:
    """What the driver needs of a shard set's index, which may be large.

    Attributes:
        uri: Where the set is.
        id: Hash of its content.
        images: Number of images.
        shape: (C, H, W) of every image, or None where heights or widths differ.
        bytes: Bytes of all shards.
        credit: What its licence asks to be said; "" where that is nothing.
    """

    uri: str
    id: str
    images: int
    shape: tuple[int, int, int] | None
    bytes: int
    credit: str


class RunData:
    """The facts of a run's two shard sets; each index is read and parsed once, on first use."""

    def __init__(self, data: DataConfig):
        self._data = data

    @cached_property
    def train(self) -> SetFacts:
        """The images to train on; raises as `read_facts`."""
        return read_facts(self._data.uri)

    @cached_property
    def held_out(self) -> SetFacts:
        """The images to measure on; raises as `read_facts`."""
        return read_facts(self._data.held_out_uri)


def read_facts(uri: LocationLike) -> SetFacts:
    """The facts of the shard set at `uri`.

    Raises:
        ValueError: no readable index there.
        StorageError: the storage refuses or does not answer.
    """
    storage.check_readable(uri)
    return list_facts(ShardDataset.open(uri))


def list_facts(dataset: ShardDataset) -> SetFacts:
    """The facts of an open shard set."""
    index = dataset.index
    credit, licence = (index.provenance.get(name, "") for name in ("credit", "licence"))
    return SetFacts(
        uri=dataset.uri,
        id=dataset.id,
        images=len(dataset),
        shape=dataset.image_shape,
        bytes=sum(shard.bytes for shard in index.shards),
        credit=f"{credit} ({licence or 'licence unknown'})" if credit else "",
    )


def list_checks(config: Config, data: RunData, server: Server) -> Iterator[tuple[str, Check]]:
    """(what it is about, check) pairs, the cheap ones first.

    Args:
        config: the experiment.
        data: Facts of its shard sets.
        server: MLflow server.

    Returns:
        Checks that raise ValueError or StorageError where something does not hold.
    """
    yield "configuration", lambda: check_configuration(config)
    yield "MLflow", lambda: check_mlflow(server)
    yield "images", lambda: check_images(config, data.train)
    yield "held-out images", lambda: check_images(config, data.held_out)
    yield "storage", lambda: check_storage(config.ray.storage_uri)


def measure_data(config: Config, data: RunData) -> int:
    """Bytes that a node's caches take at most: of shards that are fetched, and of kept pixels.

    Raises:
        ValueError: no readable index there.
        StorageError: the storage refuses or does not answer.
    """
    remote = [s.bytes for s in (data.train, data.held_out) if Location.parse(s.uri).path is None]
    fetched = min(sum(remote), config.data.cache_bytes)
    if not config.data.pixel_cache_bytes:
        return fetched
    pixels = data.train.images * config.data.channels * math.prod(config.data.image_size)
    return fetched + min(pixels, config.data.pixel_cache_bytes)


def check_mlflow(server: Server) -> str:
    """The MLflow server answers; see `Server.check`."""
    server.check()
    return str(server)


def check_storage(uri: str) -> str:
    """Objects below `uri` can be written and deleted; see `storage.check_writable`."""
    storage.check_writable(uri)
    return uri


def check_configuration(config: Config) -> None:
    """What one page of settings cannot see by itself: addresses, names, the model's sizes.

    Raises:
        ValueError: one of them cannot work.
    """
    for uri in (config.data.uri, config.data.held_out_uri, config.ray.storage_uri):
        Location.parse(uri)
    if not config.tracking.run_name:
        raise ValueError("tracking.run_name='': name the run")
    # Storage must hold the longest name of an object that the run will write, or about that.
    _ = locate_run(config) / checkpoint_name(0) / "optimizer.safetensors"
    Autoencoder(config)  # raises what is wrong with the sizes
    if config.loss.perceptual:
        load_perceptual(config.loss.perceptual, torch.device("cpu"))


def check_images(config: Config, facts: SetFacts, cut: bool = True) -> str:
    """The images of a shard set are what the model takes.

    Args:
        config: says the size of images and the group that acts on them.
        facts: Facts of the shard set.
        cut: whether larger images, or images of several sizes, are cut to the model's.

    Returns:
        Where and how many they are.

    Raises:
        ValueError: images that are too small; without `cut`, of another size or of several.
    """
    uri, shape, wanted = facts.uri, facts.shape, config.data.image_size
    found = f"{facts.images} at {Location.parse(uri).display}"
    if shape is None and cut:
        return found
    if shape is None:
        raise ValueError(
            f"{uri}: its images differ in size; build the shards with --resolution {wanted[0]}"
        )
    height, width = shape[1:]
    if (height, width) == wanted or (cut and height >= wanted[0] and width >= wanted[1]):
        return found
    if height != width and GROUPS[config.representation.group].swaps_sides:
        raise ValueError(
            f"{uri}: its images are {height} x {width}, not square, but group"
            f" {config.representation.group} holds quarter turns; build the shards with"
            f" --resolution {wanted[0]}, or set --data.resolution {height} {width}"
            " --representation.group flips"
        )
    raise ValueError(
        f"{uri}: its images are {height} x {width}, but data.resolution="
        f"{config.data.resolution}: set --data.resolution to theirs, or build the shards with"
        f" --resolution {wanted[0]}"
    )
