"""jobs/generate.py sample in this process: what it writes, resume, refusals."""

import io
import json
import math
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines import ShardDataset, storage
from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import make_index
from data_pipelines.shards.index import SHEET_NAME, load_index, write_index
from data_pipelines.shards.latent_format import LatentFormat
from data_pipelines.storage import Location
from data_pipelines.verify_shards import find_faults
from efae.config.forms import with_overrides
from efae.exchange.diffusers_tokenizer import load_diffusers
from efae.generation.network import Generator
from efae.generation.sampling import Guidance
from efae.latents import encode, sample
from efae.latents.certificate import certify
from efae.latents.compare import FILE
from efae.latents.encode import encode_sets
from efae.latents.request import Request
from efae.latents.sample import sample_set
from efae.latents.sample_request import SampleRequest
from efae.model.autoencoder import Autoencoder
from efae.model.pretrained import pack_generator, read_folder
from efae.registry import pull
from efae.training.loop import train
from jobs.generate import main
from tests.unit.shards.test_latents import encode_shards
from tests.unit.training.test_fine_tuning import build
from tests.unit.training.test_generator import ALONE, CLASSES, configure, latents, model

__all__ = ["latents", "model"]


@pytest.fixture(scope="module")
def generator(latents, tmp_path_factory) -> Path:
    config = configure(latents, **{"data.classes": CLASSES, "training.steps": 2})
    state = train(config, ShardDataset.open(latents), ALONE)
    folder = tmp_path_factory.mktemp("generator")
    pack_generator(state.average.weights, config).write(folder)
    return folder


def ask(generator: Path, output: Path, **changes) -> SampleRequest:
    values = {"count": 7, "samples_per_shard": 3, "batch_size": 2, "on": "here", **changes}
    return SampleRequest(model=str(generator), output=str(output), **values)


def be_quiet(line: str) -> None:
    pass


def read_bytes(folder: Path, names: str = "*.tar") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(names))}


def test_a_set_has_images_labels_and_its_origin(generator, model, tmp_path, capsys):
    options = [f"--model={generator}", f"--output={tmp_path / 'set'}", "--count=7", "--on=here"]
    options += ["--samples-per-shard=3", "--labels", "3", "1", "--seed=5", "--guidance=1.5"]
    assert main(["sample", *options]) == 0
    assert f"{tmp_path / 'set'}: 7 images, 7 of them drawn now" in capsys.readouterr().out
    images = ShardDataset.open(tmp_path / "set")
    assert images.keys == [f"{i:08d}" for i in range(7)]
    assert images.image_shape == (3, 16, 16)
    assert list(find_faults(str(tmp_path / "set"))) == []
    batch = next(iter(images.loader(7, shuffle=False, members=("cls",))))
    assert [int(label) for label in batch.members["cls"]] == [3, 1, 3, 1, 3, 1, 3]
    fingerprint = images.index.provenance["fingerprint"]
    assert fingerprint["generator"] == read_folder(generator).digest
    assert fingerprint["tokenizer"] == read_folder(model[1]).digest
    assert (fingerprint["seed"], fingerprint["guidance"]) == (5, 1.5)
    assert (tmp_path / "set" / SHEET_NAME).exists()
    sets = (f"--samples={tmp_path / 'set'}", f"--reference={tmp_path / 'set'}")
    assert main(["compare", *sets, f"--output={tmp_path / 'report'}"]) == 0
    assert json.loads((tmp_path / "report" / FILE).read_text())["generator"] == {
        "model": str(generator),
        "digest": fingerprint["generator"],
        "samples": "7 of 3 x 16 x 16, 2 steps, guidance 1.5 in 0-1, classes [3, 1]",
    }
    assert "recorded" not in "".join(capsys.readouterr())  # it is no registered version
    assert main(["sample", *options]) == 0
    assert "7 images, 0 of them drawn now" in capsys.readouterr().out
    same = Generator.restore(read_folder(generator))
    euler = with_overrides(same.config, {"flow.sampler": "euler"})
    pack_generator(same.state_dict(), euler).write(tmp_path / "euler")
    for change, what in (
        ("--seed=6", "seed 5 instead of 6"),
        ("--count=6", "count 7 instead of 6"),
        (f"--model={tmp_path / 'euler'}", "with generator_settings"),  # weights are the same
    ):
        assert main(["sample", *options, change]) == 1
        assert what in capsys.readouterr().err


def test_images_depend_on_seed_and_number_and_unfinished_sets_are_completed(generator, tmp_path):
    whole, drawn = sample_set(ask(generator, tmp_path / "whole"), be_quiet)
    assert drawn == 7
    source, fingerprint = sample._prepare(
        request := ask(generator, tmp_path / "part"), Location.parse(tmp_path / "part")
    )
    sample.unfinished.claim(source.output, {}, fingerprint)
    # What tasks left before their job was stopped, and a tar of another node's disk.
    records = {f"shard-00000{n}.tar": sample._write_shard(source, n) for n in (1, 2)}
    sample.unfinished.require_shards(source.output, records)
    (tmp_path / "part" / "shard-000002.tar").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"shard-000002\.tar was written by another node"):
        sample.unfinished.require_shards(source.output, records)
    _, drawn = sample_set(request, be_quiet)
    assert drawn == 4
    assert read_bytes(tmp_path / "part") == read_bytes(tmp_path / "whole")
    assert not storage.exists(tmp_path / "part" / sample.unfinished.FOLDER)
    sample.unfinished.claim(source.output, {}, fingerprint)  # killed once the index was written
    assert sample_set(request, be_quiet)[1] == 0
    assert not (tmp_path / "part" / sample.unfinished.FOLDER / "build.json").exists()
    fewer, _ = sample_set(ask(generator, tmp_path / "fewer", count=3), be_quiet)
    assert torch.equal(fewer[2].image, whole[2].image)
    other, _ = sample_set(ask(generator, tmp_path / "other", count=3, seed=1), be_quiet)
    assert not torch.equal(other[2].image, whole[2].image)


def test_a_finished_set_grows_as_if_it_had_been_drawn_so(generator, tmp_path):
    for name, count in (("grown", 7), ("killed", 7), ("whole", 10)):
        sample_set(ask(generator, tmp_path / name, count=count), be_quiet)
    killed, index = Location.parse(tmp_path / "killed"), load_index(tmp_path / "killed")
    sample._reopen(killed, index, index.provenance["fingerprint"] | {"count": 10})
    for name in ("grown", "killed"):
        request = ask(generator, tmp_path / name, count=10, samples_per_shard=0)
        assert sample_set(request, be_quiet)[1] == 4  # the third shard was not full
        for kind in ("*.tar", "*.json"):
            assert read_bytes(tmp_path / name, kind) == read_bytes(tmp_path / "whole", kind)
        assert not storage.exists(tmp_path / name / sample.unfinished.FOLDER)


def test_an_autoencoder_of_diffusers_decodes_its_own_latents(latents, tmp_path):
    network = build("AutoencoderKL")
    network.register_to_config(shift_factor=0.3)
    network.save_pretrained(tmp_path / "vae")
    uri = f"diffusers:{tmp_path / 'vae'}"
    stored, theirs = pull.read(uri), load_diffusers(str(tmp_path / "vae"))
    model = Autoencoder.restore(stored)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    latent = theirs.encode(image)
    assert torch.allclose(model.encode(image), latent, atol=1e-5)
    assert torch.allclose(model.decode(latent, seed=0), theirs.decode(latent), atol=1e-5)
    form = LatentFormat(
        shape=[4, 4, 4],
        dtype="float32",
        group=model.group.name,
        multiplicities=model.representation.multiplicities,
        model_digest=stored.digest,
        model_uri=uri,
        certificate=certify(model, []),
    )
    images = latents.removesuffix("latents") + "images"
    request = Request(uri, images, str(tmp_path / "none"), resolution=16, symmetrize=True)
    with pytest.raises(ValueError, match="has the trivial group, over which an average changes"):
        list(encode_sets(request, be_quiet))
    folder = str(tmp_path / "latents")
    encoded = encode_shards(images, folder, model, form, image_size=(16, 16))
    with pytest.raises(ValueError, match="has the trivial group"):
        train(configure(encoded.uri, **{"data.views": 0.5}), encoded, ALONE)
    config = configure(encoded.uri, **{"training.steps": 1})
    state = train(config, encoded, ALONE)
    pack_generator(state.average.weights, config).write(tmp_path / "generator")
    (tmp_path / "vae").rename(tmp_path / "moved")
    moved = pull.read(f"diffusers:{tmp_path / 'moved'}")
    assert (moved.digest, moved.config) == (stored.digest, stored.config)
    moved = {"count": 3, "tokenizer": f"diffusers:{tmp_path / 'moved'}"}
    assert sample_set(ask(tmp_path / "generator", tmp_path / "set", **moved), be_quiet)[1] == 3
    network.register_to_config(shift_factor=0.2)  # the same weights
    network.save_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"made by a model of digest {stored.digest}"):
        sample_set(ask(tmp_path / "generator", tmp_path / "other", **moved), be_quiet)


def write_tar(folder: Path, *members: str, without: str = "") -> str:
    """A set of samples that have these members beside their image, a png, but for `without`."""
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in [f"{key}.{member}" for key in "ab" for member in ("png", *members)]:
            # The images differ in size: a is high, b is wide.
            image = encode_png(np.zeros((32, 16, 3) if name[0] == "a" else (16, 32, 3), np.uint8))
            data = image if name.endswith("png") else b"0"
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if name != without:
                tar.addfile(member, io.BytesIO(data))
    write_index(str(folder), make_index(str(folder)))
    return str(folder)


def plan(model, images: str, output: Path, **changes) -> tuple[list[encode._Planned], list[str]]:
    """The latent sets that jobs/encode.py would write, and what it says about them."""
    request, said = Request(str(model[1]), images, str(output), **changes), []
    return encode._plan_sets(request, Location(images), Location(images), said.append), said


def test_latents_keep_every_member_but_the_image(model, tmp_path):
    images = write_tar(tmp_path / "images", "cls", "json", "npy", "seg.png")
    (planned,), _ = plan(model, images, tmp_path / "latents")
    assert planned.source.members == ("cls", "json", "npy", "seg.png")


@pytest.mark.parametrize("sizes", [{}, {"buckets": ((16, 8), (8, 16))}])
def test_members_that_some_samples_lack_are_left_out_of_every_set(model, tmp_path, sizes):
    images = write_tar(tmp_path / "images", "cls", "txt", without="b.cls")
    planned, said = plan(model, images, tmp_path / "latents", **sizes)
    assert {each.source.members for each in planned} == {("txt",)}
    assert "members .cls are left out: 1 of 2 samples, such as 'b', have none" in said


@pytest.mark.parametrize(
    ("sides", "expected"),
    [((16, 16), []), ((24, 16), ["1 of 2 images are smaller than 24 x 16 and will be enlarged"])],
)
def test_images_of_a_mixed_set_that_will_be_enlarged_are_counted(model, tmp_path, sides, expected):
    images = write_tar(tmp_path / "images")
    assert plan(model, images, tmp_path / "latents", resolution=sides)[1] == expected


@pytest.mark.parametrize("option", ["data", "certificate_data"])
@pytest.mark.parametrize("sizes", [{}, {"buckets": ((16, 16),)}])
def test_latents_instead_of_images_are_refused(model, latents, tmp_path, option, sizes):
    given = {"data": latents.removesuffix("latents") + "images", option: latents}
    request = Request(str(model[1]), output=str(tmp_path / "again"), **given, **sizes)
    message = f"--{option.replace('_', '-')} {latents}: holds latents, not images"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        list(encode_sets(request, be_quiet))


@pytest.mark.parametrize("name", ["latent.npy", "_score"])
def test_a_member_that_latents_cannot_keep_is_refused(model, tmp_path, name):
    images = write_tar(tmp_path / "images", "cls", name)
    output = tmp_path / "latents"
    with pytest.raises(ValueError, match=rf"images: the member \.{name} of its samples cannot"):
        list(encode_sets(Request(str(model[1]), images, str(output)), be_quiet))
    assert not list(output.iterdir())


def test_a_generator_that_has_diverged_draws_nothing(generator, tmp_path):
    found = Generator.restore(read_folder(generator))
    weights = {name: weight * math.inf for name, weight in found.state_dict().items()}
    pack_generator(weights, found.config).write(tmp_path / "diverged")
    with pytest.raises(ValueError, match=r"images 0 to 1: .*not finite.*--precision fp32"):
        sample_set(ask(tmp_path / "diverged", tmp_path / "set"), be_quiet)
    assert not list((tmp_path / "set").glob("*.tar"))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"labels": (CLASSES,)}, f"--labels {CLASSES}: .* was trained with classes 0 to 19"),
        ({"steps": 0}, "steps=0"),
        ({"guidance_interval": (0.5, 0.2)}, "interval=.*must be 0 <= low < high"),
        ({"tokenizer": "builtin:openmoji-32"}, "the latents were made by a model of digest"),
        ({"model": "builtin:openmoji-32"}, "holds an autoencoder, not a generator"),
        ({"count": 0}, "--count 0"),
        pytest.param(
            {"use_gpu": True},
            "--use-gpu: torch cannot compute on 'cuda' here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)
def test_what_cannot_work_is_refused_before_work_starts(generator, tmp_path, changes, what):
    values = {"model": str(generator), "output": str(tmp_path / "set"), "on": "here", **changes}
    with pytest.raises(ValueError, match=what):
        sample_set(SampleRequest(**values), be_quiet)
    assert not (tmp_path / "set").exists() or not list((tmp_path / "set").glob("*.tar"))


@pytest.mark.parametrize(
    ("count", "made", "expected"),
    [(7, {}, 2), (1000, {}, 32), (100_000, {}, 1000), (1000, {"samples_per_shard": 5}, 5)],
)
def test_shards_are_those_of_the_set_or_of_whole_batches(tmp_path, count, made, expected):
    request = ask(tmp_path, tmp_path, count=count, samples_per_shard=0)
    assert sample._choose_shards(request, made).samples_per_shard == expected


def test_defaults_are_those_of_the_generator(generator, tmp_path):
    source, _ = sample._prepare(ask(generator, tmp_path), Location.parse(tmp_path))
    assert source.guidance == Guidance(2, 1.0, (0.0, 1.0))
    assert source.labels == tuple(range(CLASSES))
