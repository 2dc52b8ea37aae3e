"""HTML pages that work offline: a template with inline figures; secrets are redacted."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_pipelines import storage
from data_pipelines.storage import LocationLike
from efae.symmetry.representation import IRREPS
from efae.tracking.redaction import redact, redact_strings


def render_page(folder: Path, template: Path, **context: Any) -> Path:
    """Write ``report.html`` from a template; returns its path.

    The template may extend those in the `templates` folder of this package. It can use the filter
    `plain`, and `figure(name)`, which inlines the picture of that name in `folder`.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).with_name("templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain

    def figure(name: str) -> str:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        return f"data:image/{Path(name).suffix[1:]};base64,{data}"

    page = environment.get_template(template.name).render(figure=figure, **context)
    path = folder / "report.html"
    path.write_text(redact(page), encoding="utf-8")
    return path


def write_json(place: LocationLike, values: Mapping[str, Any]) -> None:
    """Write indented JSON without passwords and keys; ValueError if a number is not finite."""
    text = json.dumps(redact_strings(values), indent=2, allow_nan=False) + "\n"
    storage.write_bytes(place, text.encode())


def finite(value: Any) -> Any:
    """Replace each number in `value` that is not finite by None."""
    if isinstance(value, Mapping):
        entries = cast(Mapping[str, Any], value)
        return {name: finite(entry) for name, entry in entries.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> str:
    """Format a value for readers: 4 significant digits, 3e-07 as 3.0e-7."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not value or not math.isfinite(value):
            return f"{value:g}"
        if 1e-3 <= abs(value) < 1e6:
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if isinstance(value, Mapping):
        entries = cast(Mapping[str, Any], value)
        return ", ".join(f"{name}: {plain(entry)}" for name, entry in entries.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in cast(Sequence[Any], value))
    return str(value)


def write_split(multiplicities: Mapping[str, int]) -> str:
    """Format the multiplicities of A1, A2, B1, B2 and E, such as 8+1+4+3+8."""
    return "+".join(str(multiplicities.get(irrep, 0)) for irrep in IRREPS)
