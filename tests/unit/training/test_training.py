"""The loop on real shards in one process: determinism, resume, precision, refusals."""

import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.ports import pick_free
from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from efae.checkpoints.checkpoint import read_checkpoint
from efae.config import Config, OptimizerConfig
from efae.config.forms import with_overrides
from efae.evaluation.measures import psnr, to_float
from efae.model.closed_form import Moments, fit_linear_map
from efae.tracking.runs import Run
from efae.tracking.sender import Tracker
from efae.tracking.server import Server
from efae.training.checkpoint_writer import CheckpointWriter
from efae.training.divergence import DivergenceGuard, TrainingDiverged
from efae.training.loop import Start, seed_of, train
from efae.training.monitoring import meter
from efae.training.observer import Observer, Progress, RunObserver
from efae.training.optimizer import build_optimizer, set_learning_rate
from efae.training.process import Process
from efae.training.starts import linear
from efae.training.starts.linear import measure_moments, start_linear
from efae.training.state import TrainState

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
ALONE = Process(CPU)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    output = tmp_path_factory.mktemp("shards") / "set"
    build_shards(f"folder:{folder}", str(output), samples_per_shard=6)
    return str(output)


class Keeper(Observer):
    """Keeps the curve of the loss, and checkpoints where it has a folder."""

    def __init__(self, config, folder=None):
        self.writer = CheckpointWriter(str(folder), config) if folder else None
        self.losses = []

    def log(self, step, metrics):
        self.losses.append(metrics["loss"])

    def save(self, state, metadata):
        if self.writer:
            self.writer.save(state, metadata)

    def wait(self):
        if self.writer:
            self.writer.wait()


def run(shards, folder=None, checkpoint=None, rate_factor=1.0, losses=None, **overrides):
    config = with_overrides(Config(), TINY | {"data.uri": shards} | overrides)
    keeper = Keeper(config, folder)
    state = train(config, ShardDataset.open(shards), ALONE, Start(checkpoint, rate_factor), keeper)
    if losses is not None:
        losses += keeper.losses
    return state


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
def test_resumed_equals_uninterrupted_bit_for_bit(shards, tmp_path, precision, level):
    overrides = {"training.precision": precision, "model.level": level}
    whole = run(shards, tmp_path, **overrides)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000008"]
    halfway = read_checkpoint(tmp_path / "step-00000004")
    assert_same_state(run(shards, checkpoint=halfway, **overrides), whole)
    other = run(shards, **overrides, **{"training.seed": 1})
    assert not torch.equal(next(other.model.parameters()), next(whole.model.parameters()))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.level": "objective", "representation.group": "flips"},
        {"loss.scaling_probability": 0.5, "training.micro_batch_size": 3},
        {
            "model.kind": "unet",
            "model.start": "closed_form",
            "model.bottleneck": "running",
            "model.fine_hidden_size": 8,
        },
    ],
    ids=["exact", "objective", "parts of scaled batches", "unet"],
)
def test_batches_of_several_shapes_train_and_resume_bit_for_bit(tmp_path, overrides):
    (tmp_path / "images").mkdir()
    for number in range(40):
        shape = ((16, 16), (16, 32), (40, 20))[number % 3]
        pixels = np.random.default_rng(number).integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02d}.png")
    uri, folder = f"{tmp_path}/set", tmp_path / "run"
    build_shards(f"folder:{tmp_path}/images", uri, samples_per_shard=6)
    overrides |= {"data.buckets": ((16, 16), (16, 32), (32, 16))}
    whole = run(uri, folder, **overrides)
    halfway = read_checkpoint(folder / "step-00000004")
    position = halfway.metadata["position"]
    assert (position["epoch"], position["consumed"]) == (1, 8)  # an epoch has three full batches
    assert_same_state(run(uri, checkpoint=halfway, **overrides), whole)
    with pytest.raises(ValueError, match="the saved position has buckets="):
        run(uri, checkpoint=halfway, **overrides | {"data.buckets": ()})


def test_the_linear_start_is_the_same_bits_at_every_world_size(shards, monkeypatch):
    """Each rank sums the moments of its part; their sum is that of one rank, in any order."""
    config, dataset = with_overrides(Config(), TINY), ShardDataset.open(shards)
    alone = measure_moments(config, dataset, ALONE)
    assert alone.count == 24 * 4  # three batches, of four cells each: an epoch of 20 images
    for world_size in (2, 3):
        hosts = ("localhost",) * world_size
        ranks = [
            measure_moments(config, dataset, Process(CPU, rank, hosts))
            for rank in range(world_size)
        ]
        total = sum(ranks[1:], start=ranks[0])
        for name in ("count", "first", "second"):
            assert torch.equal(getattr(total, name), getattr(alone, name))
    monkeypatch.setattr(linear, "MOST_IMAGES", 9)
    assert measure_moments(config, dataset, ALONE).count == 16 * 4


def test_training_starts_at_the_linear_map(shards):
    overrides = {"model.start": "closed_form", "model.bottleneck": "running"}
    config, dataset = with_overrides(Config(), TINY | overrides), ShardDataset.open(shards)
    state = TrainState.create(config, CPU)
    start_linear(state, config, dataset, ALONE)
    images = torch.stack([dataset[i].image for i in range(len(dataset))])
    side, image = config.model.downsampling, to_float(images)
    fitted = fit_linear_map(Moments.of(images, side), state.model.representation, side)
    best = psnr(fitted.reconstruct(image, side), image).mean()
    decoded = state.model.decode(state.model.encode(image), steps=1, seed=0)
    assert psnr(decoded, image).mean() > best - 0.1  # a part of the images is counted twice
    for name, parameter in state.model.named_parameters():
        assert torch.equal(state.average.weights[name], parameter), name
    slow = state.optimizer.param_groups[2]
    assert [p.shape for p in slow["params"]] == [(12, 192), (12, 192)]
    set_learning_rate(state.optimizer, 0.5)
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.5, 0.5, 0.05]


def test_a_unet_trains_on_at_another_size(shards, tmp_path):
    """First at 8 px, then at 16, from the same weights and the same position in the data."""
    unet = {"model.kind": "unet", "model.downsampling": 4, "model.fine_hidden_size": 16}
    small = run(shards, tmp_path, **unet, **{"data.resolution": 8, "training.steps": 4})
    checkpoint = read_checkpoint(str(next(iter(sorted(tmp_path.iterdir())))))
    large = run(shards, checkpoint=checkpoint, **unet)
    assert (small.step, large.step) == (4, 8)


def test_a_run_that_was_trained_to_the_end_trains_no_more(shards, tmp_path):
    state = run(shards, tmp_path)
    again = run(shards, tmp_path, checkpoint=read_checkpoint(tmp_path / "step-00000008"))
    assert_same_state(again, state)


def test_a_notice_makes_every_log_interval_a_checkpoint(shards, tmp_path):
    config = with_overrides(
        Config(), TINY | {"data.uri": shards, "ray.checkpoints_to_keep": 9, "training.steps": 7}
    )
    asked = []
    process = Process(CPU, ends_soon=lambda: asked.append(0) or len(asked) > 2)
    train(config, ShardDataset.open(shards), process, observer=Keeper(config, tmp_path))
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [4, 6, 7]


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
def test_every_kind_of_model_trains(shards, overrides):
    state = run(shards, **{"training.steps": 3} | overrides)
    assert state.step == 3
    assert all(torch.isfinite(p).all() for p in state.model.parameters())


def test_a_checkpoint_starts_a_run_at_any_precision(shards, tmp_path):
    run(shards, tmp_path)
    checkpoint = read_checkpoint(tmp_path / "step-00000004")
    for precision in ("fp16", "bf16", "tf32"):
        state = run(shards, checkpoint=checkpoint, **{"training.precision": precision})
        assert state.step == 8


def test_points_that_are_not_finite_wait_in_a_checkpoint(shards, tmp_path):
    """An fp16 step with an infinite gradient is skipped, and logged."""
    config = with_overrides(Config(), TINY | {"data.uri": shards})
    nobody = Run(Server(f"http://localhost:{pick_free(1)[0]}"), "0" * 32)

    def make(name):
        writer = CheckpointWriter(str(tmp_path), config)
        tracker = Tracker(nobody, tmp_path / name)
        return RunObserver(config, ALONE, writer, tracker, None, print), tracker

    (first, _), (second, tracker) = make("one"), make("two")
    totals = {"totals": {"images_per_second": 1.0}, "scores": {}}
    first.log(1, {"loss": 0.5, "gradient_norm": math.inf, "images_per_second": 1.0})
    first.save(TrainState.create(config, CPU), totals)
    first.wait()
    second.resume(read_checkpoint(tmp_path / "step-00000000").metadata)
    found = {point.name: point.value for point in tracker.unsent()}
    assert found["gradient_norm"] == math.inf
    assert found["loss"] == 0.5


def test_global_random_state_changes_nothing(shards):
    torch.manual_seed(1)
    first = run(shards)
    torch.manual_seed(2)
    torch.rand(5)
    assert_same_state(first, run(shards))


def test_training_lowers_the_loss(shards):
    losses, untrained = [], []
    intervals = {"training.log_interval": 10, "training.checkpoint_interval": 50}
    run(shards, losses=losses, **{"training.steps": 150} | intervals)
    assert len(losses) == 15
    run(shards, losses=untrained, **{"training.steps": 10} | intervals)
    assert losses[-1] < 0.8 * untrained[-1]


def test_golden_loss_curve(shards):
    """A change of these numbers is a change of what training does: say so in the CHANGELOG."""
    losses = []
    intervals = {"training.log_interval": 20, "training.checkpoint_interval": 20}
    run(shards, losses=losses, **{"training.steps": 20} | intervals)
    assert losses == pytest.approx([0.9561], rel=0.005)


def test_pauses_for_validation_and_checkpoints_slow_no_curve(shards, monkeypatch):
    now, speeds = [0.0], []

    class Slow(Observer):
        def end_step(self):
            now[0] += 1

        def log(self, step, metrics):
            speeds.append(metrics["images_per_second"])

        def validate(self, state):
            now[0] += 100
            return {}

        def save(self, state, metadata):
            now[0] += 100
            speeds.append(metadata["totals"]["images_per_second"])

    monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    config = with_overrides(
        Config(), TINY | {"data.uri": shards, "training.evaluation_interval": 2}
    )
    train(config, ShardDataset.open(shards), ALONE, observer=Slow())
    assert speeds == pytest.approx([8.0] * 6)  # four curves and two checkpoints


def test_progress_says_how_far_the_run_is_and_how_long_it_takes():
    lines = []
    progress = Progress(100, lines.append)
    progress.start_from(50)
    metrics = {"loss": 0.25, "images_per_second": 10.0, "data_wait_fraction": 0.01}
    progress.tick(75, metrics)  # a few seconds have not passed
    progress.tick(100, metrics)
    assert lines == [
        "[####################] step 100/100  loss 0.2500  10 images/s  data wait 1.0%  0:00 left"
    ]


def poison(prediction, image):
    """A loss term that is not a number for the image that is all white."""
    return torch.where((image > 0.999).all((1, 2, 3)), torch.nan, 0.0)


@pytest.fixture(scope="module")
def poisoned_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    pixels[7] = 255
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    output = tmp_path_factory.mktemp("shards") / "set"
    build_shards(f"folder:{folder}", str(output))
    return str(output)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_names_step_and_sample(poisoned_shards, tmp_path, precision):
    log = tmp_path / "log"
    with pytest.raises(TrainingDiverged) as caught:
        run(
            poisoned_shards,
            tmp_path / "run",
            **{
                "loss.perceptual": "tests.unit.training.test_training:poison",
                "training.precision": precision,
                "training.steps": 20,
                "training.log_interval": 10,
                "tracking.sample_log": str(log),
            },
        )
    lines = [json.loads(line) for line in next(log.iterdir()).read_text().splitlines()]
    guilty = next(step for _, step, _, keys in lines if "07" in keys)
    assert (caught.value.step, caught.value.samples) == (guilty, ["07"])
    # No checkpoint holds a step from there on, although the host looked later.
    saved = [int(path.name[5:]) for path in (tmp_path / "run").glob("step-*")]
    assert all(step <= guilty for step in saved)
    assert len(lines) > guilty + 1 or guilty % 10 in (3, 9)


def test_the_update_of_a_gradient_that_is_not_finite_is_left_out():
    """And so are those after it, until the host looks."""
    layer = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(layer, OptimizerConfig())
    guard = DivergenceGuard(optimizer, torch.amp.GradScaler("cpu", enabled=False))
    weights = []
    for step, norm in enumerate([1.0, 1.0, float("inf"), 1.0]):
        layer(torch.ones(2, 4)).square().mean().backward()
        guard.watch(step, ["a", "b"], torch.tensor([1.0, 2.0]), torch.tensor(norm))
        optimizer.step()
        optimizer.zero_grad()
        weights.append(layer.weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[1], weights[3])
    with pytest.raises(TrainingDiverged, match=r"step 2 is not finite.*'a', 'b'"):
        guard.check(1.0)


def test_watching_changes_no_update():
    def train_twice(watch):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        optimizer = build_optimizer(layer, OptimizerConfig(weight_decay=0.1))
        guard = DivergenceGuard(optimizer, torch.amp.GradScaler("cpu", enabled=False))
        for step in range(3):
            layer(torch.ones(2, 4)).square().mean().backward()
            if watch:
                guard.watch(step, ["a"], torch.ones(1), torch.tensor(1.0))
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight

    assert torch.equal(train_twice(watch=True), train_twice(watch=False))


def test_divergence_says_what_to_do_also_in_another_process():
    error = pickle.loads(pickle.dumps(TrainingDiverged(7, ["a"], "s3://b/step-00000004", False)))
    assert "step 7" in str(error)
    assert "s3://b/step-00000004" in str(error)
    assert "--ray.rollbacks" in str(error)
    assert "half the rate" in str(TrainingDiverged(7, ["a"], None, True))


def test_a_rate_factor_scales_every_rate(shards):
    first = run(shards, rate_factor=0.5)
    halved = run(shards, **{"optimizer.learning_rate": Config().optimizer.learning_rate / 2})
    assert_same_state(first, halved)


def test_group_elements_differ_within_a_batch_and_repeat_by_seed():
    chosen = [
        torch.randint(8, (64,), generator=torch.Generator().manual_seed(seed_of(0, step, rank)))
        for step, rank in ((3, 1), (3, 1), (4, 1), (3, 0))
    ]
    assert len(chosen[0].unique()) == 8
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[3])
