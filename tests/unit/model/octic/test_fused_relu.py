"""The Triton kernels against the plain nonlinearity; without a GPU, in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from efae.model.octic.layers import Mlp, Nonlinearity
from efae.model.octic.layout import layout_of
from efae.symmetry import GROUPS

pytest.importorskip("triton", reason="needs Triton, which has wheels for Linux only")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined
from efae.model.octic.fused_relu import activate  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)
pytestmark = [pytest.mark.gpu] if GPU else []

every_group = pytest.mark.parametrize("group", [g for g in GROUPS.values() if len(g) > 1], ids=str)
every_kind = pytest.mark.parametrize(
    ("slots", "cosets", "split"), [(4, 1, 0), (4, 2, 2), (4, 2, 0), (2, 1, 0), (2, 2, 1)]
)
CHARACTERS = [[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]


def draw(*axes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(axes, generator=generator).to(DEVICE, dtype).requires_grad_()


def apply(function, x):
    """The result, and the gradient of a weighted sum of it."""
    y = function(x)
    weight = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    return y.detach(), gradient


def plain(slots, cosets, split):
    """The same by matrix products, in float64."""
    characters = CHARACTERS if slots == 4 else [[1, 1], [1, -1]]
    hadamard = torch.tensor(characters, dtype=torch.float64, device=DEVICE) / slots**0.5

    def turn(x):
        u, v = x[:split].chunk(2, -1)
        return torch.cat([torch.cat([u + v, u - v], -1) / 2**0.5, x[split:]])

    def run(x):
        x = turn(x.double()) if split else x.double()
        y = torch.tensordot(hadamard, torch.tensordot(hadamard, x, 1).relu(), 1)
        return turn(y) if split else y

    return run


@every_kind
@pytest.mark.parametrize("axes", [(1, 1), (3, 7), (1, 1023), (2, 5, 96), (1, 1025), (2, 3, 512)])
def test_result_and_gradient_are_those_of_matrix_products(slots, cosets, split, axes):
    """Also where the features do not fill the last tile."""
    x = draw(slots, *axes[:-1], axes[-1] * cosets)
    expected = apply(plain(slots, cosets, split), x)
    for got, wanted in zip(apply(lambda x: activate(x, cosets, split), x), expected, strict=True):
        assert (got - wanted).abs().max() <= 1e-6


@every_kind
@pytest.mark.parametrize("axes", [(3, 7), (1, 1025), (2, 3, 512)])
def test_a_bias_is_added_first_and_has_its_gradient(slots, cosets, split, axes):
    x = draw(slots, *axes[:-1], axes[-1] * cosets)
    bias = draw(axes[-1])

    def shift(x):
        padding = (0, (cosets - 1) * len(bias), *(0, 0) * (x.ndim - 2), 0, slots - 1)
        token = bias.double().view(1, *[1] * (x.ndim - 2), -1) * cosets**0.5
        return x.double() + nn.functional.pad(token, padding)

    results = []
    for function in (
        lambda: activate(x, cosets, split, bias),
        lambda: plain(slots, cosets, split)(shift(x)),
    ):
        y = function()
        weight = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y)
        results.append((y.detach(), *torch.autograd.grad((y * weight).sum(), [x, bias])))
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 1e-6 * max(1, wanted.abs().max())


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(slots, cosets, split, dtype):
    x = draw(slots, 3, 412, dtype=dtype)
    y = activate(x, cosets, split)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    # The interpreter truncates to bfloat16, which costs up to twice as much as rounding.
    unit = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 and not GPU else 0.5)
    z = plain(slots, cosets, split)(x)
    (expected,) = torch.autograd.grad(z, x, torch.ones_like(z))
    for got, wanted in ((y, z), (gradient, expected.double())):
        assert got.dtype == dtype
        error = (got.double() - wanted).abs()
        assert (error <= 1.001 * unit * wanted.abs() + 1e-6).all()


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, wherever it is."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def layer(group, monkeypatch):
    """The layer of a group as it is on a GPU."""
    monkeypatch.setattr("efae.model.octic.on_gpu.activate", activate)
    plain = Nonlinearity(group).to(DEVICE)
    return lambda x: plain(x.as_subclass(OnGpu)).as_subclass(torch.Tensor)


@every_group
def test_the_layer_on_a_gpu_is_the_layer_on_a_cpu(group, layer):
    layout = layout_of(group)
    x = draw(layout.slots, 2, 5, layout.cosets * 12)
    on_cpu = Nonlinearity(group).double()
    expected = apply(lambda x: on_cpu(x.cpu().double()), x)
    for got, wanted in zip(apply(layer, x), expected, strict=True):
        assert (got.cpu() - wanted.cpu()).abs().max() <= 1e-6


@every_group
def test_an_mlp_on_a_gpu_is_that_of_a_cpu(group, monkeypatch):
    """There the kernel adds the bias of its first map."""
    monkeypatch.setattr("efae.model.octic.on_gpu.activate", activate)
    layout, mlp = layout_of(group), Mlp(group, 6, 10)
    nn.init.normal_(mlp[0].bias)
    x = draw(layout.slots, 2, 5, layout.cosets * 6)
    weight = torch.linspace(-1, 2, x.numel()).view(x.shape)
    results = []
    for device, kind in ((DEVICE, OnGpu), ("cpu", torch.Tensor)):
        mlp, given = mlp.to(device), x.to(device).as_subclass(kind)
        y = mlp(given).as_subclass(torch.Tensor)
        gradients = torch.autograd.grad((y * weight.to(device)).sum(), [x, *mlp.parameters()])
        results.append([y.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 2e-6 * max(1, wanted.abs().max())


def test_a_gpu_without_a_c_compiler_takes_the_plain_path_and_warns_once(monkeypatch):
    monkeypatch.setattr("efae.model.octic.on_gpu.activate", None)
    monkeypatch.setattr("efae.model.octic.on_gpu._missing", "a compiler (gcc or clang)")
    plain, x = Nonlinearity(GROUPS["D4"]).to(DEVICE), draw(4, 5, 24).detach()
    with pytest.warns(UserWarning, match=r"a compiler \(gcc or clang\): install it") as warned:
        found = [plain(x.as_subclass(OnGpu)).as_subclass(torch.Tensor) for _ in range(2)]
    assert len(warned) == 1
    torch.testing.assert_close(found[1], activate(x, plain.layout.cosets, plain.layout.split))


@every_group
def test_the_layer_commutes_with_every_element(group, layer):
    layout = layout_of(group)
    fourier = layout.fourier / layout.fourier.norm(dim=1, keepdim=True)
    x = draw(layout.slots, 5, 37 * layout.cosets).detach()
    for g in group:
        shift = torch.zeros(len(group), len(group))
        for i, u in enumerate(group):
            shift[group.index(g @ u), i] = 1
        signed = (fourier @ shift @ fourier.T).round().to(DEVICE)

        def act(x, signed=signed):
            split = x.unflatten(-1, (layout.cosets, -1)).movedim(-2, 1).flatten(0, 1)
            moved = torch.einsum("ij,j...->i...", signed, split)
            return moved.unflatten(0, (layout.slots, -1)).movedim(1, -2).flatten(-2)

        difference = layer(act(x)) - act(layer(x))
        assert difference.abs().max() <= (1e-6 if GPU else 0)  # a GPU fuses products and sums


@every_kind
def test_zeros_stay_zeros(slots, cosets, split):
    x = torch.zeros(slots, 3, 50, device=DEVICE, requires_grad=True)
    for tensor in apply(lambda x: activate(x, cosets, split), x):
        assert torch.equal(tensor, torch.zeros_like(x))


def test_tokens_need_not_be_contiguous():
    x = draw(4, 6, 40)
    one = apply(lambda x: activate(x.mT, 1, 0), x)
    other = apply(lambda x: activate(x.mT.contiguous(), 1, 0), x)
    for got, wanted in zip(one, other, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_gpu_of_their_tokens():
    x = draw(4, 6, 40)
    other = x.detach().to("cuda:1").requires_grad_()
    for got, wanted in zip(
        *(apply(lambda x: activate(x, 2, 2), y) for y in (other, x)), strict=True
    ):
        assert got.device == other.device
        assert torch.equal(got.cpu(), wanted.cpu())


def test_nothing_but_a_gpu_dispatches_to_the_kernels(monkeypatch):
    monkeypatch.setattr("efae.model.octic.on_gpu.activate", lambda *_, **__: pytest.fail("called"))
    x = draw(4, 3, 40).detach()
    Nonlinearity(GROUPS["D4"])(x.cpu())
    Nonlinearity(GROUPS["D4"]).to(DEVICE).double()(x.double())


COMPILE = """
import json, torch, triton
from torch._dynamo.backends.common import aot_autograd
from functorch.compile import make_boxed_func
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from efae.model.octic import fused_relu

HOPPER = GPUTarget("cuda", 90, 32)

class Driver:  # a GPU to compile for; nothing runs
    def get_current_target(self):
        return HOPPER

    def get_current_device(self):
        return 0

written = []

def read_graph(module, _):
    for node in module.graph.nodes:
        if "triton_kernel" in str(node.target):
            written.append(list(node.kwargs["tensors_to_clone"]))
    values = [node.meta["val"] for node in module.graph.output_node().args[0]]
    return make_boxed_func(lambda *_: [torch.zeros(v.shape, dtype=v.dtype) for v in values])

triton.runtime.driver.set_active(Driver())
backend = aot_autograd(fw_compiler=read_graph, bw_compiler=read_graph)
function = torch.compile(
    lambda x, b: (fused_relu.activate(x * 2, 2, 2, b) + 1).relu(), fullgraph=True, backend=backend
)
given = (torch.randn(size, requires_grad=True) for size in ((4, 3, 96), 48))
function(*given).sum().backward()

wide = {}
constants = {"TOKENS": 2, "CHANNELS": 512}
for slots, cosets, split, biased in ((4, 1, 0, 0), (4, 2, 2, 1), (2, 2, 1, 1)):
    for kernel in (fused_relu._run_forward, fused_relu._run_backward):
        fixed = constants | {"SLOTS": slots, "COSETS": cosets, "SPLIT": split, "BIASED": biased}
        integers = ("size", "tokens", "m")
        pointers = [name for name in kernel.arg_names if name not in (*integers, *fixed)]
        signature = {name: "*bf16" for name in pointers} | dict.fromkeys(integers, "i32")
        signature["bias"] = "*fp32"  # one word of four numbers
        signature |= dict.fromkeys(fixed, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers) + len(integers))}
        source = ASTSource(kernel, signature, fixed, aligned)
        assembly = triton.compile(source, target=HOPPER).asm["ptx"]
        lines = [x for x in assembly.splitlines() if "ld.global" in x or "st.global" in x]
        words = (len(pointers) - 1) * slots * cosets + biased
        wide[f"{kernel.__name__}, {fixed}"] = words, sum("v4.b32" in x for x in lines), len(lines)
print(json.dumps([written, wide]))
"""


@pytest.mark.timeout(120)
def test_the_compilers_see_one_graph_that_writes_only_its_results_in_16_byte_words(tmp_path):
    """What torch.compile traces, and what Triton compiles for an H100, without a GPU."""
    output = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert output.returncode == 0, output.stderr[-3000:]
    written, wide = json.loads(output.stdout.splitlines()[-1])
    assert written == [["y"], ["out"]]
    assert len(wide) == 6
    for kernel, (words, in_16_bytes, instructions) in wide.items():
        assert words == in_16_bytes == instructions, kernel
