"""Checks on the driver's machine before any work starts; `node_checks` has those of the nodes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from data_pipelines import ShardDataset, storage
from data_pipelines.loading.buckets import explain_missing_sizes
from data_pipelines.storage import Location, LocationLike
from efae.checkpoints.checkpoint import checkpoint_name
from efae.checkpoints.run_folder import locate_run
from efae.config import AnyConfig, Config, DataConfig, GeneratorConfig, LatentsConfig
from efae.config.run import STEPS_BEFORE_PROFILE
from efae.evaluation.measures import SMALLEST_SIDE
from efae.generation.network import read_format
from efae.model.closed_form import LARGEST_PATCH
from efae.model.objective import load_perceptual
from efae.preflight.checks import Check
from efae.symmetry import GROUPS
from efae.tracking.server import Server
from efae.training.starts.source import has_source, read_source
from efae.training.state import build_model


@dataclass(frozen=True)
class SetFacts:
    """Facts of a shard set that the driver keeps instead of its index, which may be large.

    Attributes:
        uri: URI of the set.
        id: Hash of its content.
        images: Number of images.
        shape: Shape (C, H, W) of every image; None if heights or widths differ.
        sized: Whether the index has the size of every image.
        bytes: Size of all shards, in bytes.
        credit: Credit that its licence requires; "" if none.
    """

    uri: str
    id: str
    images: int
    shape: tuple[int, int, int] | None
    sized: bool
    bytes: int
    credit: str

    def describe(self) -> str:
        """Return address, size and id in one line."""
        return f"{self.uri} ({self.images} images, id {self.id})"


class RunData:
    """Facts of a run's two shard sets; each index is read and parsed once, on first use."""

    def __init__(self, data: DataConfig | LatentsConfig):
        self._data = data

    @cached_property
    def train(self) -> SetFacts:
        """Facts of the training images; raises as `read_facts` does."""
        return read_facts(self._data.uri)

    @cached_property
    def held_out(self) -> SetFacts:
        """Facts of the held-out images; raises as `read_facts` does."""
        return read_facts(self._data.held_out_uri)


def read_facts(uri: LocationLike) -> SetFacts:
    """Read the facts of the shard set at `uri`.

    Raises:
        ValueError: There is no readable index.
        StorageError: The storage refuses or does not answer.
    """
    storage.check_readable(uri)
    return list_facts(ShardDataset.open(uri))


def list_facts(dataset: ShardDataset) -> SetFacts:
    """Return the facts of an open shard set."""
    index = dataset.index
    credit, licence = (index.provenance.get(name, "") for name in ("credit", "licence"))
    return SetFacts(
        uri=dataset.uri,
        id=dataset.id,
        images=len(dataset),
        shape=dataset.image_shape,
        sized=index.has_sizes,
        bytes=sum(shard.bytes for shard in index.shards),
        credit=f"{credit} ({licence or 'licence unknown'})" if credit else "",
    )


def list_checks(config: AnyConfig, data: RunData, server: Server) -> Iterator[tuple[str, Check]]:
    """Yield (subject, check) pairs, the cheap ones first.

    Args:
        config: Configuration of the experiment.
        data: Facts of its shard sets.
        server: MLflow server.

    Returns:
        Checks that raise ValueError or StorageError on failure.
    """
    yield "configuration", lambda: check_configuration(config)
    yield "MLflow", lambda: check_mlflow(server)
    if isinstance(config, Config):
        yield "images", lambda: check_training_images(config, data.train)
        yield "held-out images", lambda: check_images(config, data.held_out)
    else:
        yield "latents", lambda: _count_samples(data.train)
        if config.data.held_out_uri:
            yield "held-out latents", lambda: _count_samples(data.held_out)
    yield "storage", lambda: check_storage(config.ray.storage_uri)
    if config.output:
        yield "output", lambda: check_storage(config.output)
    if isinstance(config, Config) and config.tracking.report_folder:
        yield "report folder", lambda: check_storage(config.tracking.report_folder)
    if isinstance(config, Config) and config.tracking.page:
        yield "page", check_page
    if isinstance(config, GeneratorConfig):
        yield "tokenizer", lambda: check_tokenizer(config, server)
    elif has_source(config):
        yield "starting model", lambda: check_source(config, server)


def measure_data(config: AnyConfig, data: RunData) -> int:
    """Return the maximum size of a node's caches of shards and of pixels, in bytes.

    Raises:
        ValueError: There is no readable index.
        StorageError: The storage refuses or does not answer.
    """
    sets = [data.train, *([data.held_out] if config.data.held_out_uri else [])]
    remote = [s.bytes for s in sets if Location.parse(s.uri).path is None]
    fetched = min(sum(remote), config.data.cache_bytes)
    if isinstance(config, GeneratorConfig) or not config.data.pixel_cache_bytes:
        return fetched
    pixels = data.train.images * config.data.channels * math.prod(config.data.image_size)
    return fetched + min(pixels, config.data.pixel_cache_bytes)


def check_mlflow(server: Server) -> str:
    """Check that the MLflow server answers; see `Server.check`."""
    server.check()
    return str(server)


def check_source(config: Config, server: Server) -> str:
    """Check that the model that the run starts from is intact and fits it; see `read_source`."""
    return read_source(config, server).uri


def check_tokenizer(config: GeneratorConfig, server: Server) -> str:
    """Check that the model that made the latents is there; see `pull.read_tokenizer`."""
    from efae.registry import pull  # MLflow takes two seconds

    return pull.read_tokenizer(read_format(config), server, config.data.tokenizer).uri


def check_page() -> str:
    """Check that the page can be written on this machine; see `efae.web_page.page.check_page`."""
    from efae.web_page import page  # seconds

    return page.check_page()


def check_storage(uri: str) -> str:
    """Check that objects below `uri` can be written; see `storage.check_writable`."""
    storage.check_writable(uri)
    return uri


def check_configuration(config: AnyConfig) -> None:
    """Check what the configuration cannot check itself, or what an older stored one may hold.

    These are addresses, names, the model's sizes, and whether the run is long enough to profile.

    Raises:
        ValueError: One of them cannot work.
    """
    for uri in (config.data.uri, config.data.held_out_uri, config.ray.storage_uri):
        if uri or isinstance(config, Config):
            Location.parse(uri)
    if not config.tracking.run_name:
        raise ValueError("tracking.run_name='': name the run")
    profiled, steps = config.training.profile_steps, config.training.steps
    if profiled and steps < STEPS_BEFORE_PROFILE + profiled:
        raise ValueError(
            f"training.profile_steps={profiled} with training.steps={steps}: the profile begins"
            f" after {STEPS_BEFORE_PROFILE} steps; set training.steps to"
            f" {STEPS_BEFORE_PROFILE + profiled} at least, or profile fewer"
        )
    # Raises if storage cannot hold about the longest object name that the run will write.
    _ = locate_run(config) / checkpoint_name(0) / "optimizer.safetensors"
    build_model(config)  # raises if the sizes do not fit together
    if isinstance(config, Config):
        if min(config.data.image_size) < SMALLEST_SIDE:
            raise ValueError(
                f"data.resolution={config.data.resolution}: SSIM needs sides of {SMALLEST_SIDE}"
                " pixels at least; use larger images"
            )
        _check_linear_start(config)
    if isinstance(config, Config) and config.loss.perceptual:
        load_perceptual(config.loss.perceptual, torch.device("cpu"))


def _check_linear_start(config: Config) -> None:
    model = config.model
    values = config.data.channels * model.downsampling**2
    if model.has_linear_start and values > LARGEST_PATCH:
        raise ValueError(
            f"model.start=closed_form with model.downsampling={model.downsampling}: a cell covers"
            f" {values} values, and the map is fitted to at most {LARGEST_PATCH}; set"
            " model.start=random, or lower model.downsampling"
        )


def check_training_images(config: Config, facts: SetFacts) -> str:
    """Check that the images can be sorted into buckets, or else as in `check_images`."""
    if not config.data.buckets:
        return check_images(config, facts)
    if not facts.sized:
        raise ValueError(f"data.{explain_missing_sizes(facts.uri, config.data.buckets)}")
    return _count_samples(facts)


def check_images(config: Config, facts: SetFacts) -> str:
    """Check that the images of a shard set can be cut to the model's size.

    Args:
        config: Configuration with the size of the images and the group.
        facts: Facts of the shard set.

    Returns:
        Number of images and their location.

    Raises:
        ValueError: The images are too small.
    """
    uri, shape, wanted = facts.uri, facts.shape, config.data.image_size
    found = _count_samples(facts)
    if shape is None:
        return found
    height, width = shape[1:]
    if height >= wanted[0] and width >= wanted[1]:
        return found
    if height != width and GROUPS[config.representation.group].swaps_sides:
        raise ValueError(
            f"{uri}: its images are {height} x {width}, not square, but group"
            f" {config.representation.group} contains quarter turns; build the shards with"
            f" --resolution {wanted[0]}, or set --data.resolution {height} {width}"
            " --representation.group flips"
        )
    raise ValueError(
        f"{uri}: its images are {height} x {width}, but data.resolution="
        f"{config.data.resolution}: set --data.resolution to theirs, or build the shards with"
        f" --resolution {wanted[0]}"
    )


def _count_samples(facts: SetFacts) -> str:
    return f"{facts.images} at {Location.parse(facts.uri).display}"
