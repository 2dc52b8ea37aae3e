"""Export of a model as ONNX programs, which run without this package and without torch.

`export_onnx` writes a folder:

    encode.onnx        image -> latent
    velocity.onnx      (x_t, t, latent) -> velocity: the field that the sampler follows, with the
                       configuration's guidance; t in (0, 1], one per example
    decode.onnx        (latent, noise) -> image: the configuration's sampler, steps and guidance
    act-ELEMENT.onnx   latent -> latent of the transformed image, for each element of the group
    export.json        sha256 of each, shapes, sizes, sampler, the action as a table, and how far
                       the programs are from the model

A decoder without flow has no velocity.onnx, and its decode.onnx takes the latent alone. All accept
any batch. Those of convolutional networks accept every height and width in multiples of the
latent's cells, from LEAST_CELLS on; those of a transformer only the configuration's.

Programs compute in float32. Octic layers keep their few weights, and ONNX Runtime folds them into
plain ones when it loads a program. Precision "fp16" stores the matrices in half precision, except
those between pixels, latents and tokens: in half precision, too, these alone move latents and
pixels by up to 5e-4. Arithmetic in half precision moves them by 2e-3 to 4e-3, beyond the bound.
"""

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor, nn

from efae import __version__
from efae.exchange.diffusers_tokenizer import DiffusersTokenizer
from efae.exchange.onnx_graph import OPSET, Precision, convert_to_onnx, make_act
from efae.exchange.torch_export import (
    LEAST_CELLS,
    Decode,
    Encode,
    Evaluation,
    list_evaluations,
    tabulate_elements,
)
from efae.model.autoencoder import Autoencoder
from efae.model.networks.diffusers_vae import read_size
from efae.model.sampler import time_grid
from efae.model.stored_files import sha256
from efae.symmetry import Element

MANIFEST = "export.json"
FORMAT_VERSION = 1
BOUNDS: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 1e-3}
"""Greatest difference from the model, in latents and pixels, at which an export is kept."""
BATCHES = (1, 3)
"""Batches at which programs are compared with the model."""
Tokenizer = Autoencoder | DiffusersTokenizer
_Program = Callable[..., np.ndarray]


def export_onnx(
    model: Tokenizer, destination: Path, digest: str | None = None, precision: Precision = "fp32"
) -> dict[str, Any]:
    """Write the programs and their manifest, and return the manifest.

    Args:
        model: Model in evaluation mode, on the CPU.
        destination: Existing folder; files of these names are replaced.
        digest: Hash of the model's weights, for the manifest.
        precision: Precision of the stored matrices.

    Raises:
        ValueError: A package is missing, or a program is further from the model than BOUNDS; then
            the folder has no manifest.
    """
    require_packages()
    import onnx_ir as ir

    model = copy.deepcopy(model).float()
    if isinstance(model, Autoencoder) and model.basis is not None:
        model.basis.make_constant()
    (destination / MANIFEST).unlink(missing_ok=True)  # the folder stays incomplete while we write
    shapes = _Shapes(model)
    modules = _list_modules(model, shapes)
    for name, (module, inputs, pixels) in modules.items():
        ir.save(convert_to_onnx(module, inputs, pixels, precision), destination / name)
    for element in model.group:
        ir.save(make_act(model.representation, element), destination / _name_act(element))
    names = [*modules, *map(_name_act, model.group)]
    run = {name: _open(destination / name) for name in names}
    differences = dict.fromkeys(modules, 0.0)
    for size, batch in itertools.product(shapes.list_sizes(), BATCHES):
        for name, found in _compare(model, run, shapes, size, batch).items():
            # Not a number stays one: max would drop it.
            differences[name] = float(np.maximum(differences[name], found))
    for name, found in differences.items():
        if not found <= BOUNDS[precision]:
            raise ValueError(
                f"{name} differs from the model by {found:.1e}, in latents or pixels, and"
                f" {precision} allows {BOUNDS[precision]:.0e}: not exported"
                + ("; use fp32" if precision == "fp16" else "")
            )
    manifest = {
        "format_version": FORMAT_VERSION,
        "efae_version": __version__,
        "model_digest": digest,
        "opset": OPSET,
        "weights": precision,
        "arithmetic": "fp32",
        **shapes.describe(),
        "group": model.group.name,
        "representation": dict(model.representation.multiplicities),
        "sampler": _describe_sampler(model) if _has_flow(model) else None,
        "elements": tabulate_elements(model.representation),
        "compared": {"batches": BATCHES, "sizes": shapes.list_sizes()},
        "greatest_differences": differences,
        "files": {
            name: {"bytes": len(data), "sha256": sha256(data)}
            for name in names
            for data in [(destination / name).read_bytes()]
        },
    }
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    (destination / MANIFEST).write_text(text, encoding="utf-8")
    return json.loads(text)


class _Shapes:
    """Shapes of a model's images and latents."""

    def __init__(self, model: Tokenizer):
        self.dim = model.representation.dim
        if isinstance(model, DiffusersTokenizer):
            self.channels, self.cell, self.any_size = model.channels, model.downsampling, True
            height, width = (
                max(side // self.cell, LEAST_CELLS) * self.cell
                for side in read_size(model.network.config) or (0, 0)
            )
            self.image_size = height, width
        else:
            data, network = model.config.data, model.config.model
            self.channels, self.cell = data.channels, network.downsampling
            self.image_size = data.image_size
            self.any_size = network.kind in ("unet", "diffusers")
        self.any_size &= min(self.image_size) >= LEAST_CELLS * self.cell

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width, in cells, at which programs are traced.

        Unequal where sizes are free: torch.export would take equal ones for a condition.
        """
        return (3, 5) if self.any_size else self.count_cells(self.image_size)

    def count_cells(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.cell, size[1] // self.cell

    def list_sizes(self) -> list[tuple[int, int]]:
        """Heights and widths at which programs are compared with the model."""
        others = [(2, 3), (5, 4)] if self.any_size else []
        return [self.image_size, *((h * self.cell, w * self.cell) for h, w in others)]

    def describe(self) -> dict[str, Any]:
        return {
            "image_shape": [self.channels, *self.image_size],
            "latent_shape": [self.dim, *self.count_cells(self.image_size)],
            "pixels_per_cell": self.cell,
            "least_cells": LEAST_CELLS if self.any_size else None,
        }


class _Velocity(nn.Module):
    """The field of the sampler."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, x_t: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        f, flow = self.model.config.model.downsampling, self.model.config.flow
        # So that the export knows one variable per axis, not two.
        for axis, pixels in ((0, 1), (2, f), (3, f)):
            cast(Any, torch)._check(x_t.shape[axis] == pixels * latent.shape[axis])
        v = self.model.velocity(x_t, t, latent)
        if flow.guidance_scale == 1:
            return v
        base, (low, high) = self.model.velocity(x_t, t, None), flow.guidance_interval
        is_guided = ((t > low) & (t <= high))[:, None, None, None]
        return torch.where(is_guided, base + flow.guidance_scale * (v - base), v)


class _DecodeAtOnce(nn.Module):
    """`decode` of a model without flow."""

    def __init__(self, model: Tokenizer):
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent)


def _has_flow(model: Tokenizer) -> TypeGuard[Autoencoder]:
    return isinstance(model, Autoencoder) and model.has_flow


def _name_act(element: Element) -> str:
    return f"act-{element}.onnx"


def _list_modules(
    model: Tokenizer, shapes: _Shapes
) -> dict[str, tuple[nn.Module, dict[str, Tensor], list[int]]]:
    """Return module, inputs and `pixels` of `trace_program`, by the name of the program."""
    f, (rows, columns) = shapes.cell, shapes.cells
    # A batch of two, since torch.export would specialise a batch of one to a constant.
    image = torch.zeros(2, shapes.channels, rows * f, columns * f)
    latent = torch.zeros(2, shapes.dim, rows, columns)
    free = shapes.any_size
    encode = Encode(model, f), {"image": image}, [f] * free
    if not _has_flow(model):
        return {
            "encode.onnx": encode,
            "decode.onnx": (_DecodeAtOnce(model), {"latent": latent}, [1] * free),
        }
    field = {"x_t": image, "t": torch.full((2,), 0.5), "latent": latent}
    return {
        "encode.onnx": encode,
        "velocity.onnx": (_Velocity(model), field, [f, 0, 1] * free),
        "decode.onnx": (
            Decode(model, model.config.flow),
            {"latent": latent, "noise": image},
            [1, f] * free,
        ),
    }


def require_packages() -> None:
    """Raise ValueError if a package that the export needs is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(
                f"the export of ONNX programs needs the package {name}: in the checkout of efae,"
                " pip install '.[onnx]'"
            ) from error


def _open(path: Path) -> _Program:
    """Return the program in a file as a function of its inputs by name."""
    ort = cast(Any, import_module("onnxruntime"))
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> np.ndarray:
        return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]

    return run


def _compare(
    model: Tokenizer,
    run: Mapping[str, _Program],
    shapes: _Shapes,
    size: tuple[int, int],
    batch: int,
) -> dict[str, float]:
    """Return the greatest difference of each program from the model, in latents and pixels."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, shapes.channels, *size)
    image = torch.rand(shape, generator=generator) * 2 - 1
    noise = torch.randn(shape, generator=generator)
    with torch.no_grad():
        latent = model.encode(image)
        found = {"encode.onnx": _distance(run["encode.onnx"](image=image), latent)}
        for element in model.group:
            turned = run[_name_act(element)](latent=latent)
            assert np.array_equal(turned, model.act(element, latent).numpy())
        if not _has_flow(model):
            decoded = run["decode.onnx"](latent=latent)
            return found | {"decode.onnx": _distance(decoded, model.decode(latent))}
        decoded = run["decode.onnx"](latent=latent, noise=noise)
        found["decode.onnx"] = _distance(decoded, model.decode(latent, noise=noise))
        field, found["velocity.onnx"] = _Velocity(model), 0.0
        for each in _list_evaluations(model):
            t, span = torch.full((batch,), each.t), abs(each.advance or each.ahead)
            v = run["velocity.onnx"](x_t=noise, t=t, latent=latent)
            # In pixels: as far as this evaluation moves the image.
            moved = span * _distance(v, field(noise, t, latent))
            found["velocity.onnx"] = max(found["velocity.onnx"], moved)
    return found


def _distance(found: np.ndarray, expected: Tensor) -> float:
    assert found.shape == tuple(expected.shape)
    return float(np.abs(found - expected.numpy()).max())


def _list_evaluations(model: Autoencoder) -> list[Evaluation]:
    flow = model.config.flow
    grid = time_grid(flow.default_steps, power=flow.sampler_power, shift=flow.sampler_shift)
    return list_evaluations([float(t) for t in grid], flow.sampler)


def _describe_sampler(model: Autoencoder) -> dict[str, Any]:
    flow = model.config.flow
    return {
        "method": flow.sampler,
        "steps": flow.default_steps,
        "power": flow.sampler_power,
        "shift": flow.sampler_shift,
        "evaluations": [each._asdict() for each in _list_evaluations(model)],
    }
