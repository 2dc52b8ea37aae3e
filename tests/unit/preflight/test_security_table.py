"""docs/security.md: every threat has a defence in a file that exists and a test that exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/security.md"
COLUMNS = ["threat", "what could happen", "our defence", "test"]
ASKED = [
    "job API without token",
    "`pipe:`",
    "pickle in a shard",
    "pickle in a checkpoint",
    "pickle in the registry",
    "tampered checkpoint",
    "secrets in logs",
    "secrets in parameters",
    "secrets in `runtime_env`",
    "secrets in the report",
    "path traversal: members of a tar",
    "path traversal: keys",
    "path traversal: registry",
    "MLflow beyond loopback",
    "Ray's ports beyond loopback",
]
"""Threats that must never lose their row."""


def read_rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables whose columns are `COLUMNS`."""
    rows: list[list[str]] = []
    ours = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|"):
            ours = False
        elif cells == COLUMNS:
            ours = True
        elif ours and not re.fullmatch(r"[-| ]+", line):
            rows.append(cells)
    return rows


ROWS = read_rows(PAGE.read_text())


@cache
def find_tests(file: Path) -> set[str]:
    """Names of a file's tests as pytest has them, CLASS::NAME where they are in a class."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def find_faults(row: list[str]) -> list[str]:
    """What is wrong with a row of the table."""
    if len(row) != len(COLUMNS) or not all(row):
        return [f"{len(row)} cells, wanted {len(COLUMNS)}, none empty"]
    faults = [
        f"{path} is no file"
        for path in re.findall(r"`([\w./-]+\.(?:py|sh|yaml|toml))`", row[2])
        if not (ROOT / path).is_file()
    ]
    tests = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", row[3])
    for path, name in tests:
        if not (ROOT / path).is_file():
            faults.append(f"{path} is no file")
        elif name not in find_tests(ROOT / path):
            faults.append(f"{path} has no test {name}")
    return faults if tests else [*faults, "names no test"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_threat_has_its_defence_and_its_test(row: list[str]):
    assert find_faults(row) == []


@pytest.mark.parametrize("threat", ASKED)
def test_a_threat_that_was_asked_for_has_its_row(threat: str):
    assert sum(threat in row[0] for row in ROWS) == 1


@pytest.mark.parametrize(
    ("test", "fault"),
    [
        ("none yet", "names no test"),
        ("`tests/unit/test_nothing.py::test_it`", "is no file"),
        ("`tests/unit/preflight/test_security_table.py::test_nothing`", "has no test test_nothing"),
        ("`tests/unit/preflight/test_security_table.py::find_faults`", "has no test find_faults"),
    ],
)
def test_a_row_without_a_test_would_be_seen(test: str, fault: str):
    table = f"| {' | '.join(COLUMNS)} |\n|---|---|---|---|\n| a | b | c | {test} |\n"
    (row,) = read_rows(table)
    assert fault in find_faults(row)[0]


def test_a_defence_that_moved_would_be_seen():
    good = "`tests/unit/preflight/test_security_table.py::test_a_defence_that_moved_would_be_seen`"
    assert find_faults(["a", "b", "`efae/moved.py`", good]) == ["efae/moved.py is no file"]
