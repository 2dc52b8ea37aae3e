"""The report card: pictures and numbers of one model, as one page that works offline.

`write_report` takes numbers and pictures from `efae.evaluation.evaluate.Evaluation`. It writes
``report.html`` (everything inline), ``summary.json``, all numbers as ``evaluation.json``, each
figure as a file, and ``model_card.md`` for an EFAE model. `write_comparison` shows several models
side by side. The page explains every measure in a sentence, and prints well.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from efae.config import Config
from efae.config import forms as configuration
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
from efae.report.html import finite, render_page, write_json, write_split
from efae.report.image_grids import ELEMENT_WORDS, ERROR_LEVELS, draw_orbit, draw_reconstructions
from efae.report.model_card import render_model_card
from efae.report.trajectory import draw_filmstrip, draw_trajectory
from efae.symmetry.representation import split_pixels

__all__ = [
    "Card",
    "advise_on_linear_map",
    "draw_reconstructions",
    "summarize",
    "write_comparison",
    "write_report",
]

_MEASURED = ("psnr", "linear_psnr", "gap_db", "worst_gap_db", "group_law_error")
_SUMMARY = (
    *("run_name", "mlflow_run_id", "model_uri", "steps", "images_seen", "images_per_second"),
    *("data_wait_fraction", "bad_samples", *_MEASURED, "checkpoints", "checkpoint_stall_seconds"),
    *("recoveries", "world_size", "precision", "device", "wall_seconds", "events"),
    *("tflops_per_second", "flop_utilization", "flop_utilization_as_dense"),
    *("preset", "commit", "train_data", "held_out_data", "data", "credits", "tensors_sha256"),
)
_EXACT_DB = 1e-3
"""Largest gap, dB, that counts as rounding."""
_EXACT_ENCODER_ERROR = 1e-6


class Pictures(Protocol):
    """A few held-out examples; images (n, c, h, w) in [-1, 1], on the CPU."""

    @property
    def original(self) -> Tensor: ...
    @property
    def reconstruction(self) -> Tensor: ...
    @property
    def acted(self) -> Mapping[str, Tensor]:
        """Decodes of act(g, latent), by element."""
        ...

    @property
    def states(self) -> Sequence[tuple[float, Tensor]]:
        """States (t, x_t) from noise to image; empty without a flow."""
        ...


@dataclass(frozen=True)
class Card:
    """The content of the report card of one model."""

    numbers: Mapping[str, Any]
    """Numbers of an evaluation, from `Evaluation.numbers`."""
    pictures: Pictures
    """Pictures of the same evaluation."""
    config: Config | None
    """Configuration of an EFAE model; None for another tokenizer."""
    facts: Mapping[str, Any]
    """Facts about the run: the keys of summary.json that are not measured on the model, `credits`
    for the data (one text or several), `events` (lines of text), and any others. The page shows
    them in their order."""


def write_report(
    directory: Path,
    *,
    numbers: Mapping[str, Any],
    pictures: Pictures,
    config: Config | None,
    facts: Mapping[str, Any],
    curves: Sequence[tuple[int, float]] | None = None,
    model_card: str = "",
) -> Path:
    """Write page, JSON files, figures and model card into `directory`; returns the page's path.

    Args:
        directory: Directory, created if need be.
        numbers: Numbers, as in `Card`.
        pictures: Pictures, as in `Card`.
        config: Configuration, as in `Card`.
        facts: Facts, as in `Card`.
        curves: Points (step, training loss), oldest first.
        model_card: Model card that is stored with the model; "" renders one from the above.

    Raises:
        ValueError: A number is not finite; summary.json is written nevertheless.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "summary.json", summarize(numbers, facts))
    require_finite(numbers)
    write_json(directory / "evaluation.json", numbers)
    if config is not None:
        card = model_card or render_model_card(numbers, config, facts)
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
        cell=height // numbers["latent_shape"][1],
        compression=channels * height * width / math.prod(numbers["latent_shape"]),
        facts={name: facts[name] for name in facts if name not in ("credits", "events")},
        credits=_listed(facts.get("credits")),
        events=_listed(facts.get("events")),
        model_uri=json.dumps(facts.get("model_uri") or "models:/efae@champion"),
        settings=configuration.flatten(config) if config else {},
        advice=advise_on_linear_map(numbers, config),
        predicted=_predict_split(config),
        exact=_is_exact(numbers),
        fitted=numbers.get("fitted_action"),
        explain=explain_fitted_action,
        example="rot90" if "rot90" in numbers["gap_db"] else list(numbers["gap_db"])[-1],
        examples=len(pictures.original),
        has_curves=bool(curves),
        trajectory=bool(pictures.states),
    )


def write_comparison(directory: Path, cards: Mapping[str, Card], facts: Mapping[str, Any]) -> Path:
    """Write one page that compares several models; returns its path.

    `write_report` also writes each model's own report into a subfolder. summary.json has the
    summaries by model name.

    Args:
        directory: Directory, created if need be.
        cards: Card of each model by its name, all measured on the same images.
        facts: Facts about the comparison, shown in their order; `credits` as in `Card`.

    Raises:
        ValueError: A number is not finite.
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
    cards, groups_differ = _share_elements(cards)
    draw_gaps(
        {name: card.numbers["gap_db"] for name, card in cards.items()}, directory / "gaps.png"
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
        groups_differ=groups_differ,
        rotations=rotations,
        drifts={
            name: drift
            for name, card in cards.items()
            if (drift := card.numbers.get("drift")) is not None
        },
        exact={name: _is_exact(card.numbers) for name, card in cards.items()},
        facts={name: value for name, value in facts.items() if name != "credits"},
        protocols=_list_protocols(cards),
        credits=_listed(facts.get("credits")),
        images=next(iter(cards.values())).numbers["images"],
        examples=len(next(iter(cards.values())).pictures.original),
    )


def _share_elements(cards: Mapping[str, Card]) -> tuple[Mapping[str, Card], bool]:
    """Return the cards with the elements that all models have, and whether some have others."""
    found = [card.numbers["gap_db"] for card in cards.values()]
    shared = [g for g in found[0] if all(g in gaps for gaps in found)]
    if all(list(gaps) == shared for gaps in found):
        return cards, False

    def keep(values: Mapping[str, Any]) -> dict[str, Any]:
        return {g: values[g] for g in shared}

    def restrict(numbers: Mapping[str, Any]) -> dict[str, Any]:
        by_element = ("gap_db", "psnr_by_element", "encoder_error", "decoder_error_db")
        kept = {**numbers, **{name: keep(numbers[name]) for name in by_element}}
        kept["worst_gap_db"] = max(abs(float(gap)) for gap in kept["gap_db"].values())
        if fitted := numbers.get("fitted_action"):
            errors = {name: keep(fitted[name]) for name in fitted if name.endswith("_error")}
            kept["fitted_action"] = {**fitted, **errors}
        return kept

    return {
        name: replace(card, numbers=restrict(card.numbers)) for name, card in cards.items()
    }, True


def _list_protocols(cards: Mapping[str, Card]) -> dict[str, dict[str, Any]]:
    """Return what each model was measured with, by setting; a value for all has the key ""."""
    listed: dict[str, dict[str, Any]] = {}
    settings = {name: None for card in cards.values() for name in card.numbers["protocol"]}
    for setting in settings:
        values = {name: card.numbers["protocol"].get(setting) for name, card in cards.items()}
        first = next(iter(values.values()))
        same = all(value == first for value in values.values())
        if not (same and first is None):
            listed[setting] = {"": first} if same else values
    return listed


def _render(directory: Path, template: str, **context: Any) -> Path:
    return render_page(
        directory,
        Path(__file__).with_name("templates") / template,
        exact_db=_EXACT_DB,
        split=write_split,
        words=ELEMENT_WORDS,
        error_levels=ERROR_LEVELS,
        same_db=SAME_DB,
        **context,
    )


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-40:]


def require_finite(numbers: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the numbers of an evaluation that are not finite, if any."""
    broken = [name for name, value in numbers.items() if finite(value) != value]
    if broken:
        raise ValueError(
            f"the evaluation has values that are not finite in {', '.join(broken)}: no report can"
            " be drawn; evaluate an earlier checkpoint"
        )


def summarize(numbers: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the machine-readable summary of a run; unknown and non-finite values are None.

    It has a fitted action, without its basis, only if that was asked for.
    """
    summary = {
        name: finite(numbers[name] if name in _MEASURED else facts.get(name)) for name in _SUMMARY
    }
    if fitted := numbers.get("fitted_action"):
        summary["fitted_action"] = {
            name: finite(value) for name, value in fitted.items() if name != "basis"
        }
    return summary


def explain_fitted_action(fitted: Mapping[str, Any]) -> str:
    """Return what a fitted action means for a model, in one sentence.

    Args:
        fitted: Numbers of the action, from `FittedAction.numbers`.
    """
    found, spatial = (
        max(fitted[f"{kind}_error"].values()) for kind in ("representation", "spatial")
    )
    split = f"{write_split(fitted['multiplicities'])} (A1+A2+B1+B2+E)"
    if found <= _EXACT_ENCODER_ERROR:
        return (
            f"the channels carry the representation {split}: with it, the latent of an image gives"
            " that of every flipped or turned image, up to rounding"
        )
    errors = f"{found:.2g} for the worst element, {spatial:.2g} if only the cells move"
    if found <= spatial / 2:
        return (
            f"the channels carry the representation {split} in part: with it, the error is {errors}"
        )
    return (
        "no representation of the channels explains this encoder: with the best one,"
        f" {split}, the error is {errors}, so that equivariance has to be trained"
    )


def advise_on_linear_map(numbers: Mapping[str, Any], config: Config | None) -> str:
    """Return what it means that a model does not beat the best linear map, and what to try.

    Args:
        numbers: Numbers of an evaluation, or its summary.
        config: Configuration of an EFAE model; None for another tokenizer.

    Returns:
        One sentence or two; "" if the model beats the map, or either was not measured.
    """
    psnr, linear = numbers["psnr"], numbers["linear_psnr"]
    if psnr is None or linear is None or psnr > linear:
        return ""
    meaning = (
        f"the model, {psnr:.2f} dB, does not beat the best linear map to a latent of equal size,"
        f" {linear:.2f} dB: one matrix per patch would do at least as well"
    )
    if config is None:
        return meaning
    if config.start.model:
        return meaning
    needed = ["--model.start closed_form"] * (config.model.start != "closed_form")
    needed += ["--model.bottleneck running"] * (config.model.bottleneck == "rms")
    needed += ["--flow.prediction image"] * (config.flow.prediction == "velocity")
    start = f"start from that map ({' '.join(needed)}), " if needed else ""
    advice = f"{start}train for more steps, or try other values of --optimizer.learning-rate"
    return f"{meaning}. {advice[0].upper()}{advice[1:]}"


def _predict_split(config: Config | None) -> dict[str, int] | None:
    """Return how many channels D4's regular representation has of each kind; None without D4."""
    if config is None or config.representation.group != "D4":
        return None
    dim = config.representation.dim
    turning, chiral = (round(dim * share) for share in split_pixels(config.model.downsampling))
    return {"invariant": dim - turning - chiral, "chiral": chiral, "turning": turning}


def _is_exact(numbers: Mapping[str, Any]) -> bool:
    # The gap alone is not enough: a decoder that ignores its latent has gap 0.
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
