"""On a CPU, octic layers compute what the plain path of compilers and accelerators computes."""

import copy

import pytest
import torch
from torch import nn

from efae.config import Config
from efae.model.autoencoder import Autoencoder
from efae.model.octic import layers as octic
from efae.model.octic import on_cpu
from efae.model.octic.layout import layout_of
from efae.symmetry import D4, GROUPS


def build_block(group, m, num_heads):
    torch.manual_seed(0)
    block = octic.Block(group, m, num_heads, mlp_ratio=3, conditioning=5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    layout = layout_of(group)
    x = torch.randn(layout.slots, 3, 7, layout.cosets * m, requires_grad=True)
    return block, x, torch.randn(3, 5)


def run(block, x, condition):
    y = block(x, condition)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad((y * weights).sum(), [x, *block.parameters()])


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "num_heads"), [(6, 2), (8, 2), (4, 2), (4, 4)])
def test_equal_to_the_plain_path(group, dtype, m, num_heads, monkeypatch):
    monkeypatch.setattr(on_cpu, "_PART", 800)  # several parts, the last one smaller
    block, x, condition = build_block(group, m, num_heads)
    block, condition = block.to(dtype), condition.to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    assert on_cpu.applies_to(x)
    found = run(block, x, condition)
    monkeypatch.setattr(on_cpu, "applies_to", lambda x: False)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for a, b in zip(found, run(block, x, condition), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_frozen_weights_still_pass_a_gradient():
    block, x, condition = build_block(D4, 4, 2)
    expected = run(block, x, condition)[1]
    block = copy.deepcopy(block).requires_grad_(False)
    block(x, condition).mul(torch.linspace(-1, 1, x.numel()).view(x.shape)).sum().backward()
    assert torch.equal(x.grad, expected)


def test_recomputed_activations_have_the_same_gradients():
    block, x, condition = build_block(D4, 4, 2)
    expected = run(block, x, condition)
    block.recomputes = True
    for a, b in zip(run(block, x, condition), expected, strict=True):
        assert torch.equal(a, b)


def test_a_normalized_token_of_16_bits_is_computed_in_float32():
    x = torch.full((4, 1, 1, 64), 3e-3, dtype=torch.bfloat16)
    expected = octic.normalize(x.float())
    assert (octic.normalize(x).float() - expected).abs().max() <= 0.005 * expected.abs().max()
    assert on_cpu.applies_to(x.float())
    assert not on_cpu.applies_to(x)


def test_autocast_takes_the_plain_path():
    block, x, condition = build_block(D4, 4, 2)
    expected = block(x, condition)
    with torch.autocast("cpu", torch.bfloat16):
        assert not on_cpu.applies_to(x)
        y = block(x, condition)
    assert (y - expected).norm() <= 0.03 * expected.norm()
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_a_compiler_takes_the_plain_path():
    block, x, condition = build_block(D4, 4, 2)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, x, condition), run(block, x, condition), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_sampling_expands_each_weight_once_and_hears_of_new_weights(monkeypatch):
    model = Autoencoder(Config()).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    latent, noise = torch.randn(2, 32, 4, 4), torch.randn(2, 3, 32, 32)
    expand, counts = octic._expand, []
    monkeypatch.setattr(octic, "_expand", lambda *given: counts.append(1) or expand(*given))
    decoded, calls = [], []
    for steps in (1, 4, 4):
        counts.clear()
        decoded.append(model.decode(latent, steps=steps, noise=noise))
        calls.append(len(counts))
    assert calls[0] == calls[1] == calls[2] > 0
    assert torch.equal(decoded[1], decoded[2])
    monkeypatch.setattr(octic.Expanding, "_keep", lambda self, name, expand: expand())
    assert torch.equal(model.decode(latent, steps=4, noise=noise), decoded[1])
    monkeypatch.undo()
    for parameter in model.decoder.parameters():
        parameter *= 1.1
    assert not torch.equal(model.decode(latent, steps=4, noise=noise), decoded[1])
