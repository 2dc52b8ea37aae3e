"""Preflight checks, and their outcomes as one line each; a failure names the remedy."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Check = Callable[[], str | None]
"""Function that returns what it found, if anything is worth reporting. It raises ValueError or
OSError, with a remedy, if training cannot work, and `Note` if training works all the same."""

_NAMED_NODES = 3


class Note(Exception):
    """A problem that does not prevent training, or a check that could not be made."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one check."""

    state: Literal["ok", "note", "FAIL"]
    what: str
    found: str = ""

    def __str__(self) -> str:
        return f"{self.state:3} {self.what}" + (f": {self.found}" if self.found else "")


def run_check(what: str, check: Check) -> Outcome:
    """Run one check and return its outcome."""
    try:
        return Outcome("ok", what, check() or "")
    except Note as note:
        return Outcome("note", what, str(note))
    except (ValueError, OSError) as error:
        return Outcome("FAIL", what, str(error) or type(error).__name__)


def run_checks(checks: Iterable[tuple[str, Check]]) -> list[Outcome]:
    """Run all checks, whatever fails, and return their outcomes."""
    return [run_check(what, check) for what, check in checks]


def merge_outcomes(nodes: Mapping[str, Iterable[Outcome]]) -> list[Outcome]:
    """Merge the outcomes of nodes that agree: all that pass a check, or fail with the same message.

    Args:
        nodes: Outcomes of each node, by its name.
    """
    groups: dict[tuple[str, str, str], list[tuple[str, Outcome]]] = {}
    for node, outcomes in nodes.items():
        for outcome in outcomes:
            message = "" if outcome.state == "ok" else outcome.found
            groups.setdefault((outcome.what, outcome.state, message), []).append((node, outcome))
    merged: list[Outcome] = []
    for (what, _, _), members in groups.items():
        found = dict.fromkeys(outcome.found for _, outcome in members if outcome.found)
        where = _shorten([node for node, _ in members], ", ")
        state = members[0][1].state
        merged.append(Outcome(state, f"{what} on {where}", _shorten(list(found), "; ")))
    return merged


def _shorten(texts: list[str], separator: str) -> str:
    named = separator.join(texts[:_NAMED_NODES])
    more = len(texts) - _NAMED_NODES
    return f"{named} and {more} more" if more > 0 else named
