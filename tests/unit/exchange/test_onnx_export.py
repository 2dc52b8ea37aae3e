"""Tests of ONNX programs; those that export a model are in integration."""

import itertools

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

import efae
from efae.exchange.onnx_graph import make_act
from efae.symmetry import C4, D4, FLIPS, Representation
from jobs import export


@pytest.mark.parametrize("group", [D4, C4, FLIPS], ids=str)
def test_actions_are_those_of_the_representation(group):
    representation = Representation.from_split(group=group, dim=12)
    for element, (h, w) in itertools.product(group, [(1, 1), (3, 2)]):
        proto = make_act(representation, element)
        session = onnxruntime.InferenceSession(onnx_bytes(proto))
        latent = torch.randn(2, 12, h, w)
        found = session.run(None, {"latent": latent.numpy()})[0]
        np.testing.assert_array_equal(found, representation.act(element, latent))


def onnx_bytes(model) -> bytes:
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def test_the_model_folder_is_an_export_too(tmp_path):
    arguments = ["--model", "builtin:openmoji-32", "--format", "diffusers", "--output"]
    assert export.main([*arguments, str(tmp_path)]) == 0
    image = torch.rand(1, 3, 32, 32)
    expected = efae.load("builtin:openmoji-32").encode(image)
    torch.testing.assert_close(efae.load(tmp_path).encode(image), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "builtin:faces"], "no model 'builtin:faces' comes with efae"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "diffusers:nowhere"], "diffusers:nowhere: no such folder"),
        (
            ["--model", "diffusers:vae", "--format", "torch_export"],
            "diffusers:vae is a folder of diffusers; only --format onnx and page",
        ),
        (
            ["--model", "builtin:openmoji-32", "--format", "diffusers", "--precision", "fp16"],
            "--precision fp16: only --format onnx has it",
        ),
        (
            ["--model", "builtin:openmoji-32", "--hub.dry-run"],
            "--hub.*: only --format hub has them",
        ),
        (
            ["--model", "diffusers:vae", "--format", "hub"],
            "diffusers:vae is a folder of diffusers; only --format onnx and page",
        ),
    ],
)
def test_wrong_input_is_one_sentence(arguments, message, tmp_path, capsys):
    assert export.main([*arguments, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []
