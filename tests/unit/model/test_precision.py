"""Precision of a model's arithmetic: what it changes, and what it leaves as it was."""

import operator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import efae
from efae.evaluation.evaluate import evaluate
from efae.model.octic.layers import Linear
from efae.model.octic.layout import layout_of
from efae.model.precision import at_precision, float32_arithmetic
from efae.symmetry.any_angle import _cosine_transforms, disk_mask
from efae.symmetry.group import _find_sources_once, grid_sources

IMAGES = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("precision", "error"), [("fp32", 0), ("bf16", 3e-2), ("fp16", 4e-3)])
def test_a_loaded_model_runs_at_its_precision_and_returns_float32(precision, error):
    exact, model = (efae.load("builtin:openmoji-32", precision=p) for p in (None, precision))
    image = IMAGES / 127.5 - 1
    latent = model.encode(image)
    decoded = model.decode(latent, noise=NOISE)
    assert latent.dtype == decoded.dtype == torch.float32
    for got, expected in (
        (latent, exact.encode(image)),
        (decoded, exact.decode(latent, noise=NOISE)),
    ):
        difference = float((got - expected).square().mean().sqrt())
        assert difference <= error
        assert (difference > 0) == (error > 0)


@pytest.mark.parametrize("precision", ["bfloat16", torch.bfloat16, ""])
def test_an_unknown_precision_is_refused(precision):
    with pytest.raises(ValueError, match=r"precision=.*unknown: use fp32, tf32, bf16, fp16 or No"):
        efae.load("builtin:openmoji-32", precision=precision)


def test_an_evaluation_says_at_which_precision_the_model_ran():
    model = efae.load("builtin:openmoji-32")
    exact = evaluate(model, IMAGES.byte())
    model.precision = "bf16"
    rounded = evaluate(model, IMAGES.byte())
    assert exact.protocol["precision"] == "fp32, no TF32"
    assert rounded.protocol["precision"] == "bf16; measures in fp32"
    assert exact.worst_gap_db < 1e-4
    assert abs(rounded.psnr - exact.psnr) < 0.2
    assert rounded.psnr != exact.psnr


def test_images_latents_and_seeds_of_any_kind_are_taken():
    model = efae.load("builtin:openmoji-32")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        image = (IMAGES / 127.5 - 1).to(dtype)
        latent = model.encode(image)
        torch.testing.assert_close(latent, model.encode(image.float()))
        sample = model.decode(latent.to(dtype), seed=np.int64(3))
        assert sample.dtype == torch.float32
    assert torch.equal(sample, model.decode(latent.double(), seed=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_needs_no_autocast(dtype):
    model = efae.load("builtin:openmoji-32").to(dtype)
    image = IMAGES.to(dtype) / 127.5 - 1
    latent = model.encode(image)
    sample = model.decode(latent.to(dtype), noise=NOISE.to(dtype), steps=1)
    assert sample.dtype == dtype
    assert (sample.float() - image.float()).square().mean() < 0.5
    assert latent.dtype == torch.float32
    uncast = model.decode(model.encode(image.float()), noise=NOISE, steps=1)
    assert uncast.dtype == model.decode(latent, seed=0, steps=1).dtype == torch.float32
    torch.testing.assert_close(uncast, sample.float(), atol=0.1, rtol=0)


def test_inference_mode_leaves_later_training_alone():
    layout_of.cache_clear()
    with torch.inference_mode():
        model = efae.load("builtin:openmoji-32")
        model.act(efae.D4["rot90"], model.encode(IMAGES / 127.5 - 1))
    trained = efae.Autoencoder(model.config)
    loss, _ = efae.Objective(trained)(IMAGES / 127.5 - 1, torch.Generator().manual_seed(0))
    latent = torch.zeros(1, 32, 4, 4, requires_grad=True)
    (loss.sum() + trained.act(efae.D4["rot90"], latent).sum()).backward()


def build_what_is_cached(side):
    layout_of.cache_clear()
    cpu, rho = torch.device("cpu"), efae.Representation(efae.D4, a1=1, e=1)
    return [
        layout_of(efae.D4).fourier,
        layout_of(efae.D4).ties,
        grid_sources(efae.D4, side, side),
        disk_mask(side, side, edge=1.0),
        *_cosine_transforms(side, cpu, torch.float32),
        *rho.tables(cpu),
    ]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_defaults_of_torch_do_not_reach_what_later_models_share(default):
    for cached in (_find_sources_once, disk_mask, _cosine_transforms):
        cached.cache_clear()
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        with default if isinstance(default, torch.device) else nullcontext():
            found = build_what_is_cached(5)
            width, cosets = 4, layout_of(efae.D4).cosets
            linear = Linear(efae.D4, width, width)
            x = torch.ones(layout_of(efae.D4).slots, 1, cosets * width)
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, found, build_what_is_cached(5)))
    assert {tensor.dtype for tensor in found} == {torch.float32, torch.int64}
    if isinstance(default, torch.dtype):
        assert linear(x).dtype == default


def read_arithmetic():
    backends = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    return [part.fp32_precision for part in parts]


def check_that_settings_are_put_back(read):
    before = read()
    with at_precision("tf32", torch.device("cpu")):
        inside = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        assert (inside, read_arithmetic()) == (("high", True), ["tf32"] * 4)
        with float32_arithmetic("fp32"):
            inside = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            assert (inside, read_arithmetic()) == (("highest", False), ["ieee"] * 4)
        assert read_arithmetic() == ["tf32"] * 4
    assert read() == before


@pytest.mark.parametrize("products", ["highest", "high"])
@pytest.mark.parametrize("convolutions", [True, False])
def test_the_settings_of_the_process_are_put_back(products, convolutions):
    def read():
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            *read_arithmetic(),
        )

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
        check_that_settings_are_put_back(read)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_calls_that_overlap_in_two_threads_leave_nothing_behind():
    before = read_arithmetic()
    first, second = (float32_arithmetic(precision) for precision in ("tf32", "fp32"))
    with ThreadPoolExecutor(1) as other:
        other.submit(first.__enter__).result()
        second.__enter__()
        other.submit(first.__exit__, None, None, None).result()
        assert read_arithmetic() == ["ieee"] * 4
        second.__exit__(None, None, None)
    assert read_arithmetic() == before


@pytest.mark.parametrize("value", ["tf32", "ieee"])
@pytest.mark.parametrize("name", ["", "cudnn", "cudnn.conv", "cuda.matmul"])
def test_so_are_those_of_the_newer_api_and_what_they_inherit(name, value):
    torch.backends.cuda.matmul.fp32_precision = "none"
    part = operator.attrgetter(f"backends.{name}".rstrip("."))(torch)
    before = part.fp32_precision
    try:
        part.fp32_precision = value
        check_that_settings_are_put_back(read_arithmetic)
        part.fp32_precision = before
        torch.backends.fp32_precision = value
        assert torch.backends.cuda.matmul.fp32_precision == value
    finally:
        part.fp32_precision = before
        torch.backends.fp32_precision = "none"
