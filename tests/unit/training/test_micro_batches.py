"""Gradient accumulation, recomputation and compilation: the same step in other ways."""

import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from cluster.ports import pick_free
from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.objective import Objective, draw
from efae.model.octic.layers import Block
from efae.training.compilation import compiler_options, prepare
from efae.training.micro_batches import Accumulation, OutOfMemory
from efae.training.process import Process
from efae.training.starts.distillation import make_sampler
from efae.training.state import TrainState
from efae.training.validation import Validation

CPU = torch.device("cpu")
COUNT = 8
SIZES = {
    "data.resolution": 16,
    "representation.multiplicities": (4, 1, 1, 1, 2),
    "representation.dim": 11,
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.patch_size": 4,
    "model.downsampling": 4,
    "training.precision": "fp32",
    "training.global_batch_size": COUNT,
    "ray.num_workers": 1,
}
OPTIONS = [
    {},
    {"model.level": "objective"},
    {"model.level": "regularized", "model.bottleneck": "kl", "flow.condition_drop": 0.3},
    {
        "model.kind": "unet",
        "model.start": "closed_form",
        "model.bottleneck": "running",
        "model.patch_size": 2,
        "model.fine_hidden_size": 16,
        "model.attention_depth": 1,
        "flow.condition_drop": 0.3,
    },
]
DISTILLED = {"flow.distill_from": "a teacher", "flow.distill_steps": 2}


def take_steps(
    overrides, micro_batch_size=0, steps=1, update=False, perceptual=None, validations=0
):
    """Losses, gradients of the last step and the running power, from fixed weights and draws."""
    config = with_overrides(Config(), SIZES | overrides)
    state = TrainState.create(config, CPU)
    state.model.train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in state.model.named_parameters():
        if not parameter.any() and name != "bottleneck.power":
            nn.init.normal_(parameter, std=0.1, generator=generator)
    teacher = None
    if config.flow.distill_from:
        source = Autoencoder(config).eval().requires_grad_(False)
        source.load_state_dict(state.model.state_dict())
        teacher = make_sampler(source, config, Process(CPU))
    objective = Objective(state.model, perceptual, teacher)
    prepare(objective, config, CPU, one_pass=micro_batch_size == 0)
    rank, world_size = 0, 1
    shapes = config.data.buckets or [(16, 16)]
    wrapped: nn.Module = objective
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
        wrapped = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    accumulate = Accumulation(wrapped, state, config, micro_batch_size)
    for step in range(steps):
        state.optimizer.zero_grad(set_to_none=True)
        generator.manual_seed(step)
        shape = (COUNT, 3, *shapes[step % len(shapes)])
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        draws = draw(config, tuple(image.shape), generator)
        size = COUNT // world_size
        with compiler_options(config):
            loss, _ = accumulate(image.split(size)[rank], draws.split(size)[rank])
        if update:
            state.optimizer.step()
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    for _ in range(validations):
        Validation(images, CPU).measure(state)
    gradients = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
    return loss, torch.cat(gradients), state.model.bottleneck.power.detach()


def assert_same(result, expected, tolerance=1e-6):
    for got, wanted in zip(result, expected, strict=True):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("overrides", [*OPTIONS, DISTILLED], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 9])
def test_the_size_of_the_parts_changes_rounding_only(overrides, size):
    assert_same(take_steps(overrides, size), take_steps(overrides))


RANK = """
import sys
import torch, torch.distributed as dist
from tests.unit.training.test_micro_batches import CASES, take_steps
torch.set_num_threads(1)
rank, port, case, output = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
found = []
for overrides, mode, size in CASES[case]:
    found.append(take_steps(overrides | {"training.compile": mode}, size, steps=2))
torch.save(found, f"{output}/{rank}.pt")
dist.destroy_process_group()
"""
CASES = {
    "eager": [(o, "none", size) for o in (*OPTIONS, DISTILLED) for size in (0, 3)],
    "exact, blocks": [(OPTIONS[0], "blocks", 3)],
    "objective, step": [(OPTIONS[1], "step", 0)],
    "regularized, step": [(OPTIONS[2], "step", 0)],
    "unet, blocks": [(OPTIONS[3], "blocks", 3)],
    "distilled, blocks": [(DISTILLED, "blocks", 3)],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [name if name == "eager" else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_two_ranks_take_the_step_of_one(case, tmp_path):
    """Loss, gradients and running power, with and without parts, of which a rank has two."""
    (port,) = pick_free(1)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(port), case, str(tmp_path)],
            cwd=Path(__file__).parents[3],
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(590) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    expected = [take_steps(overrides, steps=2) for overrides, *_ in CASES[case]]
    for one, other, (loss, gradients, power) in zip(first, second, expected, strict=True):
        assert_same([torch.cat([one[0], other[0]])], [loss], 2e-6)
        for rank in (one, other):
            assert_same(rank[1:], [gradients, power], 2e-6)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_recomputed_activations_give_the_same_bits(share):
    kept = take_steps({}, steps=2, update=True)
    recomputed = take_steps({"training.activation_memory": share}, steps=2, update=True)
    for got, wanted in zip(recomputed, kept, strict=True):
        assert torch.equal(got, wanted)


def test_the_share_of_activations_decides_how_many_blocks_recompute():
    counts = {}
    for share in (0.0, 0.5, 1.0):
        config = with_overrides(Config(), SIZES | {"training.activation_memory": share})
        objective = Objective(TrainState.create(config, CPU).model)
        prepare(objective, config, CPU, one_pass=True)
        blocks = [module for module in objective.modules() if isinstance(module, Block)]
        counts[share] = sum(block.recomputes for block in blocks), len(blocks)
    assert counts == {0.0: (3, 3), 0.5: (2, 3), 1.0: (0, 3)}


def test_compilation_is_chosen_by_device():
    def chosen(device, **overrides):
        return with_overrides(Config(), overrides).choose_compilation(device)

    assert chosen("cpu") == "none"
    assert chosen("cuda") == "blocks"
    assert chosen("cuda", **{"loss.scaling_probability": 0.5}) == "none"
    assert chosen("cpu", **{"training.compile": "step"}) == "step"
    with pytest.raises(ValueError, match=r"training\.compile=blocks: every size"):
        chosen("cuda", **{"loss.scaling_probability": 0.5, "training.compile": "blocks"})


def test_only_steps_of_one_pass_replay_cuda_graphs(monkeypatch):
    """A replay overwrites the gradients of the pass before."""
    modes = []
    monkeypatch.setattr(Objective, "compile", lambda _, **options: modes.append(options["mode"]))
    config = with_overrides(Config(), SIZES | {"training.compile": "step"})
    objective = Objective(TrainState.create(config, CPU).model)
    for device in ("cuda", "cpu"):
        for one_pass in (True, False):
            prepare(objective, config, torch.device(device), one_pass)
    assert modes == ["reduce-overhead", None, None, None]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=str,
)
def test_a_pass_that_does_not_fit_into_memory_says_how_many_images_were_too_many(error):
    def hungry(predicted, image):
        if len(image) > 5:
            raise error
        return torch.zeros(len(image))

    with pytest.raises(
        OutOfMemory, match=r"8 images per forward pass.*restarting with 4"
    ) as caught:
        take_steps({}, perceptual=hungry)
    assert caught.value.micro_batch_size == COUNT
    take_steps({}, micro_batch_size=4, perceptual=hungry)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_model_commutes_with_the_group():
    model = Autoencoder(with_overrides(Config(), SIZES)).eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.05 * torch.randn_like(weight)
    image, noise = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    expected = model.encode(image)
    turned = model.decode(expected, noise=noise)
    model.compile_blocks()
    latent = model.encode(image)
    decoded = model.decode(latent, noise=noise)
    assert_same([latent, decoded], [expected, turned])
    for g in model.group:
        assert_same([model.encode(g.act_on_image(image))], [model.act(g, latent)], 2e-6)
        acted = model.decode(model.act(g, latent), noise=g.act_on_image(noise))
        assert_same([acted], [g.act_on_image(decoded)], 4e-6)


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_after_a_resume_neither_steps_nor_validations_compile_again(monkeypatch):
    """Every shape is compiled once; nor do later validations, each of another copy of the model."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    dynamo.reset()
    counters.clear()
    found = []
    overrides = {"training.compile": "blocks", "data.buckets": ((16, 16), (16, 24))}
    for validations in (2, 1):
        take_steps(overrides, steps=4, validations=validations)
        found.append(counters["stats"]["unique_graphs"])
    # Encoder and decoder, each with gradients, for two shapes, and without.
    assert found == [6, 6]
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("overrides", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["blocks", "step"])
def test_a_compiled_step_equals_the_eager_one_without_break_or_recompilation(overrides, mode):
    """A graph for each kind of block, or one for both passes.

    A transformer's encoder and decoder have a kind each; a unet's each one per grid, and its
    attention is another.
    """
    graphs = 1
    if mode == "blocks":
        graphs = 5 if overrides.get("model.kind") == "unet" else 2
    dynamo.reset()
    counters.clear()
    compiled = take_steps(overrides | {"training.compile": mode}, steps=200)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert_same(compiled, take_steps(overrides, steps=200), tolerance=2e-6)
