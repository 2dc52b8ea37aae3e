"""What a summary and a report say about a run: its preset, its data, and how it went."""

from typing import Any

from efae.checkpoints import run_folder
from efae.checkpoints.events import read_events
from efae.config import AnyConfig, Config
from efae.config import forms as configuration
from efae.preflight.driver_checks import RunData
from efae.presets import GENERATORS, PRESETS

_NOT_NAMED = ("data.uri", "data.held_out_uri", "data.format", "start.architecture")


def describe_run(config: AnyConfig, totals: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a run that was trained to its end.

    Args:
        config: Configuration of the experiment.
        totals: Totals of the last checkpoint, see `efae.training.loop`.

    Returns:
        JSON values for the summary and the report.

    Raises:
        StorageError: The storage refuses or does not answer.
    """
    events = read_events(run_folder.locate_run(config))
    return {
        "run_name": config.tracking.run_name,
        "preset": describe_preset(config),
        "steps": config.training.steps,
        "images_seen": config.training.steps * config.training.global_batch_size,
        "precision": config.training.precision,
        "commit": config.tracking.commit,
        "recoveries": max(0, sum(event.kind == "start" for event in events) - 1),
        "events": [str(event) for event in events],
        **totals,
    }


def describe_preset(config: AnyConfig) -> str:
    """Return the nearest preset and the settings that differ, except places and machines."""
    changes = {
        name: [
            line
            for key, line in configuration.list_changes(preset, config)
            if configuration.decides_weights(key) and key not in _NOT_NAMED
        ]
        for name, (_, preset) in (PRESETS if isinstance(config, Config) else GENERATORS).items()
    }
    nearest = min(changes, key=lambda name: len(changes[name]))
    return "; ".join([nearest, *changes[nearest]])


def describe_data(data: RunData) -> dict[str, Any]:
    """Return the identity of both image sets, and the credits that their licences require.

    Returns:
        "train_data" and "held_out_data", one line each, and "credits", a list of distinct lines.

    Raises:
        ValueError: An address is malformed, or has no readable index.
        StorageError: The storage refuses or does not answer.
    """
    described: dict[str, Any] = {}
    credits: dict[str, None] = {}  # an ordered set
    for role, facts in (("train", data.train), ("held_out", data.held_out)):
        described[f"{role}_data"] = facts.describe()
        if facts.credit:
            credits[facts.credit] = None
    return described | {"credits": list(credits)}
