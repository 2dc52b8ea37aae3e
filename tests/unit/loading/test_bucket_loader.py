"""Batches of real images whose shapes differ, and the indexes that know their sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import ShardDataset, ShardError, index_shards
from data_pipelines.build_shards import build_shards
from data_pipelines.loading.buckets import split_by_bucket
from data_pipelines.loading.dataset import ImageSet
from data_pipelines.shards.index import load_index
from data_pipelines.shards.intake import Tolerance
from data_pipelines.verify_shards import find_faults

BUCKETS = ((16, 16), (16, 32), (32, 16))
SIZES = [(16, 16), (20, 20), (17, 40), (16, 30), (64, 24), (30, 10), (16, 16)]  # height, width
EXPECTED = [0, 0, 1, 1, 2, 2, 0]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """61 images; all pixels of image n are n."""
    path = tmp_path_factory.mktemp("images")
    for number in range(61):
        pixels = np.full((*SIZES[number % 7], 3), number, np.uint8)
        Image.fromarray(pixels).save(path / f"n{number:02d}.png")
    return path


@pytest.fixture(scope="module")
def mixed(images, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("mixed") / "set")
    build_shards(f"folder:{images}", uri, samples_per_shard=9)
    return uri


def expected_shape(key):
    return BUCKETS[EXPECTED[int(key[1:]) % 7]]


def forget_sizes(uri):
    """Make the index one of release 0.1."""
    path = Path(uri) / "index.json"
    tree = json.loads(path.read_text())
    for shard in tree["shards"]:
        del shard["image_sizes"]
    path.write_text(json.dumps(tree))


def read_sizes(uri):
    index = load_index(uri)
    keys = [key for shard in index.shards for key in shard.keys]
    return dict(zip(keys, map(tuple, index.image_sizes().tolist()), strict=True))


class TestLoader:
    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_an_epoch_holds_every_image_once_each_batch_in_one_shape(self, mixed, world):
        dataset = ShardDataset.open(mixed)
        seen = []
        loaders = [dataset.loader(6, rank, world, buckets=BUCKETS) for rank in range(world)]
        for parts in zip(*loaders, strict=True):
            keys = [key for part in parts for key in part.key]
            assert len({expected_shape(key) for key in keys}) == 1
            for part in parts:
                shape = (len(part.key), 3, *expected_shape(keys[0]))
                assert part.image.shape == shape
                for key, image in zip(part.key, part.image, strict=True):
                    assert (image == int(key[1:])).all()
            seen += keys
        assert sorted(seen) == sorted(dataset.keys)

    @pytest.mark.parametrize("tail", ["ragged", "carry"])
    def test_resumes_at_the_next_sample_in_another_world(self, mixed, tail):
        dataset = ShardDataset.open(mixed)

        def take(loaders, count):
            batches, iterators = [], [iter(loader) for loader in loaders]
            while len(batches) < count:
                parts = [next(iterator, None) for iterator in iterators]
                if parts[0] is None:
                    iterators = [iter(loader) for loader in loaders]
                else:
                    batches.append([key for part in parts for key in part.key])
            return batches

        def open_all(world):
            options = {"seed": 5, "tail": tail, "buckets": BUCKETS}
            return [dataset.loader(5, rank, world, **options) for rank in range(world)]

        expected = take(open_all(1), 30)
        for done in (1, 7, 13, 14, 22):
            first, second = open_all(2), open_all(4)
            assert take(first, done) == expected[:done]
            state = json.loads(json.dumps(first[0].state_dict()))
            assert state == first[1].state_dict()
            for loader in second:
                loader.load_state_dict(state)
            assert take(second, 30 - done) == expected[done:]

    def test_refuses_a_position_of_other_buckets_or_within_a_batch(self, mixed):
        dataset = ShardDataset.open(mixed)
        loader = dataset.loader(5, tail="carry", buckets=BUCKETS)
        next(iter(loader))
        state = loader.state_dict()
        assert (state["epoch"], state["consumed"]) == (0, 5)
        for other in ((), BUCKETS[:2], BUCKETS[::-1]):
            with pytest.raises(ValueError, match="buckets="):
                dataset.loader(5, tail="carry", buckets=other, resolution=8).load_state_dict(state)
        for place in ({"consumed": 3}, {"consumed": 10**6}, {"consumed": -5}, {"epoch": -1}):
            with pytest.raises(ValueError, match="outside the data"):
                loader.load_state_dict(state | place)
        plain = dataset.loader(5, resolution=8)
        before = {k: v for k, v in plain.state_dict().items() if k != "buckets"}
        plain.load_state_dict(before)  # of a version without buckets

    def test_each_bucket_is_a_set_of_its_own(self, mixed):
        *parts, unused = split_by_bucket(load_index(mixed), (*BUCKETS, (8, 80)))
        assert unused.shards == ()
        seen = []
        for sides, part in zip(BUCKETS, parts, strict=True):
            for batch in ImageSet(mixed, part).loader(6, resolution=sides):
                assert {expected_shape(key) for key in batch.key} == {sides}
                for key, image in zip(batch.key, batch.image, strict=True):
                    assert (image == int(key[1:])).all()
                seen += batch.key
        assert sorted(seen) == sorted(ShardDataset.open(mixed).keys)

    def test_memory_is_used_again_for_other_shapes(self, mixed):
        batches = iter(ShardDataset.open(mixed).loader(4, tail="carry", buckets=BUCKETS))
        places = {next(batches).image.data_ptr() for _ in range(90)}
        batches.close()
        assert len(places) < 16

    def test_a_bad_sample_is_replaced_by_one_of_its_bucket(self, images, tmp_path):
        uri = f"{tmp_path}/set"
        build_shards(f"folder:{images}", uri)
        index, path = load_index(uri), Path(uri) / "shard-000000.tar"
        data = bytearray(path.read_bytes())
        bad = [key for key in index.shards[0].keys if expected_shape(key) == BUCKETS[1]][3]
        place = index.shards[0].images().offset
        data[int(place[index.shards[0].keys.index(bad)]) + 60] ^= 1
        path.write_bytes(data)
        dataset = ShardDataset.open(uri)
        with pytest.raises(ShardError, match=bad):
            list(dataset.loader(6, buckets=BUCKETS))
        loader = dataset.loader(6, buckets=BUCKETS, bad_samples="replace")
        for batch in loader:
            assert batch.image.shape[2:] == expected_shape(batch.key[0])
            assert len({expected_shape(key) for key in batch.key}) == 1
        assert set(loader.bad_samples) == {bad}

    def test_bad_samples_alone_in_their_bucket_are_replaced_by_others(self, images, tmp_path):
        uri = f"{tmp_path}/set"
        build_shards(f"folder:{images}", uri)
        path, shard = Path(uri) / "shard-000000.tar", load_index(uri).shards[0]
        data, place = bytearray(path.read_bytes()), shard.images().offset
        for number, key in enumerate(shard.keys):
            if expected_shape(key) == BUCKETS[2]:
                data[int(place[number]) + 60] ^= 1
        path.write_bytes(data)
        loader = ShardDataset.open(uri).loader(6, buckets=BUCKETS, bad_samples="replace")
        shapes = {tuple(batch.image.shape[2:]) for batch in loader}
        assert shapes == set(BUCKETS)
        assert {expected_shape(key) for key in loader.bad_samples} == {BUCKETS[2]}

    def test_images_of_one_size_all_lie_in_one_bucket(self, shards):
        dataset = ShardDataset.open(shards)
        batches = list(dataset.loader(8, buckets=((4, 8), (4, 4), (16, 16), (8, 4))))
        assert {batch.image.shape[2:] for batch in batches} == {(4, 4)}
        assert sorted(key for batch in batches for key in batch.key) == sorted(dataset.keys)


class TestSizes:
    def test_are_those_of_the_images_however_they_were_indexed(self, images, mixed, tmp_path):
        expected = {f"n{number:02d}": SIZES[number % 7] for number in range(61)}
        assert read_sizes(mixed) == expected
        index_shards.index_shards(mixed, f"{tmp_path}/index")
        assert read_sizes(f"{tmp_path}/index") == expected
        assert load_index(f"{tmp_path}/index").id == load_index(mixed).id
        build_shards(f"folder:{images}", f"{tmp_path}/square", resolution=8)
        assert set(read_sizes(f"{tmp_path}/square").values()) == {(8, 8)}
        assert "image_sizes" not in (tmp_path / "square/index.json").read_text()

    def test_are_known_of_upright_images_and_of_those_that_remain(self, tmp_path):
        (tmp_path / "images").mkdir()
        for number, (height, width) in enumerate(SIZES):
            image, exif = Image.new("RGB", (width, height)), Image.Exif()
            exif[0x0112] = 6  # turned by 90 degrees
            image.save(tmp_path / f"images/{number}.png", exif=exif)
        (tmp_path / "images/3.png").write_bytes(b"damaged")
        build_shards(
            f"folder:{tmp_path}/images", f"{tmp_path}/set", tolerance=Tolerance(bad_images=1)
        )
        assert read_sizes(f"{tmp_path}/set") == {
            str(n): (width, height) for n, (height, width) in enumerate(SIZES) if n != 3
        }

    def test_an_index_without_them_reads_as_before_and_gets_them(self, images, tmp_path, capsys):
        uri = f"{tmp_path}/set"
        build_shards(f"folder:{images}", uri, samples_per_shard=9)
        before = load_index(uri)
        forget_sizes(uri)
        dataset = ShardDataset.open(uri)
        assert len(list(dataset.loader(61, resolution=8))) == 1
        with pytest.raises(ValueError, match=rf"sizes of its images; add .*index_shards {uri}`"):
            dataset.loader(6, buckets=BUCKETS)
        index_shards.main([uri])
        assert "added the images' sizes" in capsys.readouterr().out
        assert load_index(uri).image_sizes().tolist() == before.image_sizes().tolist()
        assert load_index(uri).id == before.id
        assert load_index(uri).provenance == before.provenance
        assert list(find_faults(uri)) == []

    def test_an_interrupted_build_of_an_earlier_release_reads_its_shards_again(
        self, images, tmp_path
    ):
        output = tmp_path / "index"
        source = f"{tmp_path}/tars"
        build_shards(f"folder:{images}", source, samples_per_shard=9)
        (tmp_path / "tars/bad.tar").write_bytes(b"no tar" * 200)
        with pytest.raises(ValueError, match=r"bad\.tar"):
            index_shards.index_shards(source, str(output))
        for path in (output / ".unfinished").glob("shard*.json"):
            tree = json.loads(path.read_text())
            del tree["shards"][0]["image_sizes"]
            path.write_text(json.dumps(tree))
        (tmp_path / "tars/bad.tar").unlink()
        index_shards.index_shards(source, str(output))
        assert len(read_sizes(str(output))) == 61

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"height": [16]}, "columns of unequal length"),
            ({"height": [0] * 9}, "not from 1 to 178956970"),
            ({"height": [2**70] * 9}, "not from 1 to 178956970"),
            ({"height": [178956970] * 9}, "more than 178956970 pixels"),
            ({"height": ["16"] * 9}, "not a shard index"),
        ],
    )
    def test_wrong_ones_are_refused(self, mixed, tmp_path, change, message):
        tree = json.loads((Path(mixed) / "index.json").read_text())
        tree["shards"][0]["image_sizes"] |= change
        (tmp_path / "index.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=message):
            load_index(str(tmp_path))

    def test_verify_compares_them_with_the_pixels(self, images, tmp_path):
        uri = f"{tmp_path}/set"
        build_shards(f"folder:{images}", uri, samples_per_shard=9)
        path = tmp_path / "set/index.json"
        tree = json.loads(path.read_text())
        key = tree["shards"][2]["keys"][4]
        tree["shards"][2]["image_sizes"]["width"][4] += 1
        path.write_text(json.dumps(tree))
        (fault,) = find_faults(uri)
        assert f"sample {key!r}: size " in fault
