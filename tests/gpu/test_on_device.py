"""What must hold on a GPU; where it can, the same code also runs on the CPU, in every test run."""

import contextlib
import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.exactness import Check
from benchmarks.gpu.models import TrainingStep, wake
from data_pipelines.shards.index import load_index
from efae.checkpoints.checkpoint import Checkpoint
from efae.config import Config
from efae.config.forms import with_overrides
from efae.latents.shard_encoder import ShardEncoder, Source
from efae.model.autoencoder import Autoencoder
from efae.model.octic.layers import Block
from efae.symmetry import D4
from tests.unit.shards.test_latents import IMAGES, NAMES, make_model, write_images

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)
on_any_device = pytest.mark.parametrize("name", ["cpu", GPU])
on_gpus = pytest.mark.parametrize("name", [GPU])
SMALL = with_overrides(
    Config(),
    {
        "data.resolution": 32,
        "model.hidden_size": 64,
        "model.encoder_hidden_size": 64,
        "model.num_heads": 2,
        "model.depth": 2,
        "model.encoder_depth": 1,
        "training.global_batch_size": 8,
        "training.precision": "fp32",
        "training.compile": "none",
        "ray.num_workers": 1,
    },
)
LARGEST_ERROR = {"fp32": 2e-6, "tf32": 2e-3, "bf16": 2e-2, "fp16": 3e-3}


def make_step(name, **overrides):
    torch.manual_seed(0)  # of the images
    return TrainingStep(with_overrides(SMALL, overrides), torch.device(name))


@on_any_device
@pytest.mark.parametrize("precision", LARGEST_ERROR)
def test_every_element_commutes_to_the_precision_of_the_arithmetic(name, precision):
    errors = Check(SMALL, 2, torch.device(name)).measure(precision)
    assert errors.pop("group_law") == 0
    assert max(errors.values()) <= LARGEST_ERROR[precision]


@on_any_device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_block_is_the_one_of_the_cpu(name, precision):
    """On a GPU, the nonlinearity is another program."""
    torch.manual_seed(0)
    block = Block(D4, 16, 2, 4)
    x = torch.randn(4, 2, 9, 32)
    weight = torch.randn_like(x)
    found = {}
    for kind in ("cpu", name):
        here = block.to(kind)
        given = x.to(kind).requires_grad_()
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
            y = here(given)
        gradients = torch.autograd.grad((y * weight.to(kind)).sum(), [given, *here.parameters()])
        found[kind] = torch.cat([v.detach().float().cpu().flatten() for v in (y, *gradients)])
    error = (found[name] - found["cpu"]).norm() / found["cpu"].norm()
    assert error <= {"fp32": 1e-5, "bf16": 2e-2}[precision]


@on_gpus
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("mode", ["blocks", "step"])
@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_compiled_steps_hear_their_seeds_and_equal_the_eager_ones(name, mode, micro_batch_size):
    """With CUDA graphs, which replay what they recorded, for mode "step"."""
    losses = {}
    for kind in ("none", mode):
        step = make_step(
            name,
            **{"training.compile": kind, "training.micro_batch_size": micro_batch_size},
        )
        losses[kind] = torch.stack([step().clone() for _ in range(8)])
    assert len(losses[mode].mean(1).unique()) == 8
    torch.testing.assert_close(losses[mode], losses["none"], rtol=1e-3, atol=1e-4)


@contextlib.contextmanager
def without_waits():
    """An error wherever the host waits for the device, except for events."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpus
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("mode", ["none", "blocks", "step"])
@pytest.mark.parametrize("precision", LARGEST_ERROR)
def test_no_step_waits_for_the_device(name, mode, precision):
    step = make_step(name, **{"training.compile": mode, "training.precision": precision})
    for _ in range(4):  # compile, then record CUDA graphs
        step()
    torch.cuda.synchronize()
    with without_waits():
        step()
        step()


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # backward passes of the others add in any order
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@on_any_device
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(name, precision):
    with deterministic():
        whole, first, second = (
            make_step(name, **{"training.precision": precision}) for _ in range(3)
        )
        for _ in range(4):
            whole()
        for _ in range(2):
            first()
        tensors, metadata = first.state.snapshot()
        second.state.restore(Checkpoint(**tensors, metadata=metadata, config=first.config))
        for _ in range(2):
            second()
    ends = [step.state.snapshot() for step in (whole, second)]
    assert ends[0][1] == ends[1][1]
    for kind, part in ends[0][0].items():
        for key, tensor in part.items():
            assert torch.equal(tensor, ends[1][0][kind][key]), (kind, key)


@on_gpus
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_inference_is_that_of_eager_blocks(name):
    torch.manual_seed(0)
    model = wake(Autoencoder(SMALL)).to(name).eval().requires_grad_(False)
    image, noise = (torch.rand(2, 3, 3, 32, 32) * 2 - 1).to(name)  # filled up to 4
    expected = model.encode(image)
    decoded = model.decode(expected, steps=2, noise=noise)
    model.compile_blocks("auto")
    assert model.compiled
    torch.testing.assert_close(model.encode(image), expected, rtol=1e-4, atol=1e-5)
    found = model.decode(expected, steps=2, noise=noise)
    torch.testing.assert_close(found, decoded, rtol=1e-4, atol=1e-5)


@on_any_device
def test_a_saved_model_decodes_as_on_the_cpu(name, tmp_path):
    torch.manual_seed(0)
    model = wake(Autoencoder(SMALL)).eval()
    model.save_pretrained(tmp_path)
    image = torch.rand(3, 3, 32, 32) * 2 - 1
    latent = model.encode(image)
    expected = model.decode(latent, steps=2, seed=4)
    loaded = Autoencoder.from_pretrained(tmp_path, device=name)
    decoded = loaded.decode(loaded.encode(image.to(name)), steps=2, seed=4)
    assert decoded.device.type == name
    torch.testing.assert_close(decoded.cpu(), expected, rtol=1e-3, atol=1e-4)
    draws = [
        loaded.decode(latent.to(name), steps=2, seed=torch.Generator(drawn_on).manual_seed(4)).cpu()
        for drawn_on in ("cpu", name, name)
    ]
    torch.testing.assert_close(draws[0], expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(draws[1], draws[2])
    assert torch.equal(draws[0], draws[1]) == (name == "cpu")


@on_any_device
def test_encoding_waits_for_copies_only(name, tmp_path):
    data = write_images(tmp_path / "images", IMAGES, NAMES)
    model = make_model()
    source = Source(
        data, load_index(data), model.state_dict(), model.config, (), 3, name, compile="none"
    )
    encoder = ShardEncoder(source)
    list(encoder._encode_ahead(0))  # the first pass allocates memory
    with contextlib.nullcontext() if name == "cpu" else without_waits():
        found = list(encoder._encode_ahead(0))
    assert [len(latent) for _, latent in found] == [3, 3, 1]
    for batch, latent in found:
        expected = model.encode(batch.image.cpu() / 127.5 - 1)
        torch.testing.assert_close(latent, expected, rtol=1e-3, atol=1e-4)
