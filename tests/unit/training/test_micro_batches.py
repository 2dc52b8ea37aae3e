"""Gradient accumulation, recomputation and compilation: the same step in other ways."""

import copy

import pytest
import torch
import torch._dynamo as dynamo
from torch import nn
from torch._dynamo.utils import counters

from efae.config import Config
from efae.config_forms import with_overrides
from efae.model.objective import Objective, draw
from efae.model.octic import Block
from efae.training.compilation import prepare
from efae.training.micro_batches import Accumulation, OutOfMemory
from efae.training.state import TrainState

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
]


def take_steps(overrides, micro_batch_size=0, steps=1, update=False, perceptual=None):
    """Losses, gradients of the last step and the running power, from fixed weights and draws."""
    config = with_overrides(Config(), SIZES | overrides)
    state = TrainState.create(config, CPU)
    state.model.train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in state.model.named_parameters():
        if not parameter.any() and name != "bottleneck.power":
            nn.init.normal_(parameter, std=0.1, generator=generator)
    objective = Objective(state.model, perceptual)
    prepare(objective, config, CPU, one_pass=micro_batch_size == 0)
    accumulate = Accumulation(objective, state, config, micro_batch_size)
    for step in range(steps):
        state.optimizer.zero_grad(set_to_none=True)
        generator.manual_seed(step)
        image = torch.randint(0, 256, (COUNT, 3, 16, 16), dtype=torch.uint8, generator=generator)
        loss, _ = accumulate(image, draw(config, tuple(image.shape), generator))
        if update:
            state.optimizer.step()
    with torch.no_grad():  # a validation: a copy in eval mode
        copied = copy.deepcopy(state.model).eval()
        copied.decode(copied.encode(torch.zeros(3, 3, 16, 16)), steps=1, seed=0)
    gradients = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
    return loss, torch.cat(gradients), state.model.bottleneck.power.detach()


def assert_same(result, expected, tolerance=1e-6):
    for got, wanted in zip(result, expected, strict=True):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("overrides", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 9])
def test_the_size_of_the_parts_changes_rounding_only(overrides, size):
    assert_same(take_steps(overrides, size), take_steps(overrides))


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


def test_a_pass_that_does_not_fit_into_memory_says_how_many_images_were_too_many():
    def hungry(predicted, image):
        if len(image) > 5:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return torch.zeros(len(image))

    with pytest.raises(
        OutOfMemory, match=r"8 images per forward pass.*restarting with 4"
    ) as caught:
        take_steps({}, perceptual=hungry)
    assert caught.value.micro_batch_size == COUNT
    take_steps({}, micro_batch_size=4, perceptual=hungry)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("overrides", OPTIONS, ids=str)
@pytest.mark.parametrize(("mode", "graphs"), [("blocks", 2), ("step", 1)])
def test_a_compiled_step_equals_the_eager_one_without_break_or_recompilation(
    overrides, mode, graphs
):
    """Two kinds of blocks, those of the encoder and those of the decoder, or one whole step."""
    dynamo.reset()
    counters.clear()
    compiled = take_steps(overrides | {"training.compile": mode}, steps=200)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert_same(compiled, take_steps(overrides, steps=200), tolerance=2e-6)
