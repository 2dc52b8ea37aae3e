"""Training of a generator in one process: resume, statistics, validation, samples, refusals."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipelines import ShardDataset
from data_pipelines.shards.index import load_index, write_index
from efae.checkpoints.checkpoint import read_checkpoint
from efae.config import Config, GeneratorConfig
from efae.config.forms import digest, with_overrides
from efae.evaluation.measures import to_uint8
from efae.evaluation.samples import ImageSampler
from efae.experiment.resumption import find_start
from efae.generation.network import Generator
from efae.generation.sampling import Guidance
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import pack_generator, read_folder
from efae.model.stored_files import CheckpointError
from efae.preflight.driver_checks import check_tokenizer
from efae.tracking.server import Server
from efae.training.loop import Start, train
from efae.training.monitoring.flops import count_flops
from efae.training.process import Process
from efae.training.starts.source import locate_copy
from efae.training.state import TrainState
from efae.training.tasks import choose_task
from efae.training.tasks.generator import adopt_latents
from tests.unit.shards.test_latents import encode_shards, make_form, make_model, write_images
from tests.unit.training.test_training import Keeper, assert_same_state

CPU = torch.device("cpu")
ALONE = Process(CPU)
CLASSES = 20
TINY = {
    "generator.hidden_size": 32,
    "generator.depth": 2,
    "generator.num_heads": 2,
    "flow.sampler_steps": 2,
    "training.steps": 6,
    "training.global_batch_size": 8,
    "training.precision": "fp32",
    "training.log_interval": 1,
    "training.checkpoint_interval": 3,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 2,
}
KINDS = {
    "dense": {"data.views": 0.5, "data.classes": CLASSES},
    "equivariant": {"generator.equivariant": True, "data.classes": CLASSES},
    "last block dense, without labels": {
        "generator.equivariant": True,
        "generator.dense_blocks": 1,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = make_model()
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    return tokenizer, folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory, model) -> str:
    folder = tmp_path_factory.mktemp("generator")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    images = write_images(folder / "images", pixels, [f"n{number}" for number in range(20)])
    tokenizer, stored = model
    digest = read_folder(stored).digest
    form = make_form(tokenizer, "float32").model_copy(
        update={"model_digest": digest, "model_uri": str(stored)}
    )
    return encode_shards(images, str(folder / "latents"), tokenizer, form).uri


def configure(latents: str, **overrides) -> GeneratorConfig:
    return adopt_latents(
        with_overrides(GeneratorConfig(), TINY | {"data.uri": latents} | overrides)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted_bit_for_bit(latents, tmp_path, kind, precision):
    config = configure(latents, **KINDS[kind], **{"training.precision": precision})
    dataset, keeper = ShardDataset.open(latents), Keeper(config, tmp_path)
    whole = train(config, dataset, ALONE, None, keeper)
    halfway = read_checkpoint(tmp_path / "step-00000003")
    assert halfway.config == config
    assert_same_state(train(config, dataset, ALONE, Start(halfway)), whole)
    assert len(keeper.losses) == 6
    assert whole.model.outward.coefficient.abs().max() > 0  # it starts at 0


def test_another_run_starts_from_a_checkpoint_that_fits(latents, tmp_path):
    config = configure(latents, **KINDS["dense"], **{"ray.storage_uri": str(tmp_path)})
    config = with_overrides(config, {"tracking.run_name": "first"})
    train(config, ShardDataset.open(latents), ALONE, None, Keeper(config, tmp_path / "first"))
    checkpoint = tmp_path / "first" / "step-00000003"
    onward = with_overrides(config, {"tracking.run_name": "next", "resume": str(checkpoint)})
    assert find_start(with_overrides(onward, {"data.views": 0.3})) == 3
    for changes in ({"data.views": 0.0}, {"data.classes": 21}, {"generator.depth": 3}):
        (name,) = changes
        with pytest.raises(ValueError, match=f"{name}: .* -> .*would be meaningless"):
            find_start(with_overrides(onward, changes))
    tokenizer = with_overrides(Config(), {"resume": str(checkpoint)})
    tokenizer = with_overrides(tokenizer, {"ray.storage_uri": str(tmp_path)})
    for run_name, what in (("next", "of another kind of model"), ("first", "trains another kind")):
        with pytest.raises(ValueError, match=what):
            find_start(with_overrides(tokenizer, {"tracking.run_name": run_name}))


def test_training_lowers_the_loss_and_the_statistics_are_those_of_the_latents(latents):
    overrides = {"training.steps": 120, "training.log_interval": 20, "data.views": 0.1}
    config = configure(latents, **overrides, **{"optimizer.learning_rate": 1e-2})
    keeper = Keeper(config)
    state = train(config, ShardDataset.open(latents), ALONE, None, keeper)
    assert keeper.losses[-1] < 0.9 * keeper.losses[0]
    loader = ShardDataset.open(latents).loader(20, shuffle=False)
    latent = torch.cat([batch.latent for batch in loader])
    normal = state.model.normalization.normalize(latent)
    assert normal[:, :4].mean((0, 2, 3)).abs().max() < 1e-5
    assert normal[:, :4].square().mean() == pytest.approx(1, abs=1e-4)
    for name, weight in state.model.normalization.named_parameters():
        assert torch.equal(state.average.weights[f"normalization.{name}"], weight)


def test_parts_of_a_batch_have_the_gradients_of_the_whole(latents):
    config = configure(latents, **{"data.classes": CLASSES, "training.steps": 2})
    dataset = ShardDataset.open(latents)
    whole = train(config, dataset, ALONE)
    parts = train(with_overrides(config, {"training.micro_batch_size": 3}), dataset, ALONE)
    for name, weight in whole.model.named_parameters():
        # AdamW divides by the gradient's size: where it is near zero, rounding shows.
        assert torch.allclose(weight, parts.model.get_parameter(name), atol=3e-4), name


def test_validation_measures_held_out_latents_and_shows_samples(latents, tmp_path):
    runs = {"ray.storage_uri": str(tmp_path), "tracking.run_name": "run"}
    config = configure(latents, **{"data.held_out_uri": latents, "data.classes": CLASSES, **runs})
    task, state = choose_task(config), TrainState.create(config, CPU)
    task.begin(state, ShardDataset.open(latents), ALONE, None)
    # At first the prediction is 0, the velocity noise - latent: both have unit power.
    measured = task.make_validation(ALONE, None).measure(state)
    assert measured == {"held_out_loss": pytest.approx(2, abs=0.1)}
    thirds = [
        task.make_validation(Process(CPU, rank, ["a", "b", "c"]), None).measure(state)
        for rank in range(3)
    ]
    counts = torch.tensor([6.0, 7.0, 7.0])  # of 20 latents
    losses = torch.tensor([share["held_out_loss"] for share in thirds])
    assert float((losses * counts).sum() / 20) == pytest.approx(measured["held_out_loss"], abs=1e-5)

    shown: list[str] = []
    task.copy_source(Server("http://localhost:1"))
    task.make_validation(ALONE, lambda path, name: shown.append(name)).measure(state)
    assert shown == ["samples/step-00000000.png"]
    assert choose_task(configure(latents, **runs)).make_validation(ALONE, None).measure(state) == {}


def test_a_stored_generator_samples_the_same_images_in_any_batches(latents, model, tmp_path):
    config = configure(latents, **{"data.classes": CLASSES})
    state = train(config, ShardDataset.open(latents), ALONE)
    pack_generator(state.average.weights, config).write(tmp_path)
    generator = Generator.restore(read_folder(tmp_path))
    sampler = ImageSampler(generator, model[0], seed=3)
    labels, guidance = [1, 2, 3, 1], Guidance(2, 1.5)
    images = to_uint8(sampler.draw(range(4), labels, guidance))
    assert images.shape == (4, 3, 16, 16)
    assert images.float().std() > 1
    apart = to_uint8(torch.cat([sampler.draw([i], [labels[i]], guidance) for i in range(4)]))
    assert (images.int() - apart.int()).abs().max() <= 1  # rounding of another batch size
    assert torch.equal(images, to_uint8(sampler.draw(range(4), labels, guidance)))
    other = to_uint8(replace(sampler, seed=4).draw(range(4), labels, guidance))
    assert (images != other).float().mean() > 0.5
    with pytest.raises(CheckpointError, match="holds a generator of latents, not an autoencoder"):
        Autoencoder.restore(read_folder(tmp_path))
    with pytest.raises(CheckpointError, match="holds an autoencoder, not a generator"):
        Generator.restore(read_folder(model[1]))


def test_an_equivariant_step_takes_fewer_operations_than_the_dense_one_of_its_sizes(latents):
    flops = count_flops(configure(latents, **KINDS["equivariant"]))
    assert flops.own < 0.7 * flops.as_dense
    between = count_flops(configure(latents, **KINDS["last block dense, without labels"]))
    assert flops.own < between.own < between.as_dense == flops.as_dense
    dense = count_flops(configure(latents, **KINDS["dense"]))
    assert dense.own == dense.as_dense == pytest.approx(flops.as_dense, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"flow.distill_from": "x", "flow.condition_drop": 0.0}, "generators are not distilled"),
        ({"data.views": 0.5, "generator.equivariant": True}, "have the same loss already"),
        ({"flow.guidance_scale": 2.0}, "no condition to guide by"),
        ({"generator.hidden_size": 40, "generator.equivariant": True}, "multiple of 32"),
        ({"data.views": 1.5}, "must be in"),
        ({"generator.dense_blocks": 1}, "0 unless generator.equivariant"),
        ({"generator.dense_blocks": 7, "generator.equivariant": True}, "from 0 to generator.depth"),
        ({"ray.best_checkpoint_by": "psnr"}, "reconstructs nothing"),
        ({"data.cache_bytes": 0}, "data.cache_bytes=0: must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, what):
    with pytest.raises(ValueError, match=what):
        with_overrides(GeneratorConfig(), overrides)


def test_a_tokenizer_that_has_moved_is_found_by_its_digest(latents, model, tmp_path):
    shutil.copytree(model[1], tmp_path / "moved")
    form = ShardDataset.open(latents).format.model_copy(update={"model_uri": "/nowhere"})
    runs = {"ray.storage_uri": str(tmp_path), "tracking.run_name": "run"}
    config, server = configure(latents, **runs), Server("http://localhost:1")
    for moved, says in (("", "/nowhere"), ("builtin:openmoji-32", "made by a model of digest")):
        data = replace(config.data, format=form.model_dump_json(), tokenizer=moved)
        with pytest.raises((ValueError, CheckpointError), match=says):
            check_tokenizer(replace(config, data=data), server)
    data = replace(data, tokenizer=str(tmp_path / "moved"))
    assert check_tokenizer(replace(config, data=data), server) == str(tmp_path / "moved")
    choose_task(replace(config, data=data)).copy_source(server)
    assert read_folder(locate_copy(config).path).digest == form.model_digest
    assert digest(config) == digest(replace(config, data=replace(config.data, tokenizer="there")))


def test_sets_that_cannot_work_are_refused(latents, tmp_path):
    with pytest.raises(ValueError, match="holds images: encode them first"):
        configure(latents.removesuffix("latents") + "images")
    config = configure(latents, **{"data.classes": 3})
    with pytest.raises(ValueError, match=r"has the label '\d+'; labels are numbers from 0 to 2"):
        train(config, ShardDataset.open(latents), ALONE)
    named = load_index(latents)
    provenance = {**named.provenance, "classes": ["cat", "dog"]}
    write_index(tmp_path, replace(named, provenance=provenance, base=latents))
    assert configure(str(tmp_path), **{"data.classes": 2}).data.classes == 2
    with pytest.raises(ValueError, match="has 2 classes, of which 'dog' is the last: set it to 2"):
        configure(str(tmp_path), **{"data.classes": 1})
    other = tmp_path / "other"
    shutil.copytree(tmp_path, other)
    write_index(other, replace(named, provenance={**named.provenance, "classes": ["cat", "owl"]}))
    with pytest.raises(ValueError, match="its classes are not those of"):
        configure(str(tmp_path), **{"data.classes": 2, "data.held_out_uri": str(other)})
    form = ShardDataset.open(latents).format
    other = form.model_copy(update={"model_uri": "builtin:openmoji-32"})
    config = configure(latents, **{"ray.storage_uri": str(tmp_path), "tracking.run_name": "run"})
    data = replace(config.data, format=other.model_dump_json())
    with pytest.raises(ValueError, match=f"made by a model of digest {form.model_digest}"):
        choose_task(replace(config, data=data)).copy_source(Server("http://localhost:1"))
