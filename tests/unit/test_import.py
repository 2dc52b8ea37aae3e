import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

import efae
from efae.config import Config
from efae.model.autoencoder import Autoencoder
from efae.model.objective import Objective
from efae.presets import PRESETS
from efae.symmetry import Representation

ROOT = Path(__file__).parents[2]


def test_importing_efae_imports_no_heavy_package():
    script = (
        "import sys, efae; efae.load, efae.__version__;"
        "print({'torch', 'ray', 'mlflow', 'numpy', 'pydantic'} & set(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "set()"


def test_dir_lists_what_is_public_and_each_name_is_the_class_itself():
    assert set(dir(efae)) == {*efae.__all__, "__version__"}
    script = (
        "import sys, efae; efae.Representation, efae.Autoencoder, efae.Objective, efae.Config,"
        " efae.PRESETS, efae.load; print({'ray', 'mlflow'} & set(sys.modules),"
        " [name for name in sys.modules if name.startswith('data_pipelines.')])"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    options = ["data_pipelines.loading", "data_pipelines.loading.options"]  # imports nothing else
    assert output.strip() == f"set() {options}"
    assert efae.Autoencoder is Autoencoder
    assert efae.Objective is Objective
    assert efae.Config is Config
    assert efae.PRESETS is PRESETS
    groups = (efae.D4, efae.C4, efae.FLIPS, efae.MIRROR, efae.TRIVIAL)
    assert [group.name for group in groups] == ["D4", "C4", "flips", "mirror", "trivial"]
    assert efae.Representation is Representation
    with pytest.raises(AttributeError, match="no attribute 'encoder'"):
        _ = efae.encoder


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("efae.evaluation_task", {"ray.train", "mlflow", "pandas", "matplotlib", "torch._dynamo"}),
        ("efae.preflight.node_checks", {"ray", "mlflow", "torch", "pandas"}),
        ("efae.ray_trainer", {"mlflow", "matplotlib", "torch._dynamo"}),
        ("efae.experiment.tokenizer", {"mlflow", "matplotlib", "torch._dynamo"}),
    ],
)
def test_a_process_of_a_run_imports_only_what_it_needs(module, absent):
    """Each takes a second of every process that starts; a run starts ten."""
    output = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print({absent} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == "set()"


def test_importing_efae_takes_less_than_50_ms():
    """The least of a few, since others share the machine; Python's own start is not counted."""
    script = "import time; t = time.perf_counter(); import efae; print(time.perf_counter() - t)"
    seconds = [
        float(
            subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
        )
        for _ in range(3)
    ]
    assert min(seconds) < 0.05


def test_a_wheel_holds_the_library_and_the_models_that_come_with_it():
    """As setuptools finds them; jobs and cluster are of a checkout."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    find = settings["packages"]["find"]
    assert find.pop("namespaces") is False
    packages = find_packages(str(ROOT), **find)
    assert {name.partition(".")[0] for name in packages} == {"efae", "data_pipelines"}
    assert "efae.symmetry" in packages
    tops = (ROOT / "efae", ROOT / "data_pipelines")
    modules = {path.parent for top in tops for path in top.rglob("*.py")}
    assert {ROOT / name.replace(".", "/") for name in packages} == modules
    data = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    for folder in (ROOT / "efae" / "builtin").iterdir():
        assert set(folder.iterdir()) <= data
    assert set((ROOT / "efae").rglob("*.jinja")) <= data


def test_version_is_the_packages():
    assert efae.__version__.count(".") == 2
