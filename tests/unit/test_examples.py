"""Examples and the README's first lines run as they stand, in a process of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import efae

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "flip_latents.ipynb"


def run(*arguments: object, folder: Path) -> str:
    """What Python prints, run in `folder`, with no server in the environment."""
    hidden = ("AWS_", "MLFLOW_", "RAY_", "EFAE_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(hidden)}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_octic_layers_commute_and_convolutions_do_not(tmp_path):
    printed = run(EXAMPLES / "octic_layers.py", "--steps", 2, folder=tmp_path)
    rows = {
        row[0]: [float(n) for n in row[1:]] for row in map(str.split, printed.splitlines()[-8:])
    }
    assert set(rows) == {g.name for g in efae.D4}
    for name, (octic, convolutions) in rows.items():
        assert octic < 1e-4
        assert name == "identity" or convolutions > 1e-2


def test_a_loop_of_ones_own_trains_a_model_that_loads(tmp_path):
    printed = run(
        EXAMPLES / "own_training_loop.py", "--steps", 50, "--output", "mine", folder=tmp_path
    )
    first, second = (float(n) for n in re.findall(r"loss ([\d.]+)", printed))
    assert second < first
    assert printed.count("g decode(z; noise)| <=") == 8
    assert efae.load(tmp_path / "mine").config.data.image_size == (32, 32)


def test_a_loop_of_ones_own_reads_shards(shards, tmp_path):
    script = EXAMPLES / "own_training_loop.py"
    assert "dB PSNR" in run(script, "--steps", 2, "--data", shards, folder=tmp_path)


def test_the_loader_resumes_in_plain_torch(tmp_path):
    printed = run(EXAMPLES / "loader_in_torch.py", "--steps", 15, folder=tmp_path)
    assert "200 images" in printed
    assert "'epoch': 1, 'consumed': 40" in printed  # 15 batches of 16


def test_the_notebook_runs_from_top_to_bottom():
    script = (
        "import json; book = json.load(open('flip_latents.ipynb', encoding='utf-8')); names = {}\n"
        "for cell in book['cells']:\n"
        "    if cell['cell_type'] == 'code': exec(''.join(cell['source']), names)"
    )
    printed = run("-c", script, folder=EXAMPLES)
    assert "image (8, 3, 32, 32) -> latent (8, 32, 4, 4)" in printed
    assert all(re.search(rf"^{g.name} ", printed, re.MULTILINE) for g in efae.D4)


def test_the_notebook_is_stored_with_pictures_and_is_small():
    assert NOTEBOOK.stat().st_size < 300_000
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_the_first_lines_of_the_readme_run_anywhere(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("```python\n")[1].split("```")[0]
    assert "builtin:openmoji-32" in lines
    run("-W", "error", "-c", lines, folder=tmp_path)


def test_the_readme_lists_every_example():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {name for name in names if f"(examples/{name})" in text} == names
