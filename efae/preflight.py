"""What must hold before any work starts: each check raises one sentence that says what to do."""

from collections.abc import Callable, Iterator

from data_pipelines import ShardDataset, storage
from efae.artifacts.tracking import check_server
from efae.config import Config
from efae.model.autoencoder import Autoencoder


def list_checks(config: Config, tracking_uri: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what it is about, check) pairs, the cheap ones first; a check raises ValueError."""
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
    """What one page of settings cannot see by itself: addresses, names, the model's sizes."""
    for uri in (config.data.uri, config.data.held_out_uri, config.ray.storage_uri):
        storage.check_uri(uri)
    for name in ("run_name", "registered_model", "experiment"):
        value = getattr(config.tracking, name)
        if not value or set(value) & set("/:'\"%"):
            raise ValueError(f"tracking.{name}={value!r}: use a name without / : ' \" %")
    Autoencoder(config)  # raises what is wrong with the sizes


def check_images(config: Config, uri: str) -> None:
    """The shard set answers and its images are what the model takes."""
    storage.check_readable(uri)
    shape = ShardDataset.open(uri).image_shape
    side = config.data.resolution
    if shape is None:
        raise ValueError(
            f"{uri}: its images differ in size; build the shards with --resolution {side}"
        )
    height, width = shape[1:]
    if height != width:
        raise ValueError(
            f"{uri}: its images are {height} x {width}, but quarter turns (group D4) need square"
            f" images; build the shards with --resolution {side}"
        )
    if height != side:
        raise ValueError(
            f"{uri}: its images are {height} x {width}, but data.resolution={side}: set"
            f" --data.resolution {height}, or build the shards with --resolution {side}"
        )
