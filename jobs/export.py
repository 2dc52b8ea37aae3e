"""Export a model for use without this package.

    python jobs/export.py --model models:/efae@champion --format onnx --output exported
    python jobs/export.py --model builtin:openmoji-32 --format torch_export --output s3://models/efae
    python jobs/export.py --model models:/efae@champion --format diffusers --output folder
    python jobs/export.py --model builtin:openmoji-32 --format page --output page

onnx: programs for ONNX Runtime, with export.json; their numbers are compared with the model's, and
an export that differs is refused. torch_export: programs for torch.export.load and MLflow, with
programs.json. diffusers: the model folder. page: a static page that flips latents in a browser.
Addresses come from the environment (`source .local/env` for the local stack).
"""

import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from data_pipelines.commands import run_command

if TYPE_CHECKING:
    from efae.web_page.page import ShownModel


@dataclass
class Arguments:
    """Model and form of an export."""

    model: str
    """URI of the model: models:/NAME@ALIAS, models:/NAME/VERSION, builtin:NAME, a checkpoint or a
    model folder, local or remote. For onnx and page also diffusers:PATH, a folder with an
    AutoencoderKL, AutoencoderTiny or AutoencoderDC."""
    output: str
    """Folder or URI that receives the files; files of their names are replaced."""
    format: Literal["onnx", "torch_export", "diffusers", "page"] = "onnx"
    """Form of the export."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Precision in which onnx stores matrices; arithmetic is float32."""
    compare: str | None = None
    """Model that the page shows below the first, as --model takes it."""
    credit: str = ""
    """Credit of the training images, for the foot of the page."""


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if the files were written."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    chosen = tyro.cli(Arguments, description=__doc__, args=arguments, prog="jobs/export.py")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from data_pipelines import storage
    from data_pipelines.storage import Location
    from data_pipelines.storage.tree import walk
    from efae.checkpoints.checkpoint import CheckpointError

    try:
        output = Location.parse(chosen.output)
        storage.check_writable(output)
        with tempfile.TemporaryDirectory() as folder:
            facts = _export(chosen, Path(folder))
            sizes = walk(Path(folder)).files
            storage.upload_folder(folder, output)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{output}: {chosen.format} of {chosen.model}, {sum(sizes.values()) / 1e6:.2f} MB")
    for name, size in sizes.items():
        print(f"  {name:36} {size:>11,} bytes")
    for name, difference in facts.get("greatest_differences", {}).items():
        print(f"  {name} differs from the model by {difference:.1e} at most")
    return 0


def _export(chosen: Arguments, folder: Path) -> dict[str, Any]:
    """Write the files, and return the manifest of ONNX programs, if there is one.

    Raises:
        ValueError: The model has no such form.
    """
    from efae.exchange.onnx_export import export_onnx
    from efae.exchange.torch_export import export_portable
    from efae.registry import pull
    from efae.web_page.page import write_page

    if chosen.precision != "fp32" and chosen.format != "onnx":
        raise ValueError(f"--precision {chosen.precision}: only --format onnx has it")
    if (chosen.compare or chosen.credit) and chosen.format != "page":
        raise ValueError("--compare and --credit: only --format page has them")
    if chosen.format == "onnx":
        shown = _load(chosen.model)
        return export_onnx(shown.model, folder, shown.digest, chosen.precision)
    if chosen.format == "page":
        models = [_load(uri) for uri in (chosen.model, chosen.compare) if uri]
        return write_page(models, folder, chosen.credit)
    if chosen.model.startswith("diffusers:"):
        raise ValueError(
            f"--format {chosen.format}: {chosen.model} is a folder of diffusers; only --format onnx"
            " and page take it"
        )
    stored = pull.read(chosen.model)
    if chosen.format == "diffusers":
        stored.write(folder)
    elif stored.config.model.kind == "diffusers":
        raise ValueError(
            f"--format torch_export: {chosen.model} is an autoencoder of diffusers, whose decoder"
            " has no sampler; use --format diffusers or onnx"
        )
    else:
        export_portable(stored, folder)
    return {}


def _load(uri: str) -> "ShownModel":
    """Load one of our models, or one of diffusers."""
    from efae.exchange.diffusers_tokenizer import load_diffusers
    from efae.model.autoencoder import Autoencoder
    from efae.registry import pull
    from efae.web_page.page import ShownModel

    if uri.startswith("diffusers:"):
        return ShownModel(uri, load_diffusers(uri.removeprefix("diffusers:")))
    stored = pull.read(uri)
    return ShownModel(uri, Autoencoder.restore(stored), stored.digest)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
