import gc
import json
import os
import pickle
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

from data_pipelines import ShardDataset, ShardError
from data_pipelines.build_shards import build_shards
from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import make_index
from data_pipelines.shards.index import load_index, write_index


def write_set_with_bad(folder, bad):
    """Eight samples n0 to n7 in one tar, image n all n, label n; those of `bad` are no images."""
    with (folder / "a.tar").open("wb") as file, TarWriter(file, encoder=False) as writer:
        for number in range(8):
            png = encode_png(np.full((8, 8), number, np.uint8))
            writer.write({"__key__": f"n{number}", "png": png, "cls": str(number).encode()})
    write_index(str(folder), make_index(str(folder)))
    index = load_index(str(folder))
    data = bytearray((folder / "a.tar").read_bytes())
    images = index.shards[0].members["png"]
    for number in bad:  # damage inside the compressed pixels, with a checksum that says it is right
        start, size = int(images.offset[number]), int(images.size[number])
        data[start + size // 2] ^= 0xFF
        images.crc32[number] = zlib.crc32(data[start : start + size])
    (folder / "a.tar").write_bytes(data)
    write_index(str(folder), index)


class TestRead:
    def test_an_epoch_holds_every_image_once_at_any_world_size(self, shards):
        dataset = ShardDataset.open(shards)
        assert (len(dataset), dataset.image_shape) == (23, (3, 8, 8))
        for world in (1, 2, 4):
            seen = {}
            for rank in range(world):
                batches = list(dataset.loader(8, rank, world))
                assert len(batches) == 3
                for batch in batches:
                    assert batch.image.shape == (len(batch.key), 3, 8, 8)
                    for key, image in zip(batch.key, batch.image.numpy(), strict=True):
                        assert key not in seen
                        seen[key] = image
            assert len(seen) == 23
            assert all((image == int(key[1:])).all() for key, image in seen.items())

    def test_without_shuffle_the_order_is_that_of_the_shards(self, shards):
        dataset = ShardDataset.open(shards)
        loader = dataset.loader(4, shuffle=False)
        assert [key for batch in loader for key in batch.key] == dataset.keys

    @pytest.mark.parametrize("tail", ["ragged", "carry"])
    def test_resumes_at_the_next_sample_in_another_world(self, shards, tail):
        dataset = ShardDataset.open(shards)

        def take(loaders, count):
            batches, iterators = [], [iter(loader) for loader in loaders]
            while len(batches) < count:
                parts = [next(iterator, None) for iterator in iterators]
                if parts[0] is None:
                    iterators = [iter(loader) for loader in loaders]
                else:
                    batches.append([key for part in parts for key in part.key])
            return batches

        expected = take([dataset.loader(4, seed=5, tail=tail)], 14)
        first = [dataset.loader(4, rank, 2, seed=5, tail=tail) for rank in range(2)]
        assert take(first, 8) == expected[:8]
        state = json.loads(json.dumps(first[0].state_dict()))
        assert state == first[1].state_dict()
        second = [dataset.loader(4, rank, 4, seed=5, tail=tail) for rank in range(4)]
        for loader in second:
            loader.load_state_dict(state)
        assert take(second, 6) == expected[8:]

    def test_refuses_a_position_of_other_data_or_order(self, shards, folder, tmp_path):
        build_shards(f"folder:{folder}", f"{tmp_path}/other", samples_per_shard=7)
        state = ShardDataset.open(f"{tmp_path}/other").loader(4).state_dict()
        dataset = ShardDataset.open(shards)
        with pytest.raises(ValueError, match="dataset_id="):
            dataset.loader(4).load_state_dict(state)
        state = dataset.loader(4).state_dict()
        for name, loader in {
            "seed": dataset.loader(4, seed=1),
            "global_batch_size": dataset.loader(8),
            "tail": dataset.loader(4, tail="carry"),
            "shuffle": dataset.loader(4, shuffle=False),
        }.items():
            with pytest.raises(ValueError, match=f"{name}="):
                loader.load_state_dict(state)

    def test_refuses_sizes_that_do_not_fit(self, shards):
        dataset = ShardDataset.open(shards)
        for message, options in {
            "global_batch_size=5: must be at least world_size=6": {"world_size": 6},
            "rank=2": {"rank": 2, "world_size": 2},
            "channels=4": {"channels": 4},
            "tail='drop'": {"tail": "drop"},
            "decode_threads=0": {"decode_threads": 0},
        }.items():
            with pytest.raises(ValueError, match=message):
                dataset.loader(5, **options)

    @pytest.mark.parametrize(("side", "threads"), [(64, 1), (512, 2)])
    def test_small_images_are_decoded_by_one_thread(self, shards, side, threads):
        running = [
            sum(thread.name.startswith("decode") for thread in threading.enumerate())
            for _ in ShardDataset.open(shards).loader(2, resolution=side)
        ]
        assert max(running) == threads

    def test_converts_between_grey_and_colour(self, shards):
        batch = next(iter(ShardDataset.open(shards).loader(23, channels=1)))
        assert batch.image.shape == (23, 1, 8, 8)
        assert all((i == int(k[1:])).all() for k, i in zip(batch.key, batch.image, strict=True))

    def test_images_of_differing_size_make_no_batch(self, tmp_path):
        for side in (4, 5):
            image = Image.new("L", (side, side))
            (tmp_path / "images").mkdir(exist_ok=True)
            image.save(tmp_path / f"images/{side}.png")
        build_shards(f"folder:{tmp_path}/images", f"{tmp_path}/set")
        dataset = ShardDataset.open(f"{tmp_path}/set")
        assert dataset.image_shape is None
        with pytest.raises(ValueError, match=r"differ in size.*--resolution N"):
            dataset.loader(2)

    def test_a_cut_off_shard_is_named(self, shards):
        path = Path(shards) / "shard-000000.tar"
        path.write_bytes(path.read_bytes()[:-512])
        with pytest.raises(ShardError, match=r"shard-000000\.tar: \d+ bytes, the index says \d+"):
            list(ShardDataset.open(shards).loader(4))

    def test_every_flipped_byte_of_an_image_is_noticed_and_named(self, shards):
        dataset = ShardDataset.open(shards)
        place = dataset.columns()
        shard = dataset.index.shards[0]
        path = Path(shards) / shard.name
        whole = path.read_bytes()
        for offset in range(int(place.offset[1]), int(place.offset[1] + place.size[1])):
            data = bytearray(whole)
            data[offset] ^= 1
            path.write_bytes(data)
            with pytest.raises(ShardError, match="its bytes are not those") as error:
                list(dataset.loader(23, shuffle=False))
            assert error.value.key == shard.keys[1]

    def test_an_image_that_never_was_one_is_named_by_its_key(self, tmp_path):
        write_set_with_bad(tmp_path, bad=[3])
        with pytest.raises(ShardError, match=r"a\.tar, sample 'n3': ") as error:
            list(ShardDataset.open(str(tmp_path)).loader(2))
        assert error.value.key == "n3"
        assert pickle.loads(pickle.dumps(error.value)).key == "n3"  # it crosses processes

    def test_bad_samples_are_replaced_counted_and_capped(self, tmp_path, caplog):
        write_set_with_bad(tmp_path, bad=[3, 4])
        dataset = ShardDataset.open(str(tmp_path))
        loader = dataset.loader(4, bad_samples="replace", members=("cls",))
        for _ in range(2):
            batches = list(loader)
            keys = [key for batch in batches for key in batch.key]
            assert sorted(keys) == ["n0", "n1", "n2", "n5", "n5", "n5", "n6", "n7"]
            for batch in batches:  # image and members are those of the key
                for key, image, label in zip(
                    batch.key, batch.image, batch.members["cls"], strict=True
                ):
                    assert key == f"n{label.decode()}"
                    assert (image == int(label)).all()
        assert set(loader.bad_samples) == {"n3", "n4"}
        assert len([record for record in caplog.records if "replaced" in record.message]) == 2
        with pytest.raises(ShardError, match=r"and 1 more bad samples.*verify_shards"):
            list(dataset.loader(4, bad_samples="replace", most_bad_samples=1))

    def test_a_set_of_bad_samples_alone_fails(self, tmp_path):
        write_set_with_bad(tmp_path, bad=range(8))
        with pytest.raises(ShardError, match="no good sample near it"):
            list(ShardDataset.open(str(tmp_path)).loader(4, bad_samples="replace"))

    def test_a_damaged_label_makes_a_bad_sample(self, tmp_path):
        write_set_with_bad(tmp_path, bad=[])
        dataset = ShardDataset.open(str(tmp_path))
        label = dataset.columns("cls")
        data = bytearray((tmp_path / "a.tar").read_bytes())
        data[int(label.offset[2])] ^= 1
        (tmp_path / "a.tar").write_bytes(data)
        assert len(list(dataset.loader(4))) == 2
        with pytest.raises(ShardError, match="sample 'n2'"):
            list(dataset.loader(4, members=("cls",)))

    def test_a_member_that_is_not_there_is_refused_at_once(self, tmp_path):
        write_set_with_bad(tmp_path, bad=[])
        with pytest.raises(ValueError, match=r"'n0' of .*a\.tar has no member 'json'; .*cls"):
            ShardDataset.open(str(tmp_path)).loader(4, members=("json",))

    def test_any_size_is_cut_to_the_asked_one_at_the_centre_or_at_random(self, tmp_path):
        ramp = np.arange(64, dtype=np.uint8)  # the value of a pixel is its column
        with (tmp_path / "a.tar").open("wb") as file, TarWriter(file, encoder=False) as writer:
            for width in (16, 64):
                pixels = np.broadcast_to(ramp[:width], (16, width))
                writer.write(
                    {"__key__": f"w{width}", "png": encode_png(np.ascontiguousarray(pixels))}
                )
        write_index(str(tmp_path), make_index(str(tmp_path)))
        dataset = ShardDataset.open(str(tmp_path))

        def read(**options):
            loader = dataset.loader(2, resolution=16, channels=1, **options)
            epochs = [
                {k: int(i[0, 0, 0]) for k, i in zip(b.key, b.image, strict=True)}
                for _ in range(8)
                for b in loader
            ]
            return [epoch["w64"] for epoch in epochs]

        assert read() == [24] * 8
        drawn = read(crop="random")
        assert len(set(drawn)) > 4
        assert min(drawn) >= 0
        assert max(drawn) <= 48
        assert drawn == read(crop="random")
        assert drawn != read(crop="random", seed=1)
        alone = dataset.loader(2, resolution=16, channels=1, crop="random")
        ranks = [
            dataset.loader(2, rank, 2, resolution=16, channels=1, crop="random") for rank in (0, 1)
        ]
        whole = torch.cat([batch.image for batch in alone])
        parts = [batch.image for pair in zip(*ranks, strict=True) for batch in pair]
        assert (torch.cat(parts) == whole).all()

    def test_leaves_no_thread_behind(self, shards):
        before = set(threading.enumerate())
        for batch in ShardDataset.open(shards).loader(4, tail="carry"):
            if batch:
                break
        gc.collect()
        assert set(threading.enumerate()) <= before

    def test_a_newer_iterator_ends_the_older(self, shards):
        loader = ShardDataset.open(shards).loader(4)
        older = iter(loader)
        next(older)
        newer = iter(loader)
        next(newer)
        with pytest.raises(RuntimeError, match="older iterator"):
            next(older)
        newer.close()

    def test_what_a_user_keeps_of_a_batch_is_never_written_over(self, shards):
        kept = []
        for batch in ShardDataset.open(shards).loader(2, decode_threads=3):
            kept.append((batch.key[0], batch.image[0, 1:].flatten()[3:9]))
            del batch
        assert all((part == int(key[1:])).all() for key, part in kept)

    def test_memory_of_dropped_batches_is_used_again(self, shards):
        places = set()
        batches = iter(ShardDataset.open(shards).loader(2, tail="carry"))
        for _ in range(60):
            places.add(next(batches).image.data_ptr())
        batches.close()
        assert len(places) < 16

    @pytest.mark.parametrize(("side", "cpus", "threads"), [(64, 2, 1), (128, 2, 2), (128, 1, 1)])
    def test_decoder_threads_fit_the_images_and_the_machine(self, shards, side, cpus, threads):
        mine = os.sched_getaffinity(0)
        if len(mine) < cpus:
            pytest.skip("only one CPU")
        os.sched_setaffinity(0, sorted(mine)[:cpus])
        try:
            loader = ShardDataset.open(shards).loader(2, resolution=side)
            batches = iter(loader)
            next(batches)
            found = [t.name for t in threading.enumerate() if t.name.startswith("decode")]
            batches.close()
        finally:
            os.sched_setaffinity(0, mine)
        assert len(found) == threads

    def test_counts_the_time_it_waited(self, shards):
        loader = ShardDataset.open(shards).loader(4)
        assert loader.wait_seconds == 0
        list(loader)
        assert loader.wait_seconds > 0


class TestSingleSamples:
    def test_numbers_are_those_of_a_list(self, shards):
        dataset = ShardDataset.open(shards)
        for number, key in enumerate(dataset.keys):
            for sample in (dataset[number], dataset[number - len(dataset)]):
                assert sample.key == key
                assert sample.image.dtype == torch.uint8
                assert sample.image.shape == (3, 8, 8)
                assert (sample.image == int(key[1:])).all()
        assert [sample.key for sample in dataset] == dataset.keys
        assert dataset[np.int64(3)].key == dataset.keys[3]
        for number in (23, -24, 10**9):
            with pytest.raises(IndexError, match=f"sample {number} of .* which has 23"):
                dataset[number]
        for wrong in (slice(2), 1.0, "n03", None):
            with pytest.raises(TypeError):
                dataset[wrong]
        with pytest.raises(AttributeError, match=r"use sample\.image"):
            _ = dataset[0].latent

    def test_images_keep_their_size_and_colours(self, tmp_path):
        sizes = {"a": (5, 9), "b": (300, 7), "c": (40, 40)}
        for name, size in sizes.items():
            pixels = np.random.default_rng(len(name)).integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        build_shards(f"folder:{tmp_path}", f"{tmp_path}-set")
        dataset = ShardDataset.open(f"{tmp_path}-set")
        assert dataset.image_shape is None
        for sample in dataset:
            expected = np.asarray(Image.open(tmp_path / f"{sample.key}.png"))
            assert np.array_equal(sample.image.permute(1, 2, 0), expected)
        assert dataset.show().size == (3 * 100 + 4, 100 + 4)

    def test_a_dataset_that_was_read_is_one_of_torchs_and_can_be_pickled(self, shards):
        dataset = ShardDataset.open(shards)
        assert dataset[5].key == pickle.loads(pickle.dumps(dataset))[5].key
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=4, collate_fn=lambda samples: [one.key for one in samples]
        )
        assert [key for keys in loader for key in keys] == dataset.keys

    @pytest.mark.parametrize("whole", [True, False], ids=["pixels", "bytes"])
    def test_a_damaged_one_is_named(self, tmp_path, whole):
        write_set_with_bad(tmp_path, bad=[2])
        if not whole:  # now the checksum differs, too
            data = bytearray((tmp_path / "a.tar").read_bytes())
            start = int(load_index(str(tmp_path)).shards[0].members["png"].offset[2])
            data[start + 1] ^= 0xFF
            (tmp_path / "a.tar").write_bytes(data)
        dataset = ShardDataset.open(str(tmp_path))
        assert dataset[1].key == "n1"
        with pytest.raises(ShardError, match=r"a\.tar.*n2"):
            _ = dataset[2]

    def test_show_draws_images_at_equal_distances(self, shards):
        dataset = ShardDataset.open(shards)
        picture = np.asarray(dataset.show(3))
        assert picture.shape == (104, 304, 3)
        order = [int(dataset.keys[number][1:]) for number in (0, 11, 22)]
        assert [int(picture[52, left, 0]) for left in (52, 152, 252)] == order
        assert dataset.show(10**6).size == (12 * 100 + 4, 2 * 100 + 4)
        with pytest.raises(ValueError, match="cannot show 0 of the 23 images"):
            dataset.show(0)

    def test_show_draws_grey_images(self, tmp_path):
        Image.fromarray(np.full((8, 8), 77, np.uint8)).save(tmp_path / "a.png")
        build_shards(f"folder:{tmp_path}", f"{tmp_path}-set")
        dataset = ShardDataset.open(f"{tmp_path}-set")
        assert dataset[0].image.shape == (1, 8, 8)
        assert dataset.show().getpixel((52, 52)) == (77, 77, 77)
