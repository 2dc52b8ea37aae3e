"""Compiled inference: what is compiled, and how often. The compiler's own output is tested with
training; here its programs run as Python.
"""

import copy
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.evaluate import evaluate
from efae.generation.sampling import Guidance, sample_latents
from efae.latents.certificate import certify
from efae.model.autoencoder import Autoencoder
from tests.unit.generation.test_network import CLASSES, build
from tests.unit.training.test_micro_batches import SIZES


@pytest.fixture
def graphs(monkeypatch):
    """The number of programs since the test began."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SIZES)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.05 * torch.randn_like(weight)
    return model


def test_batches_of_every_size_share_few_programs(model, graphs):
    plain = copy.deepcopy(model)
    model.compile_blocks()
    for count in (7, 8, 5):
        image, noise = torch.rand(2, count, 3, 16, 16) * 2 - 1
        latent = model.encode(image)
        torch.testing.assert_close(latent, plain.encode(image))
        decoded = model.decode(latent, steps=2, noise=noise)
        torch.testing.assert_close(decoded, plain.decode(latent, steps=2, noise=noise))
        assert graphs() == 2  # encoder and decoder
    model.encode(image[:3])
    assert graphs() == 3
    assert not counters["graph_break"]


def test_a_time_for_all_images_is_taken_and_two_for_three_are_not(model, graphs):
    plain = copy.deepcopy(model)
    model.compile_blocks()
    image, t = torch.rand(3, 3, 16, 16), torch.tensor([0.5])
    latent = plain.encode(image)
    expected = plain.velocity(image, t, latent)
    torch.testing.assert_close(model.velocity(image, t, latent), expected)
    with pytest.raises(RuntimeError):
        model.velocity(image, t.expand(2), latent)


def test_a_copy_is_not_compiled(model, graphs):
    model.compile_blocks()
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert "compiled" not in certify(copy.deepcopy(model), [images])
    assert graphs() == 0
    assert certify(model, [images])["compiled"] is True
    assert graphs() == 1


def test_a_generator_samples_as_without_compilation(graphs):
    generator, guidance = build(), Guidance(2, scale=1.5)
    noise, label = torch.randn(3, *generator.shape).double(), torch.tensor([0, CLASSES, 1])
    expected = sample_latents(generator, noise, label, guidance)
    generator.compile_blocks()
    torch.testing.assert_close(sample_latents(generator, noise, label, guidance), expected)
    assert graphs() == 1


def test_nothing_is_compiled_where_it_is_not_chosen(model, graphs, monkeypatch):
    for when in ("none", "auto"):
        model.compile_blocks(when)
        assert not model.compiled
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ValueError, match=r"compiled blocks need a compiler \(/no/such.*install"):
        model.compile_blocks()


@pytest.mark.slow
def test_an_evaluation_says_that_it_was_compiled_and_compiles_each_shape_once(model, graphs):
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    expected = evaluate(model, images, batch_size=8)
    model.compile_blocks()
    found = evaluate(model, images, batch_size=8)
    # The encoder: batches of 8 and 4. The decoder: these, at full and half scale.
    assert graphs() == 6
    assert found.protocol["precision"] == "fp32, no TF32; compiled"
    assert found.psnr == pytest.approx(expected.psnr, abs=1e-5)
