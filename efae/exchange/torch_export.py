"""Export of a model for use without this package: torch.export and MLflow's pyfunc flavour.

`export_portable` writes these files beside those of a model:

    encode.pt2          image -> latent           torch.export.load(path).module()(image)
    decode.pt2          (latent, noise) -> image  the configuration's sampler, steps and guidance
    programs.json       sha256 of both, shapes, the least height and width in cells where programs
                        accept any (else null), and how each group element acts on a latent
    portable_model.py   lets MLflow encode, act and decode with them
    requirements.txt, python_env.yaml

The programs compute in float32 on the CPU, for any batch. Those of a unet accept every height and
width in multiples of its cells, from LEAST_CELLS on; those of a transformer only the
configuration's. `efae.load` reads none of these files.

Security of torch.export.load (torch 2.13): weights and constants are raw bytes, but an archive can
have them, and the example inputs, unpickled, and sympy evaluates the sizes in the graph. Trust a
program as you trust code. Ours hold nothing pickled, not even example inputs, and portable_model.py
checks sha256 before it loads one, which detects damage. Against a malicious author only the origin
of programs.json helps, whose hash is a tag of the registered version.
"""

import hashlib
import itertools
import json
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlflow.pyfunc
import numpy as np
import torch
import torch._higher_order_ops as torch_control
import torch.nn.functional as F
from mlflow.models import Model, ModelSignature
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from efae.config import FlowConfig
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import StoredModel
from efae.model.sampler import Method, time_grid
from efae.symmetry import Representation

ENCODE, DECODE, PROGRAMS = "encode.pt2", "decode.pt2", "programs.json"
SCRIPT, REQUIREMENTS, ENVIRONMENT = "portable_model.py", "requirements.txt", "python_env.yaml"
PORTABLE_FILES = (ENCODE, DECODE, PROGRAMS, SCRIPT, REQUIREMENTS, ENVIRONMENT)
LEAST_CELLS = 2
"""Least height and width of latents where programs accept any: torch.export fixes sides of 1."""
_FOR_PEOPLE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
"""Metadata on each operation's origin: most of a program's size, and paths of this host."""


def export_portable(stored: StoredModel, destination: Path) -> None:
    """Write `PORTABLE_FILES` into `destination`.

    Args:
        stored: Model to export.
        destination: Existing folder; files of these names are replaced.

    Raises:
        CheckpointError: The weights do not fit the configuration.
        ValueError: The configuration cannot be built.
    """
    model, config = Autoencoder.restore(stored), stored.config
    for module in model.modules():  # a view would be stored with its whole base
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone(memory_format=torch.contiguous_format))
    channels, (height, width) = config.data.channels, config.data.image_size
    f = config.model.downsampling
    any_size = config.model.kind == "unet" and min(height, width) >= LEAST_CELLS * f
    # A batch of two, since torch.export would specialise a batch of one to a constant; and unequal
    # sides, since it would take equal ones for a condition.
    cells = (3, 5) if any_size else (height // f, width // f)
    image = torch.zeros(2, channels, *(side * f for side in cells))
    latent = torch.zeros(2, model.representation.dim, *cells)
    encoder, decoder = model.encoder, model.decoder
    del model.decoder  # so that the encoder's program does not hold its weights
    _write_program(trace_program(Encode(model, f), (image,), [f] * any_size), destination / ENCODE)
    model.decoder = decoder
    del model.encoder
    decode = Decode(model, config.flow)
    _write_program(trace_program(decode, (latent, image), [1, f] * any_size), destination / DECODE)
    model.encoder = encoder
    facts = {
        "model_digest": stored.digest,
        "image_shape": [channels, height, width],
        "latent_shape": [model.representation.dim, height // f, width // f],
        "least_cells": LEAST_CELLS if any_size else None,
        "sampler": config.flow.sampler,
        "sampler_steps": config.flow.default_steps,
        "sha256": {
            name: hashlib.sha256((destination / name).read_bytes()).hexdigest()
            for name in (ENCODE, DECODE)
        },
        "elements": tabulate_elements(model.representation),
    }
    (destination / PROGRAMS).write_text(json.dumps(facts, indent=1))
    shutil.copyfile(Path(__file__).with_name("pyfunc_model.py"), destination / SCRIPT)
    pins = [f"{name}=={version(name).split('+')[0]}" for name in ("mlflow", "numpy", "torch")]
    (destination / REQUIREMENTS).write_text("\n".join(pins) + "\n")
    (destination / ENVIRONMENT).write_text(
        f"python: {platform.python_version()}\ndependencies:\n- -r {REQUIREMENTS}\n"
    )


def describe_portable(model: Model) -> None:
    """Add the pyfunc flavour and its signature to an MLmodel."""
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.pyfunc.loaders.code_model",
        python_env=ENVIRONMENT,
        model_code_path=SCRIPT,
        artifacts={name: {"path": name, "uri": name} for name in (PROGRAMS, ENCODE, DECODE)},
    )
    arrays = Schema([TensorSpec(np.dtype(np.float32), (-1, -1, -1, -1))])
    params = ParamSchema(
        [
            ParamSpec("task", DataType.string, "encode"),
            ParamSpec("element", DataType.string, "identity"),
            ParamSpec("seed", DataType.long, 0),
        ]
    )
    model.signature = ModelSignature(inputs=arrays, outputs=arrays, params=params)


class Evaluation(NamedTuple):
    """One evaluation of the velocity v at (y, t), and its update of the state.

    x += advance * v + advance_slope * (previous v); then y = x + ahead * v.
    """

    t: float
    advance: float
    advance_slope: float = 0.0
    ahead: float = 0.0


def list_evaluations(times: Sequence[float], method: Method) -> list[Evaluation]:
    """List the steps of `sampler.integrate` by velocity, so that a loop can be traced once.

    Args:
        times: Times, decreasing from 1 to 0.
        method: Method of the sampler.
    """
    found: list[Evaluation] = []
    for t, end in itertools.pairwise(times):
        span = end - t
        if method == "midpoint":
            middle = (t + end) / 2
            found += [Evaluation(t, 0, ahead=middle - t), Evaluation(middle, span)]
        elif method == "heun" and end != 0:
            found += [Evaluation(t, 0, ahead=span), Evaluation(end, span / 2, span / 2)]
        else:
            found.append(Evaluation(t, span))
    return found


class Encode(nn.Module):
    """`encode` of a model, for sides in multiples of its cells.

    Args:
        model: Module with `encode`.
        downsampling: Pixels per latent cell and side.
    """

    def __init__(self, model: nn.Module, downsampling: int):
        super().__init__()
        self.model: Any = model
        self.downsampling = downsampling

    def forward(self, image: Tensor) -> Tensor:
        f = self.downsampling
        # The same image, with sides that the export knows to be multiples of f.
        return self.model.encode(F.pixel_shuffle(F.pixel_unshuffle(image, f), f))


class Decode(nn.Module):
    """`Autoencoder.decode` as a loop in the graph.

    Unrolled, the quick start's four steps took 7.7 MB and 10 s to load, instead of 3.2 MB and
    2.5 s, and the export of each further step took seconds.
    """

    table: Tensor
    scale: Tensor

    def __init__(self, model: Autoencoder, flow: FlowConfig):
        super().__init__()
        self.model = model
        grid = time_grid(flow.default_steps, power=flow.sampler_power, shift=flow.sampler_shift)
        evaluations = list_evaluations([float(t) for t in grid], flow.sampler)
        low, high = flow.guidance_interval
        scale = [flow.guidance_scale if low < e.t <= high else 1.0 for e in evaluations]
        self.count, self.guided = len(evaluations), any(s != 1 for s in scale)
        self.register_buffer("table", torch.tensor(evaluations))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, latent: Tensor, noise: Tensor) -> Tensor:
        f = self.model.config.model.downsampling
        # So that the export knows one variable per axis, not two.
        for axis, pixels in ((0, 1), (2, f), (3, f)):
            cast(Any, torch)._check(noise.shape[axis] == pixels * latent.shape[axis])

        def has_next(i: Tensor, *_: Tensor) -> Tensor:
            return (i < self.count).view(())

        def evaluate(i: Tensor, x: Tensor, y: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
            t, advance, advance_slope, ahead = self.table.index_select(0, i)[0].unbind()
            t = t.expand(noise.shape[0])
            v = self.model.velocity(y, t, latent)
            if self.guided:
                base = self.model.velocity(y, t, None)
                v = base + self.scale.index_select(0, i) * (v - base)
            x = x + advance * v + advance_slope * slope
            return i + 1, x, x + ahead * v, v

        # while_loop forbids carried tensors that share memory: hence the clones.
        state = (torch.zeros(1, dtype=torch.long), noise.clone(), noise.clone(), noise * 0)
        return cast(Any, torch_control).while_loop(has_next, evaluate, state)[1]


def trace_program(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    pixels: Sequence[int],
    largest_batch: int | None = None,
) -> ExportedProgram:
    """Trace a module for any batch.

    Args:
        module: Module to export.
        inputs: Example of its inputs.
        pixels: Pixels per latent cell and side of each input, 0 if it has no sides; empty: heights
            and widths are fixed.
        largest_batch: Batch up to which the trace holds; None: any.
    """
    batch = Dim("batch", min=1, max=largest_batch)
    rows, columns = (Dim(name, min=LEAST_CELLS) for name in ("rows", "columns"))
    shapes: list[dict[int, Any]] = [{0: batch} for _ in inputs]
    for shape, side in zip(shapes, pixels, strict=False):
        if side:
            shape |= {2: side * rows, 3: side * columns}
    with torch.no_grad():  # else each operation gets a subgraph of its own to switch gradients off
        return torch.export.export(module, inputs, dynamic_shapes=tuple(shapes))


def _write_program(program: ExportedProgram, path: Path) -> None:
    graphs = (part.graph for part in program.graph_module.modules() if hasattr(part, "graph"))
    for node in itertools.chain.from_iterable(cast(Any, graph).nodes for graph in graphs):
        for key in _FOR_PEOPLE:
            node.meta.pop(key, None)
    program.example_inputs = None  # they would be pickled
    torch.export.save(program, path)


def tabulate_elements(representation: Representation) -> dict[str, Any]:
    """Tabulate how each element acts on a latent, by name.

    Cells move as pixels do: mirrored first, then by quarter turns. Channel c is then sign[c] times
    channel source[c].
    """
    source, sign = representation.tables(torch.device("cpu"))
    return {
        element.name: {
            "quarter_turns": element.quarter_turns,
            "mirrored": element.mirrored,
            "source": source[i].tolist(),
            "sign": sign[i].long().tolist(),
        }
        for i, element in enumerate(representation.group)
    }
