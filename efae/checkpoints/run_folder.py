"""The checkpoints of one run: which is the newest that can be used, and which are kept.

They lie side by side in the run's folder, named by step. One that misses its manifest, or a file of
the size that the manifest says, is half-written: it is not there. One whose bytes are not those of
its manifest is damaged: the one before it is used instead, and that is said.
"""

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from data_pipelines import storage
from data_pipelines.storage import Location, LocationLike
from efae.checkpoints.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    checkpoint_name,
    read_checkpoint,
    read_manifest,
    read_origin,
)
from efae.config import Config

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
Content = TypeVar("Content")


def locate_run(config: Config) -> Location:
    """Where the run's checkpoints and events are: a folder named after it in ray.storage_uri."""
    return Location.parse(config.ray.storage_uri) / config.tracking.run_name


def find_newest_checkpoint(run_uri: LocationLike) -> str | None:
    """The URI of the newest complete checkpoint below `run_uri`, or None.

    Complete means all files are there and of the right size; they are not read.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    run = Location.parse(run_uri)
    complete = _complete_checkpoints(run, _list_folders(run))
    return next((folder.uri for folder, fault in complete if fault is None), None)


def read_newest_checkpoint(
    run_uri: LocationLike, tell: Callable[[CheckpointError], None]
) -> tuple[str, Checkpoint] | None:
    """The newest checkpoint that is undamaged, with its URI; None where there is none yet.

    Args:
        run_uri: the folder of the run's checkpoints.
        tell: gets what is wrong with each newer one.

    Raises:
        CheckpointError: there are checkpoints and all are damaged; starting again from nothing
            is the user's decision.
        StorageError: the storage refuses or does not answer.
    """
    return _read_newest(Location.parse(run_uri), read_checkpoint, tell)


def read_newest_origin(run_uri: LocationLike) -> tuple[str, tuple[dict[str, Any], Config]] | None:
    """Metadata and configuration of the newest checkpoint where these two are undamaged.

    Raises:
        CheckpointError: there are checkpoints and these are damaged in all.
        StorageError: the storage refuses or does not answer.
    """
    return _read_newest(Location.parse(run_uri), read_origin, warn_of_damage)


def warn_of_damage(fault: CheckpointError) -> None:
    """Says loudly that a checkpoint cannot be used."""
    logger.error("damaged checkpoint, falling back to the one before: %s", fault)


def prune_checkpoints(run_uri: LocationLike, step: int, newest: int, best_by: str = "") -> None:
    """Deletes the checkpoints up to `step`, but for the newest ones and the best one.

    Half-written ones among them go too: nobody will end them.

    Args:
        run_uri: the folder of the run's checkpoints.
        step: of the checkpoint that was written last; later ones are left alone.
        newest: how many to keep.
        best_by: the score whose best value is kept beside them: "psnr", "loss" or "" for none.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    run = Location.parse(run_uri)
    folders = {at: files for at, files in _list_folders(run).items() if at <= step}
    complete = [folder for folder, fault in _complete_checkpoints(run, folders) if fault is None]
    keep = set(complete[:newest])
    if best_by:
        sign = -1 if best_by == "loss" else 1
        manifests = {folder: read_manifest(folder.uri) for folder in complete}
        scores = {
            f: sign * m["scores"][best_by] for f, m in manifests.items() if best_by in m["scores"]
        }
        keep |= {max(scores, key=lambda folder: (scores[folder], folder.uri))} if scores else set()
    for folder in (run / checkpoint_name(at) for at in folders):
        if folder not in keep:
            storage.delete(folder / MANIFEST)  # from here on it is not complete
            storage.delete(folder)


def _read_newest(
    run: Location, read: Callable[[str], Content], tell: Callable[[CheckpointError], None]
) -> tuple[str, Content] | None:
    fault: CheckpointError | None = None
    for folder, fault in _complete_checkpoints(run, _list_folders(run)):
        if fault is None:
            try:
                return folder.uri, read(folder.uri)
            except CheckpointError as error:
                fault = error
        tell(fault)
    if fault is not None:
        raise fault
    return None


def _list_folders(run: Location) -> dict[int, dict[str, int]]:
    """The files, with their bytes, of every folder that is named as a checkpoint is, by step."""
    folders: dict[int, dict[str, int]] = {}
    for name, size in storage.list_files(run).items():
        folder, _, file = name.partition("/")
        if match := _NAME.fullmatch(folder):
            folders.setdefault(int(match[1]), {})[file] = size
    return folders


def _complete_checkpoints(
    run: Location, folders: dict[int, dict[str, int]]
) -> Iterator[tuple[Location, CheckpointError | None]]:
    """Complete checkpoints, newest first, with what is wrong with the manifest, if anything."""
    for step in sorted(folders, reverse=True):
        folder = run / checkpoint_name(step)
        if MANIFEST not in folders[step]:
            logger.warning("half-written checkpoint ignored (no %s): %s", MANIFEST, folder)
            continue
        try:
            files = read_manifest(folder.uri)["files"]
        except CheckpointError as fault:
            yield folder, fault
            continue
        wrong = [name for name in files if folders[step].get(name) != files[name]["bytes"]]
        if wrong:
            logger.warning("half-written checkpoint ignored (%s): %s", ", ".join(wrong), folder)
            continue
        yield folder, None
