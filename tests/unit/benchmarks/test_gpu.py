import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import ratios
from benchmarks.gpu.rows import Rows
from efae.training.micro_batches import OutOfMemory

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
BARE = """
import runpy, sys
for name in ("pydantic", "jaxtyping", "PIL", "imagecodecs", "simplejpeg", "tyro", "ray", "mlflow"):
    sys.modules[name] = None  # cannot be imported
sys.argv = ["gpu", "--smoke", "--only", "steps", "training", "--output", sys.argv[1]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_it_runs_on_a_machine_without_our_environment(tmp_path):
    output = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path / "found.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert output.returncode == 0, output.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert "pydantic" in found["machine"]["stood_in"]
    rows = found["steps"] + found["training"]
    assert [row["name"] for row in rows if "error" in row] == []
    assert all(row["images_per_s"] > 0 for row in rows)
    assert "octic over dense, blocks compiled" in found["ratios"]
    assert "| octic over dense, eager |" in output.stdout


def test_a_row_keeps_its_error_and_a_batch_without_memory_is_halved(tmp_path):
    rows = Rows(CPU, tmp_path / "rows.json", budget_seconds=60, smoke=True)

    def fails():
        raise ValueError("no such kernel")

    def hungry(batch):
        if batch > 4:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        if batch > 3:
            raise OutOfMemory(batch, "tried to allocate 1 GiB")  # as a training step says it
        return {"images_per_s": 1.0}

    rows.add("steps", "broken", fails)
    assert rows.add_halving("steps", "hungry", 8, hungry)["batch"] == 2
    written = json.loads((tmp_path / "rows.json").read_text())["steps"]
    assert written[0]["error"] == "ValueError: no such kernel"
    assert [row["name"] for row in written] == ["broken", "hungry", "hungry", "hungry"]


def test_no_row_begins_after_the_budget(tmp_path):
    rows = Rows(CPU, tmp_path / "rows.json", budget_seconds=0, smoke=True)
    rows.add("steps", "late", lambda: pytest.fail("began"))
    assert rows.results["left_out"] == ["steps: late"]


def test_a_ratio_needs_rows_of_one_batch_and_falls_by_over_a_tenth():
    def results(octic, dense, batch=64):
        return {
            "steps": [
                {"name": "octic, eager", "batch": 64, "images_per_s": octic},
                {"name": "dense, eager", "batch": batch, "images_per_s": dense},
            ]
        }

    before = ratios.compute(results(130.0, 100.0))
    assert before == {"octic over dense, eager": 1.3}
    assert ratios.compute(results(130.0, 100.0, batch=32)) == {}
    assert ratios.list_falls(ratios.compute(results(240.0, 200.0)), before) == []
    (line,) = ratios.list_falls(ratios.compute(results(220.0, 200.0)), before)
    assert line == "octic over dense, eager: 1.3, now 1.1 (-15%)"
    (line,) = ratios.list_falls({}, before)
    assert line.endswith("now missing")
