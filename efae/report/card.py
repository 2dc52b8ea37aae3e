"""The report card: pictures and numbers of one model, as one page that works offline.

`write_report` takes numbers and pictures as `efae.evaluation.evaluate.Evaluation` has them, and
writes ``report.html`` (everything inline), for machines ``summary.json`` and all the numbers as
``evaluation.json``, each figure as a file, and ``model_card.md`` for a model of ours.
`write_comparison` puts several models side by side.
Every measure is explained in a sentence where it stands; the page is meant to be printed.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from efae import config_forms as configuration
from efae.config import Config
from efae.report.charts import (
    SAME_DB,
    draw_curves,
    draw_energy,
    draw_gap,
    draw_gaps,
    draw_loss_by_time,
    draw_rotations,
    draw_steps,
)
from efae.report.html import finite, render_page, write_json
from efae.report.image_grids import ELEMENT_WORDS, ERROR_LEVELS, draw_orbit, draw_reconstructions
from efae.report.model_card import render_model_card
from efae.report.trajectory import draw_filmstrip, draw_trajectory

__all__ = ["Card", "draw_reconstructions", "summarize", "write_comparison", "write_report"]

_MEASURED = ("psnr", "gap_db", "worst_gap_db", "group_law_error")
_SUMMARY = (
    *("run_name", "mlflow_run_id", "model_uri", "steps", "images_seen", "images_per_second"),
    *("data_wait_fraction", "bad_samples", *_MEASURED, "checkpoints", "checkpoint_stall_seconds"),
    *("recoveries", "world_size", "precision", "device", "wall_seconds", "events"),
)
_EXACT_DB = 1e-3
"""A gap up to this counts as rounding."""
_EXACT_ENCODER_ERROR = 1e-6


class Pictures(Protocol):
    """A few held-out examples; images (n, c, h, w) in [-1, 1], on the CPU."""

    @property
    def original(self) -> Tensor: ...
    @property
    def reconstruction(self) -> Tensor: ...
    @property
    def acted(self) -> Mapping[str, Tensor]:
        """By element: decodes of act(g, latent)."""
        ...

    @property
    def states(self) -> Sequence[tuple[float, Tensor]]:
        """(t, x_t) from noise to image; none of a decoder without a flow."""
        ...


@dataclass(frozen=True)
class Card:
    """What is known about one model."""

    numbers: Mapping[str, Any]
    """An evaluation's `numbers()`."""
    pictures: Pictures
    """The same evaluation's pictures."""
    config: Config | None
    """Of a model of ours."""
    facts: Mapping[str, Any]
    """About the run: the keys of summary.json that are not measured on the model, `credits` (text,
    or several) for the data, and any more, shown in their order; `events` are lines of text."""


def write_report(
    directory: Path,
    *,
    numbers: Mapping[str, Any],
    pictures: Pictures,
    config: Config | None,
    facts: Mapping[str, Any],
    curves: Sequence[tuple[int, float]] | None = None,
) -> Path:
    """Write page, JSON files, figures and model card into `directory`; gives the page's path.

    Args:
        directory: made if it does not exist.
        numbers: as in `Card`.
        pictures: as in `Card`.
        config: as in `Card`.
        facts: as in `Card`.
        curves: (step, training loss), oldest first.

    Raises:
        ValueError: a number is not finite; summary.json is written nevertheless.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "summary.json", summarize(numbers, facts))
    broken = [name for name, value in numbers.items() if finite(value) != value]
    if broken:
        raise ValueError(
            f"the evaluation has values that are not finite in {', '.join(broken)}: there is"
            " nothing to draw; evaluate an earlier checkpoint"
        )
    write_json(directory / "evaluation.json", numbers)
    if config is not None:
        card = render_model_card(numbers, config, facts)
        (directory / "model_card.md").write_text(card, encoding="utf-8")
    _draw_figures(directory, numbers, pictures, curves)
    channels, height, width = numbers["image_shape"]
    return _render(
        directory,
        "report.html.jinja",
        title=facts.get("run_name", "one model"),
        numbers=numbers,
        config=config,
        image_size=(height, width),
        compression=channels * height * width / math.prod(numbers["latent_shape"]),
        facts={name: facts[name] for name in facts if name not in ("credits", "events")},
        credits=_listed(facts.get("credits")),
        events=_listed(facts.get("events")),
        model_uri=json.dumps(facts.get("model_uri") or "models:/efae@champion"),
        settings=configuration.flatten(config) if config else {},
        exact=_is_exact(numbers),
        example="rot90" if "rot90" in numbers["gap_db"] else list(numbers["gap_db"])[-1],
        examples=len(pictures.original),
        has_curves=bool(curves),
        trajectory=bool(pictures.states),
    )


def write_comparison(directory: Path, cards: Mapping[str, Card], facts: Mapping[str, Any]) -> Path:
    """One page with several models side by side; gives its path.

    Each model's own report lies in a folder below, as `write_report` makes it; summary.json has
    the summary of each by its name.

    Args:
        directory: made if it does not exist.
        cards: by the models' names, measured on the same images.
        facts: about the comparison, shown in their order; `credits` as in `Card`.

    Raises:
        ValueError: a number is not finite.
    """
    folders = {name: f"{i + 1}-{_slug(name)}" for i, name in enumerate(cards)}
    for name, card in cards.items():
        own = {"run_name": name, **card.facts}
        write_report(
            directory / folders[name],
            numbers=card.numbers,
            pictures=card.pictures,
            config=card.config,
            facts=own,
        )
    write_json(
        directory / "summary.json",
        {"models": {name: summarize(card.numbers, card.facts) for name, card in cards.items()}},
    )
    # A model has the elements of its own group; shared are those of all.
    shared = [
        g
        for g in next(iter(cards.values())).numbers["gap_db"]
        if all(g in card.numbers["gap_db"] for card in cards.values())
    ]
    draw_gaps(
        {name: {g: card.numbers["gap_db"][g] for g in shared} for name, card in cards.items()},
        directory / "gaps.png",
    )
    rotations = {
        name: card.numbers["rotations"] for name, card in cards.items() if card.numbers["rotations"]
    }
    if rotations:
        draw_rotations(rotations, directory / "rotations.png")
    return _render(
        directory,
        "comparison.html.jinja",
        title=" and ".join(cards),
        cards=cards,
        folders=folders,
        rotations=rotations,
        exact={name: _is_exact(card.numbers) for name, card in cards.items()},
        facts={name: value for name, value in facts.items() if name != "credits"},
        credits=_listed(facts.get("credits")),
        images=next(iter(cards.values())).numbers["images"],
        examples=len(next(iter(cards.values())).pictures.original),
    )


def _render(directory: Path, template: str, **context: Any) -> Path:
    return render_page(
        directory,
        Path(__file__).with_name("templates") / template,
        exact_db=_EXACT_DB,
        words=ELEMENT_WORDS,
        error_levels=ERROR_LEVELS,
        same_db=SAME_DB,
        **context,
    )


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-40:]


def summarize(numbers: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The machine-readable summary of a run; what is not known, or not finite, is None."""
    return {
        name: finite(numbers[name] if name in _MEASURED else facts.get(name)) for name in _SUMMARY
    }


def _is_exact(numbers: Mapping[str, Any]) -> bool:
    # Not by the gap alone: a decoder that ignores its latent has none.
    return (
        abs(numbers["worst_gap_db"]) <= _EXACT_DB
        and max(numbers["encoder_error"].values()) <= _EXACT_ENCODER_ERROR
    )


def _draw_figures(
    directory: Path,
    numbers: Mapping[str, Any],
    pictures: Pictures,
    curves: Sequence[tuple[int, float]] | None,
) -> None:
    draw_orbit(pictures.original, pictures.acted, directory / "orbit.png", gap_db=numbers["gap_db"])
    draw_reconstructions(
        pictures.original, pictures.reconstruction, directory / "reconstructions.png"
    )
    draw_gap(
        numbers["gap_db"],
        numbers["decoder_error_db"],
        numbers["noise_floor_db"],
        directory / "gap.png",
    )
    energy = numbers["energy_by_irrep"]
    if len(energy) > 1:
        channels = {
            irrep: numbers["multiplicities"][irrep] * (2 if irrep == "e" else 1) for irrep in energy
        }
        draw_energy(energy, channels, directory / "energy.png")
    if numbers["psnr_by_steps"]:
        draw_steps(
            numbers["psnr_by_steps"],
            numbers["ssim_by_steps"],
            numbers["sharpness_by_steps"],
            numbers["sampler_steps"],
            directory / "steps.png",
        )
    if numbers["loss_by_time"]:
        draw_loss_by_time(numbers["loss_by_time"], directory / "loss_by_time.png")
    if numbers["rotations"]:
        draw_rotations({"this model": numbers["rotations"]}, directory / "rotations.png")
    if pictures.states:
        draw_trajectory(pictures.states, directory / "trajectory.gif")
        draw_filmstrip(pictures.states, directory / "filmstrip.png")
    if curves:
        draw_curves(curves, directory / "curves.png")


def _listed(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else [str(entry) for entry in value]
