"""The checkpoints of one run: which usable one is newest, and which are kept.

They lie side by side in the run's folder, named by step. A checkpoint without its manifest, or with
a file missing or of another size than the manifest lists, is half-written and ignored. One whose
bytes do not match its manifest is damaged: the one before it is used instead, with an error log.
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
from efae.config import AnyConfig

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})")
SWEEP = "sweep.json"
"""Name of the object that tells a sweep's folder from a run's: both lie below ray.storage_uri."""
Content = TypeVar("Content")


def locate_run(config: AnyConfig) -> Location:
    """Return the folder of the run's checkpoints and events: its name, below ray.storage_uri."""
    return Location.parse(config.ray.storage_uri) / config.tracking.run_name


def find_newest_checkpoint(run_uri: LocationLike) -> str | None:
    """Return the URI of the newest complete checkpoint below `run_uri`, or None.

    Complete means that all files exist in the right size; they are not read.

    Raises:
        StorageError: The storage refuses or does not answer.
    """
    run = Location.parse(run_uri)
    complete = _complete_checkpoints(run, _list_folders(run))
    return next((folder.uri for folder, fault in complete if fault is None), None)


def read_newest_checkpoint(
    run_uri: LocationLike, tell: Callable[[CheckpointError], None]
) -> tuple[str, Checkpoint] | None:
    """Read the newest undamaged checkpoint, with its URI; None if the run has none yet.

    Args:
        run_uri: Folder of the run's checkpoints.
        tell: Function that receives the fault of each newer, damaged one.

    Raises:
        CheckpointError: All checkpoints are damaged; only the user may decide to start over.
        StorageError: The storage refuses or does not answer.
    """
    return _read_newest(Location.parse(run_uri), read_checkpoint, tell)


def read_newest_origin(
    run_uri: LocationLike,
) -> tuple[str, tuple[dict[str, Any], AnyConfig]] | None:
    """Read metadata and configuration of the newest checkpoint in which both are undamaged.

    Raises:
        CheckpointError: They are damaged in all checkpoints.
        StorageError: The storage refuses or does not answer.
    """
    return _read_newest(Location.parse(run_uri), read_origin, warn_of_damage)


def warn_of_damage(fault: CheckpointError) -> None:
    """Log an error that a checkpoint cannot be used."""
    logger.error("damaged checkpoint, falling back to the one before: %s", fault)


def prune_checkpoints(run_uri: LocationLike, step: int, newest: int, best_by: str = "") -> None:
    """Delete the checkpoints up to `step`, except the newest ones and the best one.

    Half-written ones among them are deleted too: no process will complete them.

    Args:
        run_uri: Folder of the run's checkpoints.
        step: Step of the checkpoint that was written last; later ones are left alone.
        newest: Number of newest checkpoints to keep.
        best_by: Score by which the best one is kept too: "psnr", "loss", or "" for none.

    Raises:
        StorageError: The storage refuses or does not answer.
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
            storage.delete(folder / MANIFEST)  # makes it incomplete before its files go
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
    """Return {step: {file: bytes}} of every folder with the name of a checkpoint."""
    folders: dict[int, dict[str, int]] = {}
    for name, size in storage.list_files(run).items():
        folder, _, file = name.partition("/")
        if match := _NAME.fullmatch(folder):
            folders.setdefault(int(match[1]), {})[file] = size
    return folders


def _complete_checkpoints(
    run: Location, folders: dict[int, dict[str, int]]
) -> Iterator[tuple[Location, CheckpointError | None]]:
    """Yield complete checkpoints, newest first, with the fault of the manifest, if any."""
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
