"""What must hold before any work starts: each check raises one sentence that says what to do."""

from collections.abc import Callable, Iterator

import torch

from data_pipelines import ShardDataset, storage, uris
from efae.artifacts.tracking import check_server
from efae.config import Config
from efae.model.autoencoder import Autoencoder
from efae.symmetry import GROUPS
from efae.training.perceptual import load_perceptual


def list_checks(config: Config, tracking_uri: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what it is about, check) pairs, the cheap ones first.

    Args:
        config: the experiment.
        tracking_uri: of the MLflow server; "" where none is set.

    Returns:
        Checks that return nothing, or raise ValueError or StorageError.
    """
    yield "configuration", lambda: check_configuration(config)
    yield f"MLflow at {tracking_uri or '(unset)'}", lambda: check_server(tracking_uri)
    yield f"images at {config.data.uri}", lambda: check_images(config, config.data.uri)
    yield (
        f"held-out images at {config.data.held_out_uri}",
        lambda: check_images(config, config.data.held_out_uri),
    )
    yield (
        f"storage at {config.ray.storage_uri}",
        lambda: storage.check_writable(config.ray.storage_uri),
    )


def check_configuration(config: Config) -> None:
    """What one page of settings cannot see by itself: addresses, names, the model's sizes.

    Raises:
        ValueError: one of them cannot work.
    """
    for uri in (config.data.uri, config.data.held_out_uri, config.ray.storage_uri):
        uris.check_uri(uri)
    for name in ("run_name", "registered_model", "experiment"):
        value = getattr(config.tracking, name)
        if not value or set(value) & set("/:'\"%"):
            raise ValueError(f"tracking.{name}={value!r}: use a name without / : ' \" %")
    Autoencoder(config)  # raises what is wrong with the sizes
    if config.loss.perceptual:
        load_perceptual(config.loss.perceptual, torch.device("cpu"))


def check_images(config: Config, uri: str, cut: bool = True) -> None:
    """The shard set answers and its images are what the model takes.

    Args:
        config: says the size of images and the group that acts on them.
        uri: of the shard set.
        cut: whether larger images, or images of several sizes, are cut to the model's.

    Raises:
        ValueError: images that are too small; without `cut`, of another size or of several.
        StorageError: nothing can be read there.
    """
    storage.check_readable(uri)
    shape = ShardDataset.open(uri).image_shape
    wanted = config.data.image_size
    if shape is None and cut:
        return
    if shape is None:
        raise ValueError(
            f"{uri}: its images differ in size; build the shards with --resolution {wanted[0]}"
        )
    height, width = found = shape[1:]
    if found == wanted or (cut and height >= wanted[0] and width >= wanted[1]):
        return
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
