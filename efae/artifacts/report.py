"""The report card: pictures and numbers of one model, as one page that works offline.

`write_report` takes numbers and pictures as `efae.training.evaluation.Evaluation` has them, and
writes ``report.html`` (everything inline), ``summary.json`` for machines, and each figure as a PNG
file. Every measure is explained in a sentence where it stands; the page is meant to be printed.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from efae import config as configuration
from efae.artifacts.figures import (
    ELEMENT_WORDS,
    ERROR_LEVELS,
    SAME_DB,
    draw_curves,
    draw_energy,
    draw_gap,
    draw_loss_by_time,
    draw_orbit,
    draw_reconstructions,
    draw_steps,
)
from efae.artifacts.redaction import redact
from efae.config import Config
from efae.model.autoencoder import build_representation

__all__ = ["draw_reconstructions", "summarize", "write_report"]

_MEASURED = ("psnr", "gap_db", "worst_gap_db", "group_law_error")
_SUMMARY = (
    *("run_name", "mlflow_run_id", "model_uri", "steps", "images_seen", "images_per_second"),
    *("data_wait_fraction", *_MEASURED, "recoveries", "world_size", "precision", "device"),
    "wall_seconds",
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


def write_report(
    directory: Path,
    *,
    numbers: Mapping[str, Any],
    pictures: Pictures,
    config: Config,
    facts: Mapping[str, Any],
    curves: Sequence[tuple[int, float]] | None = None,
) -> Path:
    """Write report.html, summary.json and the figures into `directory`; gives the page's path.

    Args:
        directory: made if it does not exist.
        numbers: an evaluation's `numbers()`.
        pictures: the same evaluation's pictures.
        config: of the model.
        facts: about the run: the keys of summary.json that are not measured on the model,
            `credits` (text, or several) for the data, and any more, shown in their order.
        curves: (step, training loss), oldest first.

    Raises:
        ValueError: a number is not finite; summary.json is written nevertheless.
    """
    directory.mkdir(parents=True, exist_ok=True)
    summary = json.dumps(summarize(numbers, facts), indent=2, allow_nan=False)
    (directory / "summary.json").write_text(redact(summary) + "\n")
    broken = [name for name, value in numbers.items() if _finite(value) != value]
    if broken:
        raise ValueError(
            f"the evaluation has values that are not finite in {', '.join(broken)}: there is"
            " nothing to draw; evaluate an earlier checkpoint"
        )
    representation = build_representation(config)
    _draw_figures(directory, numbers, pictures, representation.blocks, curves)

    height, width = config.data.image_size
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = _plain
    page = environment.get_template("report.html.jinja").render(
        numbers=numbers,
        config=config,
        representation=representation,
        image_size=(height, width),
        latent_shape=(
            representation.dim,
            height // config.model.downsampling,
            width // config.model.downsampling,
        ),
        compression=config.data.channels * config.model.downsampling**2 / representation.dim,
        facts={name: value for name, value in facts.items() if name != "credits"},
        credits=_listed(facts.get("credits")),
        model_uri=json.dumps(facts.get("model_uri") or "models:/efae@champion"),
        settings=configuration.flatten(config),
        exact=_is_exact(numbers),
        exact_db=_EXACT_DB,
        words=ELEMENT_WORDS,
        error_levels=ERROR_LEVELS,
        same_db=SAME_DB,
        figure=lambda name: _inline(directory / f"{name}.png"),
        examples=len(pictures.original),
        has_curves=bool(curves),
    )
    path = directory / "report.html"
    path.write_text(redact(page), encoding="utf-8")
    return path


def summarize(numbers: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The machine-readable summary of a run; what is not known, or not finite, is None."""
    return {
        name: _finite(numbers[name] if name in _MEASURED else facts.get(name)) for name in _SUMMARY
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
    blocks: Mapping[str, slice],
    curves: Sequence[tuple[int, float]] | None,
) -> None:
    channels = {irrep: block.stop - block.start for irrep, block in blocks.items()}
    floor = numbers["noise_floor_db"]
    draw_orbit(pictures.original, pictures.acted, directory / "orbit.png")
    draw_reconstructions(
        pictures.original, pictures.reconstruction, directory / "reconstructions.png"
    )
    draw_gap(numbers["gap_db"], numbers["decoder_error_db"], floor, directory / "gap.png")
    draw_energy(numbers["energy_by_irrep"], channels, directory / "energy.png")
    draw_steps(
        numbers["psnr_by_steps"],
        numbers["sharpness_by_steps"],
        numbers["sampler_steps"],
        directory / "steps.png",
    )
    draw_loss_by_time(numbers["loss_by_time"], directory / "loss_by_time.png")
    if curves:
        draw_curves(curves, directory / "curves.png")


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _listed(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else [str(entry) for entry in value]


def _plain(value: Any) -> str:
    """A value as a person would write it: 4 significant digits, 3e-07 as 3.0e-7."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or not math.isfinite(value):
            return f"{value:g}"
        if 1e-3 <= abs(value) < 1e6:
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(entry) for entry in value)
    return str(value)
