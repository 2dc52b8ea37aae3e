"""A check says in one line whether something holds and, where it does not, what to do."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Check = Callable[[], str | None]
"""Returns what it found, where that is worth a word. Raises ValueError or OSError, with a remedy,
where training cannot work, and `Note` where it can."""

_NAMED_NODES = 3


class Note(Exception):
    """Something could not be checked, or could be better; training works all the same."""


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    state: Literal["ok", "note", "FAIL"]
    what: str
    found: str = ""

    def __str__(self) -> str:
        return f"{self.state:3} {self.what}" + (f": {self.found}" if self.found else "")


def run_check(what: str, check: Check) -> Outcome:
    """The outcome of one check."""
    try:
        return Outcome("ok", what, check() or "")
    except Note as note:
        return Outcome("note", what, str(note))
    except (ValueError, OSError) as error:
        return Outcome("FAIL", what, str(error) or type(error).__name__)


def run_checks(checks: Iterable[tuple[str, Check]]) -> list[Outcome]:
    """The outcomes of all of them, whatever fails."""
    return [run_check(what, check) for what, check in checks]


def merge_outcomes(nodes: Mapping[str, Iterable[Outcome]]) -> list[Outcome]:
    """One outcome for the nodes that agree: for all where a check is ok, else for equal messages.

    Args:
        nodes: the outcomes of each node, by its name.
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
