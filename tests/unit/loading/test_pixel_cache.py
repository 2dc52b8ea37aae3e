"""Decoded images that are kept: later epochs give the same pixels without their shards."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import ShardDataset
from data_pipelines.loading.pixel_cache import PixelCache, measure_pixels
from tests.conftest import ROOT
from tests.unit.loading.test_shard_loader import write_set_with_bad

SHAPE = (8, 8, 3)
ROW_BYTES = 8 * 8 * 3
PLENTY = 2**20


def read_epoch(loader):
    """(8, 8, 3) by key."""
    return {
        key: image.permute(1, 2, 0).numpy().copy()
        for batch in loader
        for key, image in zip(batch.key, batch.image, strict=True)
    }


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[key], expected[key]) for key in expected
    )


def find_file(folder):
    (path,) = folder.glob("*.pixels")
    return path


def overwrite(shards, change):
    for path in Path(shards).glob("*.tar"):
        path.write_bytes(change(path.read_bytes()))


def zeros(data):
    return bytes(len(data))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_later_epochs_need_no_shard_and_give_the_same_at_any_world_size(shards, cache):
    dataset = ShardDataset.open(shards)
    expected = read_epoch(dataset.loader(4))
    assert len(expected) == 23
    options = {"cache_dir": cache, "pixel_cache_bytes": PLENTY}
    assert equal(read_epoch(dataset.loader(4, **options)), expected)
    overwrite(shards, zeros)
    with pytest.raises(OSError, match="its bytes are not those"):
        read_epoch(dataset.loader(4))
    assert equal(read_epoch(dataset.loader(4, seed=1, **options)), expected)
    parts = [read_epoch(dataset.loader(4, rank, 3, **options)) for rank in range(3)]
    assert equal(parts[0] | parts[1] | parts[2], expected)


def test_members_are_still_read_and_checked(tmp_path, cache):
    write_set_with_bad(tmp_path, bad=[])
    dataset = ShardDataset.open(str(tmp_path))
    options = {"cache_dir": cache, "pixel_cache_bytes": PLENTY, "members": ("cls",)}
    for _ in range(2):
        for batch in dataset.loader(4, **options):
            assert [f"n{label.decode()}" for label in batch.members["cls"]] == batch.key
    overwrite(tmp_path, zeros)
    with pytest.raises(OSError, match="its bytes are not those"):
        list(dataset.loader(4, **options))


def test_the_bound_holds_and_the_rest_is_decoded(shards, cache):
    dataset, bound = ShardDataset.open(shards), 10 * ROW_BYTES
    expected = read_epoch(dataset.loader(4))
    options = {"cache_dir": cache, "pixel_cache_bytes": bound}
    for seed in range(2):
        assert equal(read_epoch(dataset.loader(4, seed=seed, **options)), expected)
    assert 9 * ROW_BYTES < find_file(cache).stat().st_size <= bound
    assert 0 < measure_pixels(cache) <= -(-bound // 4096) * 4096


def test_what_changed_on_disk_is_decoded_again(shards, cache):
    dataset = ShardDataset.open(shards)
    options = {"cache_dir": cache, "pixel_cache_bytes": PLENTY}
    expected = read_epoch(dataset.loader(4, **options))
    path = find_file(cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert equal(read_epoch(dataset.loader(4, **options)), expected)
    assert path.read_bytes() == whole


def test_a_place_without_its_checksum_is_empty(cache):
    pixels, row = PixelCache(cache, "set", 4, SHAPE, PLENTY), np.ones(SHAPE, np.uint8)
    pixels.open()
    pixels.write(2, row)
    path = find_file(cache)
    whole = bytearray(path.read_bytes())
    whole[2 * 4 : 3 * 4] = bytes(4)  # as a process leaves it that is killed after the pixels
    path.write_bytes(whole)
    again = PixelCache(cache, "set", 4, SHAPE, PLENTY)
    again.open()
    assert not again.read(2, np.zeros(SHAPE, np.uint8))
    assert again.holds(np.arange(4)).tolist() == [False] * 4
    again.write(2, row)
    found = np.zeros(SHAPE, np.uint8)
    assert pixels.read(2, found)
    assert np.array_equal(found, row)
    assert pixels.holds(np.arange(5)).tolist() == [False, False, True, False, False]


def test_a_replaced_sample_is_not_kept_under_the_name_of_the_bad_one(tmp_path, cache):
    write_set_with_bad(tmp_path, bad=[2])
    dataset = ShardDataset.open(str(tmp_path))
    options = {"cache_dir": cache, "pixel_cache_bytes": PLENTY, "bad_samples": "replace"}
    for _ in range(2):
        loader = dataset.loader(4, **options)
        batches = [(key, image) for b in loader for key, image in zip(b.key, b.image, strict=True)]
        assert all((image == int(key[1:])).all() for key, image in batches)
        assert [key for key, _ in batches].count("n3") == 2
        assert list(loader.bad_samples) == ["n2"]


def test_files_that_nobody_uses_any_more_are_deleted(cache):
    first, second, third = (PixelCache(cache, name, 4, SHAPE, PLENTY) for name in "abc")
    first.open()
    second.open()
    assert len(list(cache.glob("*.pixels"))) == 2
    del first
    third.open()
    assert len(list(cache.glob("*.pixels"))) == 2
    row = np.ones(SHAPE, np.uint8)
    second.write(0, row)
    assert second.read(0, row)


def test_a_name_that_goes_before_the_lock_is_taken_does_no_harm(cache, monkeypatch):
    pixels, lock = PixelCache(cache, "set", 4, SHAPE, PLENTY), fcntl.flock

    def come_late(file, operation):
        monkeypatch.undo()
        find_file(cache).unlink()  # as another process may, which holds the lock until now
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", come_late)
    pixels.open()
    assert not list(cache.iterdir())
    row, found = np.ones(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    pixels.write(1, row)
    assert pixels.read(1, found)
    assert np.array_equal(found, row)
    assert pixels.holds(np.arange(4)).tolist() == [False, True, False, False]


def test_opening_a_loader_makes_no_file(shards, cache):
    loader = ShardDataset.open(shards).loader(4, cache_dir=cache, pixel_cache_bytes=PLENTY)
    assert not cache.exists()
    next(iter(loader))
    assert find_file(cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_cache_bytes": -1}, "pixel_cache_bytes=-1: must be >= 0"),
        ({"pixel_cache_bytes": 100}, "pixel_cache_bytes=100: one image takes 192"),
        ({"pixel_cache_bytes": PLENTY, "crop": "random"}, "random crops differ in every epoch"),
    ],
)
def test_what_cannot_work_is_refused(shards, options, message):
    with pytest.raises(ValueError, match=message):
        ShardDataset.open(shards).loader(4, **options)


@pytest.mark.parametrize(("moment", "size"), [("before", 100), ("after", 16 + ROW_BYTES)])
def test_a_full_disk_names_the_folder_and_the_remedy(tmp_path, moment, size):
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    program = f"""
import resource, sys
from pathlib import Path
import numpy as np
from data_pipelines.loading.pixel_cache import PixelCache
pixels = PixelCache(Path(sys.argv[1]), "set", 4, {SHAPE}, {PLENTY})
try:
    {limit if moment == "before" else ""}
    pixels.open()
    {limit if moment == "after" else ""}
    pixels.write(0, np.ones({SHAPE}, np.uint8))
    print("written")
    pixels.write(1, np.ones({SHAPE}, np.uint8))
except OSError as error:
    print(error)
print(pixels.holds(np.arange(4)).tolist() if {moment == "after"} else "")
"""
    child = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"cache folder {tmp_path}" in child.stdout, child.stderr
    assert "no space for" in child.stdout
    assert "lower data.pixel_cache_bytes" in child.stdout
    if moment == "after":
        assert "written" in child.stdout
        assert child.stdout.splitlines()[-1] == "[True, False, False, False]"
