import subprocess
import sys

import efae


def test_importing_efae_imports_no_heavy_package():
    script = (
        "import sys, efae; efae.load, efae.__version__;"
        "print({'torch', 'ray', 'mlflow', 'numpy', 'pydantic'} & set(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "set()"


def test_version_is_the_packages():
    assert efae.__version__.count(".") == 2
