"""Static page that encodes a picture, acts on its latent and decodes it, in a browser.

`write_page` writes a folder for any web host:

    index.html, page.css, model.js, page.js
    page.json         models, samples and credit, and whether there is a runtime for GPUs
    models/0/, ...    what `efae.exchange.onnx_export` writes; page.json has the hash of its
                      manifest, which has those of the programs
    samples/, runtime/
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from efae.exchange.onnx_export import MANIFEST, Tokenizer, export_onnx, require_packages
from efae.model.stored_files import sha256
from efae.web_page.runtime import VERSION, copy_runtime, fetch_runtime

GPU_BYTES = 20_000_000
"""Size of programs from which a page also has the runtime for GPUs, which takes 27 MB: on smaller
networks, a CPU is done before it is loaded."""
_STATIC = Path(__file__).with_name("static")
_PHOTOGRAPH = "china.jpg"
_SAMPLES: Mapping[str, str] = {
    "snail.png": "A drawing of a snail",
    "party.png": "A drawing of a party popper",
    _PHOTOGRAPH: "A photograph of a temple",
}
_CREDIT = (
    "The drawings are from OpenMoji (openmoji.org), CC BY-SA 4.0; the photograph is by"
    " danielbuechele, CC BY 2.0."
)


@dataclass(frozen=True)
class ShownModel:
    """A model of the page.

    Attributes:
        name: Heading.
        model: Model.
        digest: Hash of its weights, if known.
    """

    name: str
    model: Tokenizer
    digest: str | None = None


def check_page() -> str:
    """Check that `write_page` has what it needs here, and return the runtime's name.

    Raises:
        ValueError: A package is missing, or ONNX Runtime for browsers cannot be had.
    """
    require_packages()
    fetch_runtime()
    return f"onnxruntime-web {VERSION}"


def write_page(models: Sequence[ShownModel], destination: Path, credit: str = "") -> dict[str, Any]:
    """Write the page, and return the manifest of the first model.

    Args:
        models: One model, or several to compare.
        destination: Existing folder.
        credit: Credit of the training images, shown at the foot.

    Raises:
        ValueError: ONNX Runtime for browsers cannot be had, or a model cannot be exported.
    """
    check_page()  # first: an export takes a minute
    for path in _STATIC.glob("*.*"):
        if path.suffix != ".png":
            shutil.copyfile(path, destination / path.name)
    samples = destination / "samples"
    samples.mkdir(exist_ok=True)
    photographs = resources.files("sklearn.datasets.images")
    for name in _SAMPLES:
        folder = photographs if name == _PHOTOGRAPH else _STATIC
        (samples / name).write_bytes((folder / name).read_bytes())
    manifests: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for i, shown in enumerate(models):
        folder = destination / f"models/{i}"
        folder.mkdir(parents=True, exist_ok=True)
        manifests.append(export_onnx(shown.model, folder, shown.digest))
        data = (folder / MANIFEST).read_bytes()
        entries.append(
            {
                "name": shown.name,
                "folder": f"models/{i}",
                "manifest": {"bytes": len(data), "sha256": sha256(data)},
            }
        )
    sizes = [file["bytes"] for manifest in manifests for file in manifest["files"].values()]
    with_gpu = sum(sizes) >= GPU_BYTES
    copy_runtime(destination / "runtime", with_gpu)
    settings = {
        "webgpu": with_gpu,
        "models": entries,
        "samples": [{"file": name, "title": title} for name, title in _SAMPLES.items()],
        "credit": f"{credit} {_CREDIT}".strip(),
    }
    (destination / "page.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return manifests[0]
