"""Set an alias of a registered version if it passes the gates; exit status 0 only if it was set.

    python jobs/promote.py --model models:/efae@candidate --alias champion
    python jobs/promote.py --model models:/efae/3 --alias champion --metric ssim --margin 0.001
    python jobs/promote.py --model models:/efae/3 --alias candidate

The gates:
- integrity: the stored files are the registered ones, and load; never skipped
- lineage: the version was not measured on its training images
- images: both versions were measured on the same held-out images
- metric: the version is better than the present holder of the alias; a tie fails
- gap: its worst gap is no larger, up to rounding, and over no fewer flips and turns

A generator has the gates images (jobs/generate.py compare measured both versions on the same
reference, in the same features, from samples drawn alike) and metric (its FID is lower).

A champion must pass all gates, other aliases only integrity, or all with --compare. Prints the
previous version of the alias and how to restore it. MLFLOW_TRACKING_URI names the registry
(`source .local/env` for the local stack).
"""

import logging
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from data_pipelines.commands import run_command
from efae.registry.promotion import GATES, GateName, Promotion, Terms, promote
from efae.tracking.server import Server


@dataclass
class Arguments:
    """Version, alias and terms of a promotion."""

    model: str
    """URI of the version: models:/NAME/VERSION or models:/NAME@ALIAS."""
    alias: str = "champion"
    """Alias to set."""
    metric: str | None = None
    """Metric in which the version must be better: psnr (the default), ssim, held_out_loss,
    worst_gap_db, lpips or fid, if both versions have it; fid for a generator."""
    margin: float = 0.0
    """Amount by which the metric must at least be exceeded."""
    gap_tolerance: float = 1e-3
    """Tolerated increase of the worst gap, in dB; the default allows for rounding."""
    skip: tuple[GateName, ...] = ()
    """Gates to skip; the version's tag promoted.ALIAS records them."""
    compare: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Apply all gates to an alias other than champion, too."""


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if the alias points to the version."""
    chosen = tyro.cli(Arguments, description=__doc__, args=arguments, prog="jobs/promote.py")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        promotion = promote(
            chosen.model,
            chosen.alias,
            Terms(chosen.metric, chosen.margin, chosen.gap_tolerance, chosen.skip),
            Server.from_environment(),
            compare=chosen.compare or chosen.alias == "champion",
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_gates(promotion)
    print(describe(promotion), flush=True)
    return 0 if promotion.succeeded else 1


def print_gates(promotion: Promotion) -> None:
    """Print one line per gate."""
    present = promotion.before.uri if promotion.before else "(nothing)"
    rows = [("", "gate", promotion.version.uri, present, "asked")]
    rows += [(v.outcome, v.gate, v.candidate, v.present, v.remark) for v in promotion.verdicts]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))


def describe(promotion: Promotion) -> str:
    """Describe the previous and the present version of the alias, and how to restore the former."""
    version, before, now = promotion.version, promotion.before, promotion.now
    alias = f"models:/{version.name}@{promotion.alias}"
    if promotion.refused:
        return f"refused: {alias} is {before.uri if before else 'nothing'} as before"
    if now != version:
        return (
            f"error: {alias} was set to {version.uri}, but is {now.uri if now else 'nothing'}: it"
            " was changed by others at the same time; run this again if it should not stay so"
        )
    if before == version:
        return f"{alias} is {version.uri} already"
    if before is None:
        return f"{alias} is {version.uri} now; it named nothing before"
    gates = f" --skip {' '.join(GATES)}" if len(promotion.verdicts) > 1 else ""
    return (
        f"{alias} is {version.uri} now; it was {before.uri}. To go back:\n"
        f"  python jobs/promote.py --model {before.uri} --alias {promotion.alias}{gates}"
    )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
