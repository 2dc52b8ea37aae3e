"""What needs no server: folders of one user, what Ray is told."""

import ast
import os
import tempfile
from pathlib import Path

import pytest

from efae.tracking.sender import default_spill_folder

ROOT = Path(__file__).parents[3]


def test_points_that_wait_are_one_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = default_spill_folder()
    assert folder == default_spill_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    taken = tmp_path / f"efae-spill-{os.getuid() + 1}"
    taken.symlink_to(folder)
    monkeypatch.setattr(os, "getuid", lambda: int(taken.name.rpartition("-")[2]))
    with pytest.raises(ValueError, match=f"{taken.name} belongs to another user"):
        default_spill_folder()


def find_keywords(names: set[str]) -> list[str]:
    """Where our programs pass one of these arguments to anything."""
    files = [
        path for top in ("efae", "jobs", "data_pipelines") for path in (ROOT / top).rglob("*.py")
    ]
    assert len(files) > 80
    return [
        f"{path.relative_to(ROOT)}:{node.value.lineno}: {node.arg}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg in names
    ]


def test_ray_is_told_nothing_that_it_shows():
    """Runtime environments and train_loop_config stand in Ray's dashboard in clear text."""
    shown = {"runtime_env", "env_vars", "worker_runtime_env", "train_loop_config", "metadata_json"}
    assert find_keywords(shown) == []
    assert find_keywords({"scaling_config"}) != []  # so that this would see one
