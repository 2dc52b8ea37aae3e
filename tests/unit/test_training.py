"""The loop on real shards in one process: determinism, resume, precision, refusals."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from efae.artifacts.checkpoint import read_checkpoint
from efae.config import Config, OptimizerConfig, with_overrides
from efae.training.ema import MovingAverage
from efae.training.loop import TrainingDiverged, seed_of, train
from efae.training.optimizer import build_optimizer, learning_rate_at

TINY = {
    "data.resolution": 16,
    "data.decode_threads": 1,
    "representation.dim": 12,
    "representation.rotation_dims": 4,
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.patch_size": 4,
    "training.steps": 8,
    "training.global_batch_size": 8,
    "training.precision": "fp32",
    "training.log_interval": 2,
    "training.checkpoint_interval": 4,
    "optimizer.warmup_steps": 2,
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    output = tmp_path_factory.mktemp("shards") / "set"
    build_shards(f"folder:{folder}", str(output), samples_per_shard=6)
    return str(output)


class Reports(list):
    """Collects what the loop reports; the folders go when the test ends."""

    def __call__(self, metrics, folder):
        self.append((metrics, folder))


@pytest.fixture
def reports():
    reports = Reports()
    yield reports
    for _, folder in reports:
        if folder:
            shutil.rmtree(folder)


def run(shards, reports, checkpoint=None, say=lambda line: None, **overrides):
    config = with_overrides(Config(), TINY | {"data.uri": shards} | overrides)
    return train(
        config,
        ShardDataset.open(shards),
        device=CPU,
        report=reports,
        checkpoint=checkpoint,
        say=say,
    )


def assert_same_state(a, b):
    assert a.step == b.step
    first, second = a.snapshot(), b.snapshot()
    assert first[1] == second[1]
    for kind, tensors in first[0].items():
        assert tensors.keys() == second[0][kind].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second[0][kind][name]), (kind, name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("level", ["exact", "objective"])
def test_resumed_equals_uninterrupted_bit_for_bit(shards, reports, precision, level):
    overrides = {"training.precision": precision, "model.level": level}
    whole = run(shards, reports, **overrides)
    steps = [metrics["step"] for metrics, _ in reports]
    assert steps == [4, 8]
    halfway = read_checkpoint(reports[0][1])
    assert_same_state(run(shards, reports, checkpoint=halfway, **overrides), whole)
    other = run(shards, reports, **overrides, **{"training.seed": 1})
    assert not torch.equal(next(other.model.parameters()), next(whole.model.parameters()))


def test_a_run_that_was_trained_to_the_end_reports_its_totals_again(shards, reports):
    run(shards, reports)
    again = Reports()
    state = run(shards, again, checkpoint=read_checkpoint(reports[-1][1]))
    assert state.step == 8
    assert again == [(reports[-1][0], None)]


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.downsampling": 16},
        {"flow.prediction": "velocity", "flow.time_law": "uniform"},
        {
            "model.level": "none",
            "data.channels": 1,
            "representation.multiplicities": (1, 0, 0, 0, 0),
        }
        | {"representation.dim": 1},
        {"representation.group": "C4"},
    ],
    ids=["vector latent", "velocity", "grey", "turns only"],
)
def test_every_kind_of_model_trains(shards, reports, overrides):
    state = run(shards, reports, **{"training.steps": 3} | overrides)
    assert state.step == 3
    assert all(torch.isfinite(p).all() for p in state.model.parameters())


def test_global_random_state_changes_nothing(shards, reports):
    torch.manual_seed(1)
    first = run(shards, reports)
    torch.manual_seed(2)
    torch.rand(5)
    assert_same_state(first, run(shards, reports))


def test_training_lowers_the_loss(shards, reports):
    lines = []
    run(shards, reports, say=lines.append, **{"training.steps": 150, "training.log_interval": 10})
    assert "step 150/150" in lines[-1]
    untrained = []
    steps = {"training.steps": 10, "training.log_interval": 10}
    run(shards, reports, say=untrained.append, **steps)

    def read_loss(line):
        return float(line.split("loss ")[1].split()[0])

    assert read_loss(lines[-1]) < 0.8 * read_loss(untrained[-1])


def test_golden_loss_curve(shards, reports):
    """A change of these numbers is a change of what training does: say so in the CHANGELOG."""
    losses = []
    run(
        shards,
        reports,
        say=lambda line: losses.append(float(line.split("loss ")[1].split()[0])),
        **{"training.steps": 20, "training.log_interval": 20},
    )
    assert losses == pytest.approx([0.9561], rel=0.005)


def test_gradient_that_is_not_finite_stops_before_the_update(shards, reports):
    with pytest.raises(TrainingDiverged, match=r"step \d+ is not finite.*learning_rate"):
        run(shards, reports, **{"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0})


def test_group_elements_differ_within_a_batch_and_repeat_by_seed():
    chosen = [
        torch.randint(8, (64,), generator=torch.Generator().manual_seed(seed_of(0, step, rank)))
        for step, rank in ((3, 1), (3, 1), (4, 1), (3, 0))
    ]
    assert len(chosen[0].unique()) == 8
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[3])


def test_seeds_do_not_collide():
    seeds = {seed_of(s, step, rank) for s in range(3) for step in range(200) for rank in range(8)}
    assert len(seeds) == 3 * 200 * 8


def test_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_learning_rate_fraction=0.1)
    rates = [learning_rate_at(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.001)


def test_weight_decay_spares_vectors():
    model = torch.nn.Linear(3, 2)
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(model, OptimizerConfig(weight_decay=0.5)).param_groups
        for p in group["params"]
    }
    assert decay == {id(model.weight): 0.5, id(model.bias): 0.0}


def test_moving_average_follows_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, decay=0.6)
    expected = float(model.weight.detach())
    for step in range(20):
        with torch.no_grad():
            model.weight.fill_(step)
        average.update(model, step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(average.weights["weight"]) == pytest.approx(expected, rel=1e-5)
