"""Export a model for use without this package.

    python jobs/export.py --model models:/efae@champion --format onnx --output exported
    python jobs/export.py --model builtin:openmoji-32 --format torch_export --output s3://models/efae
    python jobs/export.py --model models:/efae@champion --format diffusers --output folder
    python jobs/export.py --model builtin:openmoji-32 --format page --output page
    python jobs/export.py --model models:/efae@champion --format hub --output USER/NAME

onnx: programs for ONNX Runtime, with export.json; their numbers are compared with the model's, and
an export that differs is refused. torch_export: programs for torch.export.load and MLflow, with
programs.json. diffusers: the model folder. page: a static page that flips latents in a browser.
hub: model folder, model card and ONNX programs for the Hugging Face Hub, and the page for a Space;
the token comes from HF_TOKEN or `hf auth login`.
Addresses come from the environment (`source .local/env` for the local stack).
"""

import logging
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from data_pipelines.commands import run_command
from efae.exchange.hub import HubOptions

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
    """Folder or URI that receives the files; files of their names are replaced. For hub the
    repository, USER/NAME."""
    format: Literal["onnx", "torch_export", "diffusers", "page", "hub"] = "onnx"
    """Form of the export."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Precision in which onnx stores matrices; arithmetic is float32."""
    compare: str | None = None
    """Model that the page shows below the first, as --model takes it."""
    credit: str = ""
    """Credit of the training images, for the foot of the page and the model card."""
    hub: HubOptions = field(default_factory=HubOptions)


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
        if chosen.format == "hub":
            _publish(chosen)
            return 0
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


def _publish(chosen: Arguments) -> None:
    """Send the model to the Hub, or list what would be sent.

    Raises:
        ValueError: The user's input cannot work.
        ConnectionError: The Hub refuses or does not answer.
    """
    from efae.registry import pull
    from efae.web_page.publication import publish

    _check_options(chosen)
    files = publish(
        pull.read(chosen.model),
        chosen.output,
        chosen.hub,
        credit=chosen.credit,
        compare=[_load(chosen.compare)] if chosen.compare else [],
    )
    total = sum(file.bytes for file in files) / 1e6
    done = "would be sent" if chosen.hub.dry_run else "sent"
    print(f"{chosen.output}: {chosen.model}, {len(files)} files, {total:.2f} MB, {done}")
    width = max(len(file.repository) for file in files)
    for file in files:
        print(f"  {file.repository:{width}}  {file.path:36} {file.bytes:>11,} bytes")


def _check_options(chosen: Arguments) -> None:
    """Raise ValueError for an option or a model that the format does not take."""
    name = chosen.format
    if chosen.precision != "fp32" and name != "onnx":
        raise ValueError(f"--precision {chosen.precision}: only --format onnx has it")
    if (chosen.compare or chosen.credit) and name not in ("page", "hub"):
        raise ValueError("--compare and --credit: only --format page and hub have them")
    if chosen.hub != HubOptions() and name != "hub":
        raise ValueError("--hub.*: only --format hub has them")
    if chosen.model.startswith("diffusers:") and name not in ("onnx", "page"):
        raise ValueError(
            f"--format {name}: {chosen.model} is a folder of diffusers; only --format onnx and page"
            " take it"
        )


def _export(chosen: Arguments, folder: Path) -> dict[str, Any]:
    """Write the files, and return the manifest of ONNX programs, if there is one.

    Raises:
        ValueError: The model has no such form.
    """
    from efae.exchange.onnx_export import export_onnx
    from efae.exchange.torch_export import export_portable
    from efae.model.pretrained import as_model_folder
    from efae.registry import pull
    from efae.web_page.page import write_page

    _check_options(chosen)
    if chosen.format == "onnx":
        shown = _load(chosen.model)
        return export_onnx(shown.model, folder, shown.digest, chosen.precision)
    if chosen.format == "page":
        models = [_load(uri) for uri in (chosen.model, chosen.compare) if uri]
        return write_page(models, folder, chosen.credit)
    stored = pull.read(chosen.model)
    if chosen.format == "diffusers":
        as_model_folder(stored).write(folder)
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
