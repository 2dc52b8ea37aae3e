"""Conversion of modules, and of the group's action, to ONNX graphs.

torch's own optimisation would fold constants, and so expand octic weights to plain ones: the
quick start's decoder took 17.6 MB and 130 s with it. Here graphs keep their weights.
"""

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from efae.exchange.torch_export import tabulate_elements, trace_program
from efae.symmetry import Element, Representation

Precision = Literal["fp32", "fp16"]
OPSET = 20
_ENDS = ("patches", "latent", "output", "linear_path")
"""Modules between pixels, latents and tokens."""


def convert_to_onnx(
    module: nn.Module, inputs: Mapping[str, Tensor], pixels: Sequence[int], precision: Precision
) -> Any:
    """Return a module as an ONNX model of onnx_ir.

    Args:
        module: Module to convert.
        inputs: Example of its inputs, by name.
        pixels: Pixels per cell of each input, as for `trace_program`.
        precision: Precision of the stored matrices.
    """
    # diffusers lays out memory anew from a batch of 64 on: a branch that ONNX has no use for.
    program = trace_program(module, tuple(inputs.values()), pixels, largest_batch=63)
    log = logging.getLogger("torch.onnx")  # warns that torchvision is missing
    level, log.level = log.level, logging.ERROR
    try:
        with warnings.catch_warnings():
            # torch copies the program with a class of its own that it deprecates.
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            exported = cast(Any, torch.onnx).export(
                program,
                dynamo=True,
                optimize=False,  # it would fold, and so expand, the octic weights
                verbose=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=["output"],
            )
    finally:
        log.level = level
    return _simplify(exported.model, precision)


def _simplify(model: Any, precision: Precision) -> Any:
    """Return the model with its types inferred, without CastLike, duplicates and metadata."""
    import onnx
    import onnx_ir as ir
    import onnx_ir.passes.common as passes
    from onnx_ir.passes import Sequential

    # onnx_ir's own pass takes a sequence of tensors for a tensor.
    infer_shapes = cast(Any, onnx.shape_inference).infer_shapes
    model = cast(Any, ir).from_proto(infer_shapes(ir.to_proto(model)))
    _name_axes(model)
    _name_casts(model)
    Sequential(
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),  # holds paths of this host
    )(model)
    if precision == "fp16":
        _halve(model)
    return model


def _name_axes(model: Any) -> None:
    """Give the symbols of torch.export the names of their axes: batch, rows, columns."""
    import onnx_ir as ir

    axes: dict[str, str] = {}
    for value in model.graph.inputs:
        for size, axis in zip(value.shape, ("batch", "", "rows", "columns"), strict=False):
            axes |= {symbol: axis for symbol in re.findall(r"\bs\d+\b", str(size))}

    def rename(size: Any) -> Any:
        if isinstance(size, int):
            return size
        return re.sub(r"\bs\d+\b", lambda found: axes.get(found[0], found[0]), str(size))

    values = [*model.graph.inputs]
    values += [output for node in model.graph.all_nodes() for output in node.outputs]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([rename(size) for size in value.shape])


def _name_casts(model: Any) -> None:
    """Replace CastLike, which ONNX Runtime cannot fold, by Cast."""
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        if node.op_type != "CastLike" or node.inputs[1].dtype is None:
            continue
        like = node.inputs[1].dtype
        made = ir.node("Cast", [node.inputs[0]], {"to": like})
        was, now = node.outputs[0], made.outputs[0]
        now.name, now.dtype, now.shape = was.name, like, was.shape
        ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], [made], node.outputs, made.outputs
        )


def _halve(model: Any) -> None:
    """Store matrices as float16, each with a node that widens it to float32."""
    import onnx_ir as ir

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        array = value.const_value.numpy()
        ends = any(end in name.split(".") for end in _ENDS)
        if array.dtype != np.float32 or array.ndim < 2 or ends:
            continue
        half = ir.Value(name=f"{name}.half", const_value=ir.tensor(array.astype(np.float16)))
        half.dtype, half.shape = ir.DataType.FLOAT16, value.shape
        widen = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
        ir.convenience.replace_all_uses_with(value, widen.outputs[0])
        del graph.initializers[name]
        graph.initializers[half.name] = half
        widen.outputs[0].name = name
        widen.outputs[0].dtype, widen.outputs[0].shape = ir.DataType.FLOAT, value.shape
        graph.insert_before(graph[0], widen)


def make_act(representation: Representation, element: Element) -> Any:
    """Return the action of an element as an ONNX model: turn the grid, permute and sign channels.

    Counter-clockwise, one turn is a transposition and a flip of the rows, three are one and a flip
    of the columns.
    """
    import onnx_ir as ir

    table = tabulate_elements(representation)[element.name]
    turns, is_odd = element.quarter_turns, element.quarter_turns % 2
    flips_rows = (turns == 2) != bool(is_odd and element.mirrored)
    flips_columns = (turns == 2) != bool(not is_odd and element.mirrored)
    if is_odd:
        flips_rows, flips_columns = flips_rows != (turns == 1), flips_columns != (turns == 3)
    axes = [axis for axis, flips in ((2, flips_rows), (3, flips_columns)) if flips]
    shape = ("batch", representation.dim, "rows", "columns")
    latent = ir.Value(name="latent", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    constants: list[Any] = []

    def constant(name: str, array: np.ndarray) -> Any:
        tensor = ir.tensor(array, name=name)
        constants.append(
            ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        )
        return constants[-1]

    nodes: list[Any] = []
    now = latent
    if is_odd:
        nodes.append(ir.node("Transpose", [now], {"perm": [0, 1, 3, 2]}))
        now = nodes[-1].outputs[0]
    if axes:
        ends = {"starts": -1, "ends": np.iinfo(np.int64).min, "axes": axes, "steps": -1}
        slices = [
            constant(name, np.broadcast_to(np.array(value, np.int64), len(axes)).copy())
            for name, value in ends.items()
        ]
        nodes.append(ir.node("Slice", [now, *slices]))
        now = nodes[-1].outputs[0]
    source = constant("source", np.array(table["source"], np.int64))
    nodes.append(ir.node("Gather", [now, source], {"axis": 1}))
    sign = constant("sign", np.array(table["sign"], np.float32)[:, None, None])
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], sign]))
    output = nodes[-1].outputs[0]
    output.name, output.type = "output", latent.type
    sides = ("columns", "rows") if is_odd else ("rows", "columns")
    output.shape = ir.Shape(("batch", representation.dim, *sides))
    graph = ir.Graph(
        [latent],
        [output],
        nodes=nodes,
        initializers=constants,
        opset_imports={"": OPSET},
        name=f"act-{element}",
    )
    return ir.Model(graph, ir_version=10)
