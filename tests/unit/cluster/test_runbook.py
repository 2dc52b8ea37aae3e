"""docs/runbook.md and docs/operating.md: what they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TEXT = "".join((ROOT / "docs" / name).read_text() for name in ("runbook.md", "operating.md"))


def test_every_failure_has_a_test_that_makes_it_happen():
    sections = (ROOT / "docs/runbook.md").read_text().split("\n## ")[1:]
    assert len(sections) >= 10
    for section in sections:
        title = section.partition("\n")[0]
        for part in ("- **Symptom**:", "- **Fix**:", "- **Test**:"):
            assert section.count(part) == 1, title
        named = section.partition("- **Test**:")[2]
        assert re.search(r"`tests/[\w/]+/test_\w+\.py::", named), title


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(tests/[\w/]+\.py[\w:]*)`", TEXT))))
def test_tests_that_are_named_exist(named):
    file, *inside = named.split("::")
    source = (ROOT / file).read_text()
    for name in inside:
        assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE), named


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z]+\.[a-z_]+)(?:=\S+)?`", TEXT))))
def test_settings_that_are_named_exist(name):
    from efae.config import Config
    from efae.config.forms import flatten

    sections = {key.partition(".")[0] for key in flatten(Config())}
    if name.partition(".")[0] in sections:
        assert name in flatten(Config())
