"""The ratios of a run, which say more than its times, and which of them fell since another run."""

from typing import Any

LARGEST_FALL = 0.1
_SPEED = "images_per_s"
# Ratio: (section, row above, row below) of images per second.
_PAIRS = {
    "unet, octic over dense": ("unet", "octic, blocks compiled", "dense, blocks compiled"),
    "unet, compiled over eager": ("unet", "octic, blocks compiled", "octic, eager"),
    "octic over dense, blocks compiled": ("steps", "octic, blocks compiled", "dense, {}"),
    "octic over dense, eager": ("steps", "octic, eager", "dense, {}"),
    "octic over dense, half the heads": (
        "steps",
        "octic, half the heads, blocks compiled",
        "dense, {}",
    ),
    "octic over dense, wide and shallow": (
        "steps",
        "octic, twice as wide, a quarter of the depth, blocks compiled",
        "dense, {}",
    ),
    "blocks compiled over eager": ("steps", "octic, blocks compiled", "octic, eager"),
    "both passes as one graph over blocks": (
        "steps",
        "octic, both passes as one graph",
        "octic, blocks compiled",
    ),
    "half the heads over all": (
        "steps",
        "octic, half the heads, blocks compiled",
        "octic, blocks compiled",
    ),
    "micro-batches of a half over one pass": (
        "steps",
        "octic, micro-batches of a half",
        "octic, blocks compiled",
    ),
}


def compute(results: dict[str, Any]) -> dict[str, float]:
    """Return the ratios whose rows a run has; rows of another batch size do not compare."""
    rows = {
        (section.removeprefix("more_"), row["name"]): row
        for section in (
            "steps",
            "more_steps",
            "unet",
            "quickstart",
            "ceilings",
            "sampler",
            "training",
        )
        for row in results.get(section, [])
    }
    found: dict[str, float] = {}

    def add(label: str, above: Any, below: Any, key: str = _SPEED) -> None:
        comparable = above and below and above.get("batch") == below.get("batch")
        if comparable and above.get(key) and below.get(key):
            found[label] = round(above[key] / below[key], 3)

    for label, (section, above, below) in _PAIRS.items():
        below = below.format(above.partition(", ")[2])
        add(label, rows.get((section, above)), rows.get((section, below)))
    for (section, name), row in rows.items():
        if section == "quickstart" and name.startswith("quickstart"):
            for sizes in ("grey images", "colour"):
                other = f"sketch, sizes for {sizes}, batch {row.get('batch')}"
                add(f"{name}, over the sketch for {sizes}", row, rows.get((section, other)))
        if section == "ceilings" and ", as dispatched, " in name:
            other = name.replace("as dispatched", "matrix products")
            add(f"{name}, over matrix products", row, rows.get((section, other)), "tb_per_s")
        if section == "sampler" and name in ("bf16", "tf32", "bf16, compiled"):
            for key in ("encode_images_per_s", "decode_1_images_per_s"):
                add(
                    f"{key.partition('_')[0]} in {name} over fp32",
                    row,
                    rows.get((section, "fp32")),
                    key,
                )
    for key in ("utilisation", "utilisation_counted_as_dense"):
        row = rows.get(("steps", "octic, blocks compiled"), {})
        if key in row:
            found[f"{key}, octic, blocks compiled"] = row[key]
    step = rows.get(("steps", "octic, blocks compiled"))
    add("training loop over its step", rows.get(("training", "imagenet_256")), step)
    return found


def list_falls(ratios: dict[str, float], before: dict[str, float]) -> list[str]:
    """Return a line for each ratio that is over a tenth below that of another run, or missing."""
    lines: list[str] = []
    for label, old in before.items():
        new = ratios.get(label)
        if new is None:
            lines.append(f"{label}: {old}, now missing")
        elif new < (1 - LARGEST_FALL) * old:
            lines.append(f"{label}: {old}, now {new} ({new / old - 1:.0%})")
    return lines
