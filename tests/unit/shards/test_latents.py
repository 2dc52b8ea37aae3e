"""Sets of latents without Ray: their bits, what loaders hand out, what is refused, the encoder."""

import io
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from data_pipelines import ShardDataset, ShardError, storage
from data_pipelines.building import unfinished
from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import make_index
from data_pipelines.loading.dataset import LatentSet
from data_pipelines.shards.index import ShardIndex, index_tar, load_index, write_index
from data_pipelines.shards.latent_bits import BitAction, pack_latents
from data_pipelines.shards.latent_format import EXTENSION, FORMAT, LatentFormat, read_bits
from data_pipelines.storage import Location
from data_pipelines.verify_shards import find_faults
from efae.config import Config
from efae.config.forms import with_overrides
from efae.latents.shard_encoder import ShardEncoder, Source
from efae.model.autoencoder import Autoencoder
from efae.symmetry import D4, GROUPS, Representation

TINY = {
    "data.resolution": 16,
    "representation.dim": 12,
    "representation.multiplicities": (4, 0, 2, 2, 2),
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 32,
    "model.num_heads": 2,
    "model.depth": 1,
}
DTYPES = ("float16", "bfloat16", "float32")


def make_model(**changes) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), TINY | changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return model


def make_form(
    model: Autoencoder, dtype: str, difference: float = 0.0, cells: tuple[int, int] = (2, 2)
) -> LatentFormat:
    return LatentFormat(
        shape=[12, *cells],
        dtype=dtype,
        group=model.group.name,
        multiplicities=model.representation.multiplicities,
        model_digest="0" * 64,
        model_uri="nowhere",
        certificate={"max_abs_difference": difference, "by_element": {}, "images": 1, "data": ""},
    )


def encode_shards(
    data: str, output: str, model: Autoencoder, form: LatentFormat, **options
) -> LatentSet:
    """What a job does, in this process."""
    index = load_index(data)
    source = Source(data, index, model.state_dict(), model.config, ("cls",), 5, "cpu", **options)
    encoder = ShardEncoder(source)
    shards = [
        encoder.write_shard(n, Location.parse(output), form).shards[0]
        for n in range(len(index.shards))
    ]
    write_index(output, ShardIndex(tuple(shards), None, {FORMAT: form.model_dump()}))
    unfinished.clear(Location.parse(output))
    dataset = ShardDataset.open(output)
    encoder.compare(dataset, 8)
    return dataset


def write_images(folder, images: np.ndarray, names: list[str]) -> str:
    """Shards of seven images with labels."""
    folder.mkdir(parents=True)
    for first in range(0, len(names), 7):
        with (folder / f"{first:02}.tar").open("wb") as file, TarWriter(file, mtime=0) as writer:
            for number in range(first, min(first + 7, len(names))):
                png = encode_png(images[number])
                writer.write({"__key__": names[number], "png": png, "cls": str(number).encode()})
    write_index(str(folder), make_index(str(folder)))
    return str(folder)


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
NAMES = [f"n{number}" for number in range(20)]


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    return make_model()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("images") / "set", IMAGES, NAMES)


@pytest.fixture(scope="module", params=DTYPES)
def latents(request, tmp_path_factory, images, model) -> LatentSet:
    folder = tmp_path_factory.mktemp("latents") / "set"
    return encode_shards(images, str(folder), model, make_form(model, request.param))


def read_all(dataset: LatentSet, epochs: int = 1, **options) -> dict:
    """{(epoch, key): (latent, element)}."""
    loader = dataset.loader(6, **options)
    return {
        (epoch, key): (latent.clone(), element)
        for epoch in range(epochs)
        for batch in loader
        for key, latent, element in zip(batch.key, batch.latent, batch.element, strict=True)
    }


class TestBits:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("group", GROUPS)
    def test_act_is_that_of_the_representation_bit_for_bit(self, group, dtype):
        representation = Representation.from_split(group=GROUPS[group], dim=12, invariant=3)
        form = LatentFormat(
            shape=[12, 3, 3],
            dtype=dtype,
            group=group,
            multiplicities=representation.multiplicities,
            model_digest="",
            model_uri="",
            certificate={},
        )
        latent = torch.randn(1, 12, 3, 3)
        bits = read_bits(pack_latents(latent, form)[0], form)
        rounded = latent.to(getattr(torch, dtype))
        for element in GROUPS[group]:
            out = np.empty_like(bits)
            BitAction(form)(element, bits, out)
            found = torch.from_numpy(out).view(rounded.dtype)
            assert torch.equal(found, representation.act(element, rounded)[0])

    def test_numbers_that_overflow_are_refused(self, model):
        with pytest.raises(ValueError, match="not finite as float16"):
            pack_latents(torch.full((1, 12, 2, 2), 1e6), make_form(model, "float16"))

    def test_other_files_are_refused(self, model):
        form = make_form(model, "float16")
        (data,) = pack_latents(torch.zeros(1, 12, 2, 2), form)
        other = make_form(model, "bfloat16")
        for wrong in (
            data[:-1],
            data + b"0",
            b"",
            pack_latents(torch.zeros(1, 12, 2, 2), other)[0],
        ):
            with pytest.raises(ValueError, match="not a float16 latent"):
                read_bits(wrong, form)


class TestRead:
    def test_latents_are_those_of_the_images(self, latents, images, model):
        found = {}
        for batch in latents.loader(6, members=("cls",)):
            assert [element.name for element in batch.element] == ["identity"] * len(batch.key)
            assert [f"n{int(label)}" for label in batch.members["cls"]] == batch.key
            found |= dict(zip(batch.key, batch.latent, strict=True))
        assert sorted(found) == sorted(NAMES)
        pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = model.encode(pixels)
        dtype = getattr(torch, latents.format.dtype)
        rounding = torch.finfo(dtype).eps
        for name, latent in zip(NAMES, expected, strict=True):
            assert found[name].dtype == dtype
            assert ((found[name].float() - latent).abs() <= rounding * latent.abs() + 1e-5).all()

    def test_single_ones_are_those_of_the_loader(self, latents):
        expected = read_all(latents, shuffle=False)
        assert len(expected) == len(latents)
        for sample, ((_, key), (latent, _)) in zip(latents, expected.items(), strict=True):
            assert sample.key == key
            assert sample.latent.dtype == latent.dtype
            assert torch.equal(sample.latent, latent)
        with pytest.raises(AttributeError, match=r"use sample\.latent"):
            _ = latents[0].image
        with pytest.raises(ValueError, match="holds latents"):
            latents.show()

    def test_webdataset_and_numpy_read_them(self, latents):
        ours = {key: latent for (_, key), (latent, _) in read_all(latents).items()}
        samples = []
        for shard in latents.index.shards:
            with (Path(latents.uri) / shard.name).open("rb") as file:
                opened = [{"url": shard.name, "stream": file}]
                samples += group_by_keys(tar_file_expander(opened))
        assert len(samples) == 20
        for sample in samples:
            stored = torch.from_numpy(np.load(io.BytesIO(sample[EXTENSION])))
            latent = ours[sample["__key__"]]
            assert torch.equal(stored.view(latent.dtype), latent)

    def test_augment_acts_by_the_element_that_it_names(self, latents, model):
        plain = {key: latent for (_, key), (latent, _) in read_all(latents).items()}
        for (_, key), (latent, element) in read_all(latents, 3, augment="group").items():
            assert torch.equal(latent, model.act(element, plain[key][None])[0])

    def test_elements_are_drawn_anew_and_the_same_at_any_world_size(self, latents):
        whole = read_all(latents, 40, augment="group", seed=3)
        counts = Counter(element.name for _, element in whole.values())
        assert min(counts[element.name] for element in D4) > 60  # of 100 each, sigma 9.4
        assert len({whole[epoch, "n0"][1] for epoch in range(40)}) == 8
        seen = {}
        for rank in range(3):
            loader = latents.loader(6, rank, 3, seed=3, augment="group")
            seen |= {
                k: e for batch in loader for k, e in zip(batch.key, batch.element, strict=True)
            }
        assert seen == {key: whole[0, key][1] for key in NAMES}
        other = read_all(latents, 1, augment="group", seed=4)
        assert {k: e for (_, k), (_, e) in other.items()} != seen

    def test_resumed_is_uninterrupted(self, latents):
        loader = latents.loader(6, tail="carry", augment="group")
        batches = iter(loader)
        for _ in range(5):
            next(batches)
        state = loader.state_dict()
        expected = next(batches)
        again = latents.loader(6, tail="carry", augment="group")
        again.load_state_dict(state)
        found = next(iter(again))
        assert (found.key, found.element) == (expected.key, expected.element)
        assert torch.equal(found.latent, expected.latent)


class TestEightViewsFromOneCopy:
    def test_the_stream_is_that_of_eight_stored_copies_at_an_eighth_of_the_cost(
        self, tmp_path, images, model
    ):
        form = make_form(model, "float32")
        one = encode_shards(images, str(tmp_path / "one"), model, form)
        copies, encoded = {}, 0
        for element in D4:
            turned = element.act_on_image(torch.from_numpy(IMAGES).movedim(-1, 1)).movedim(1, -1)
            source = write_images(tmp_path / element.name, turned.numpy(), NAMES)
            latents = encode_shards(source, str(tmp_path / f"{element}-latents"), model, form)
            copies[element] = latents
            encoded += len(latents)
        stored = {g: read_all(copy) for g, copy in copies.items()}
        stream = read_all(one, 12, augment="group")
        assert {element for _, element in stream.values()} == set(D4)
        for (_, key), (latent, element) in stream.items():
            assert (latent - stored[element][0, key][0]).abs().max() <= 1e-5
        size = {g: sum(shard.bytes for shard in copy.index.shards) for g, copy in copies.items()}
        assert sum(size.values()) == 8 * sum(shard.bytes for shard in one.index.shards)
        assert encoded == 8 * len(one)


class TestRefusals:
    def test_images_are_not_augmented(self, images):
        with pytest.raises(ValueError, match="holds images"):
            ShardDataset.open(images).loader(4, augment="group")

    def test_images_have_no_certificate_and_batches_of_them_no_latent(self, images):
        dataset = ShardDataset.open(images)
        with pytest.raises(AttributeError, match="holds images"):
            _ = dataset.certificate
        batch = next(iter(dataset.loader(4)))
        for name in ("latent", "element"):
            with pytest.raises(AttributeError, match="images"):
                getattr(batch, name)

    def test_batches_of_latents_have_no_image(self, latents):
        with pytest.raises(AttributeError, match=r"batch\.latent"):
            _ = next(iter(latents.loader(4))).image

    @pytest.mark.parametrize(
        "options",
        [
            {"resolution": 8},
            {"channels": 1},
            {"crop": "random"},
            {"pixel_cache_bytes": 1},
            {"augment": "flips"},
        ],
    )
    def test_options_of_images(self, latents, options):
        (name,) = options
        with pytest.raises(ValueError, match=name):
            latents.loader(4, **options)

    def test_latents_that_do_not_turn_are_not_turned(self, tmp_path, images):
        dense = make_model(**{"model.level": "objective"})
        dataset = encode_shards(
            images, str(tmp_path / "set"), dense, make_form(dense, "float16", difference=0.3)
        )
        with pytest.raises(ValueError, match=r"differ by up to 0\.3 .* --model\.level exact"):
            dataset.loader(4, augment="group")
        assert len(list(dataset.loader(20))) == 1

    def test_rectangles_are_not_turned_within_a_batch(self, model):
        form = make_form(model, "float16", cells=(2, 4))
        with pytest.raises(ValueError, match="group D4 would make the 2 x 4 latents of here 4 x 2"):
            form.require_action("here")

    def test_a_certificate_that_is_no_number_does_not_pass(self, latents, images, tmp_path, model):
        form = make_form(model, "float16", difference=float("nan"))
        dataset = encode_shards(images, str(tmp_path / "set"), model, form)
        with pytest.raises(ValueError, match="differ by up to nan"):
            dataset.loader(4, augment="group")

    def test_a_trivial_group_does_not_augment(self, tmp_path, images):
        plain = make_model(
            **{"representation.group": "trivial", "representation.multiplicities": (12, 0, 0, 0, 0)}
        )
        form = make_form(plain, "float16")
        dataset = encode_shards(images, str(tmp_path / "set"), plain, form)
        with pytest.raises(ValueError, match="trivial group"):
            dataset.loader(4, augment="group")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shape": [11, 2, 2]}, "shape"),
            ({"group": "D5"}, "D5"),
            ({"dtype": "int8"}, "dtype"),
            ({"multiplicities": {"a9": 12}}, "a9"),
        ],
    )
    def test_an_index_that_does_not_say_what_the_latents_are(self, latents, change, message):
        index = latents.index
        form = {**index.provenance[FORMAT], **change}
        with pytest.raises(ValueError, match="encode it again") as refused:
            LatentSet(latents.uri, replace(index, provenance={FORMAT: form}))
        assert message in str(refused.value)


class TestVerify:
    def test_faults_are_named(self, latents, tmp_path):
        assert list(find_faults(latents.uri)) == []
        storage.download_folder(latents.uri, tmp_path)
        index = load_index(str(tmp_path))
        members = index.shards[0].members[EXTENSION]
        path = tmp_path / index.shards[0].name
        data = bytearray(path.read_bytes())
        data[int(members.offset[1]) + 3] ^= 0xFF
        path.write_bytes(data)
        faults = list(find_faults(str(tmp_path)))
        assert any("not a" in fault and index.shards[0].keys[1] in fault for fault in faults)
        with pytest.raises(ShardError, match=index.shards[0].keys[1]):
            list(ShardDataset.open(str(tmp_path)).loader(4))

    def test_a_shard_without_samples_is_no_fault(self, latents, tmp_path):
        storage.download_folder(latents.uri, tmp_path)
        with tarfile.open(tmp_path / "empty.tar", "w"):
            pass
        index = load_index(str(tmp_path))
        empty = index_tar(tmp_path / "empty.tar", "empty.tar")
        write_index(str(tmp_path), replace(index, shards=(*index.shards, empty)))
        assert list(find_faults(str(tmp_path))) == []


class TestEncoder:
    def test_stale_latents_are_found(self, tmp_path, images, model):
        dataset = encode_shards(images, str(tmp_path / "a"), model, make_form(model, "float16"))
        other = make_model(**{"model.latent_noise": 0.0})
        for parameter in other.parameters():
            parameter += 0.01
        source = Source(images, load_index(images), other.state_dict(), other.config, (), 5, "cpu")
        with pytest.raises(ValueError, match=r"differs by .* encode it again"):
            ShardEncoder(source).compare(dataset, 8)

    @pytest.mark.parametrize(("asked", "compared"), [(1, 3), (16, 16), (19, 19), (1000, 20)])
    def test_as_many_latents_are_compared_as_asked(
        self, tmp_path, images, model, monkeypatch, asked, compared
    ):
        dataset = encode_shards(images, str(tmp_path / "a"), model, make_form(model, "float32"))
        source = Source(images, load_index(images), model.state_dict(), model.config, (), 2, "cpu")
        encoder, seen = ShardEncoder(source), []
        encode = encoder._encode
        monkeypatch.setattr(encoder, "_encode", lambda x: (seen.append(len(x)), encode(x))[1])
        encoder.compare(dataset, asked)
        assert compared <= sum(seen) <= compared + 1  # a batch may have one more than asked

    def test_the_certificate_measures_what_it_says(self, images, model):
        source = Source(images, load_index(images), model.state_dict(), model.config, (), 5, "cpu")
        found = ShardEncoder(source).measure(images, 12)
        assert found["images"] == 12
        assert set(found["by_element"]) == {element.name for element in D4}
        assert 0 < found["max_abs_difference"] <= 1e-5
        assert "tile" not in found
        dense = make_model(**{"model.level": "objective"})
        source = replace(source, weights=dense.state_dict(), config=dense.config)
        assert ShardEncoder(source).measure(images, 12)["max_abs_difference"] > 0.05

    def test_one_shard_is_encoded_while_another_is_uploaded(
        self, tmp_path, images, model, monkeypatch
    ):
        """Two uploads meet; before them there is no record."""
        form, output = make_form(model, "float32"), tmp_path / "latents"
        expected = encode_shards(images, str(tmp_path / "expected"), model, form)
        upload, two = storage.upload, threading.Barrier(2)

        def meet(path, location):
            assert not list(output.glob("**/*"))
            two.wait(20)
            upload(path, location)

        index = load_index(images)
        monkeypatch.setattr(storage, "upload", meet)
        source = Source(images, index, model.state_dict(), model.config, ("cls",), 5, "cpu")
        encoder = ShardEncoder(source)
        with ThreadPoolExecutor(2) as threads:
            records = [
                threads.submit(encoder.write_shard, number, Location.parse(str(output)), form)
                for number in range(2)
            ]
        for record, shard in zip(records, expected.index.shards, strict=False):
            assert record.result().shards[0].name == shard.name
            found, wanted = (folder / shard.name for folder in (output, tmp_path / "expected"))
            assert found.read_bytes() == wanted.read_bytes()

    @pytest.mark.parametrize("kind", ["unet", "transformer"])
    def test_images_of_another_size_than_the_trained_one_in_tiles(self, tmp_path, kind):
        pixels = np.random.default_rng(0).integers(0, 256, (3, 72, 100, 3), dtype=np.uint8)
        data = write_images(tmp_path / "images", pixels, NAMES[:3])
        model = make_model(**{"model.kind": kind, "model.fine_hidden_size": 8})
        options = {"image_size": (72, 96), "tile": 48}
        source = Source(
            data, load_index(data), model.state_dict(), model.config, (), 5, "cpu", **options
        )
        certificate = ShardEncoder(source).measure(data, 2)
        assert certificate["tile"] == 48
        assert certificate["max_abs_difference"] <= 1e-5
        form = make_form(model, "float32", cells=(9, 12))
        dataset = encode_shards(data, str(tmp_path / "latents"), model, form, **options)
        latent = next(iter(dataset.loader(3, shuffle=False))).latent
        image = torch.from_numpy(pixels[:, :, 2:98]).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(latent, model.encode(image, tile=48), atol=1e-4, rtol=0)
        difference = (latent - model.encode(image)).abs().max()
        assert (difference < 1e-4) == (kind == "unet")
