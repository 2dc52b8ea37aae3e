"""The loader under faults: the right batches, or an error that names the shard.

Shards lie on the real server; a proxy before it does the damage and counts the bytes.
"""

import contextlib
import fcntl
import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import ShardDataset, ShardError, storage
from data_pipelines.build_shards import build_shards
from data_pipelines.loading.loader import _FETCH_THREADS
from data_pipelines.loading.shard_cache import ShardCache
from data_pipelines.storage import Location, objects
from tests.conftest import ROOT
from tests.integration.fault_proxy import FaultProxy

pytestmark = pytest.mark.s3
FOLDER = "s3://efae-data/loader-faults"
FEW, MANY, COPY = f"{FOLDER}/few", f"{FOLDER}/many", f"{FOLDER}/copy"
TARS = "*.tar"
FEW_SHARDS, FEW_SAMPLES = 4, 112
MANY_SHARDS, MANY_SAMPLES = 36, 648
VICTIM = 40
"""Number of the sample that is damaged; it is of shard 1 of 0 to 3."""
SHARD = "shard-000001.tar"
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["data_pipelines.loading.dataset", "s3fs"])


def draw(key, side=48):
    """Noise, so that a PNG of it is of about 7 KB and a shard of 28 is cut into two chunks."""
    return np.random.default_rng(int(key)).integers(0, 256, (side, side, 3), np.uint8)


def build(folder, uri, samples, samples_per_shard, side=48):
    (folder / "images").mkdir(parents=True)
    for number in range(samples):
        Image.fromarray(draw(number, side)).save(folder / f"images/{number:03d}.png")
    build_shards(f"folder:{folder}/images", uri, samples_per_shard=samples_per_shard, on="here")


@pytest.fixture(scope="module")
def few(local_stack, tmp_path_factory):
    """A folder with the same 4 shards of two chunks each that lie at FEW."""
    forkserver.ensure_running()  # with the server's address, which later tests expect of it
    folder = tmp_path_factory.mktemp("few")
    build(folder, f"{folder}/set", FEW_SAMPLES, FEW_SAMPLES // FEW_SHARDS)
    storage.upload_folder(folder / "set", FEW)
    dataset = ShardDataset.open(FEW)
    assert len(dataset.index.shards) == FEW_SHARDS
    assert len(dataset.chunks.count) == 2 * FEW_SHARDS
    yield folder / "set"
    storage.delete(FOLDER)


@pytest.fixture(scope="module")
def many(few, tmp_path_factory):
    build(tmp_path_factory.mktemp("many"), MANY, MANY_SAMPLES, MANY_SAMPLES // MANY_SHARDS)
    return ShardDataset.open(MANY)


@pytest.fixture(scope="module")
def running_proxy(local_stack):
    with FaultProxy(local_stack["AWS_ENDPOINT_URL"]) as proxy:
        yield proxy


@pytest.fixture
def proxy(few, running_proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", running_proxy.url)
    running_proxy.clear()
    return running_proxy


@pytest.fixture
def copy(few):
    """A copy of the few shards, to be damaged."""
    storage.upload_folder(few, COPY)
    yield COPY
    storage.delete(COPY)


def open_loader(uri, cache_dir, **options):
    return ShardDataset.open(uri).loader(16, seed=3, cache_dir=cache_dir, **options)


def assert_right(loader, keys):
    """An epoch of these keys in batches, each with its pixels."""
    batches = list(loader)
    assert [batch.key for batch in batches] == keys
    assert_pixels(batches)


def assert_pixels(batches):
    for batch in batches:
        for key, image in zip(batch.key, batch.image.numpy(), strict=True):
            assert (image.transpose(1, 2, 0) == draw(key)).all()


@pytest.fixture(scope="module")
def keys(few):
    """The keys of every batch, read from local files."""
    batches = [batch.key for batch in open_loader(str(few), None)]
    assert sorted(chain.from_iterable(batches)) == [
        f"{number:03d}" for number in range(FEW_SAMPLES)
    ]
    return batches


@pytest.fixture(scope="module")
def victim(few):
    """Key of the sample that is damaged, and a place in the middle of its image in its shard."""
    dataset = ShardDataset.open(str(few))
    place = dataset.columns()
    return dataset.keys[VICTIM], int(place.offset[VICTIM] + place.size[VICTIM] // 2)


def expect_error(loader, *parts, key=None, uri=f"{FEW}/{SHARD}"):
    with pytest.raises(ShardError) as caught:
        list(loader)
    message = str(caught.value)
    assert (caught.value.uri, caught.value.key) == (uri, key)
    assert message.count(uri) == 1
    assert "\n" not in message
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in message
    for part in parts:
        assert part in message


RECOVERED = {
    "busy for a while": lambda proxy: proxy.fail(TARS, 503, times=3),
    "errors for a while": lambda proxy: proxy.fail(TARS, 500, times=3),
    "throttled": lambda proxy: proxy.fail(TARS, 429, times=3, Retry_After="0"),
    "connections closed": lambda proxy: proxy.drop(TARS, times=3),
    "connections cut in mid-body": lambda proxy: proxy.cut(TARS, 20_000, times=3),
    "connections cut before the body": lambda proxy: proxy.cut(TARS, 0, times=3),
    "bodies shorter, and so announced": lambda proxy: proxy.truncate(TARS, 20_000, times=2),
}


class TestRecovered:
    @pytest.mark.parametrize("fault", RECOVERED)
    def test_transient_faults_cost_requests_only(self, proxy, keys, tmp_path, fault):
        RECOVERED[fault](proxy)
        assert_right(open_loader(FEW, tmp_path), keys)
        times = 2 if "shorter" in fault else 3
        assert proxy.requests(TARS) == FEW_SHARDS + times  # a shard is small: one request

    def test_a_byte_flipped_on_the_way_is_fetched_again(self, proxy, keys, victim, tmp_path):
        proxy.flip(f"*/{SHARD}", victim[1], times=1)
        assert_right(open_loader(FEW, tmp_path), keys)
        assert proxy.requests(TARS) == FEW_SHARDS + 1
        proxy.clear()
        assert_right(open_loader(FEW, tmp_path), keys)  # the damaged one is not in the cache
        assert proxy.requests(TARS) == 0

    @pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "deleted"])
    def test_damage_on_this_node_s_disk_is_healed(self, proxy, keys, victim, tmp_path, damage):
        assert_right(open_loader(FEW, tmp_path), keys)
        dataset = ShardDataset.open(FEW)
        chunk = int(dataset.chunks.of(np.array([VICTIM]))[0])
        sha256 = dataset.index.shards[1].sha256
        (path,) = (tmp_path / sha256[:32]).glob("*.chunk")
        start, end = map(int, path.stem.split("-"))
        assert start <= int(dataset.chunks.start[chunk]) < int(dataset.chunks.end[chunk]) <= end
        whole = path.read_bytes()
        if damage == "flipped":
            with path.open("r+b") as file:
                file.seek(victim[1] - start)
                file.write(bytes([whole[victim[1] - start] ^ 1]))
        elif damage == "deleted":
            path.unlink()
        else:
            os.truncate(path, 5000 if damage == "cut" else 0)
        proxy.clear()
        assert_right(open_loader(FEW, tmp_path), keys)
        assert proxy.requests(TARS) == 1
        assert proxy.bytes_sent(TARS) == end - start
        assert path.read_bytes() == whole


class TestRefused:
    def test_a_byte_that_is_always_flipped_names_shard_and_sample(self, proxy, victim, tmp_path):
        proxy.flip(f"*/{SHARD}", victim[1])
        expect_error(open_loader(FEW, tmp_path), "not those that the index", key=victim[0])

    def test_a_bad_sample_is_replaced_counted_and_not_fetched_for_ever(
        self, proxy, keys, victim, tmp_path, caplog
    ):
        proxy.flip(f"*/{SHARD}", victim[1])
        loader = open_loader(FEW, tmp_path, bad_samples="replace")
        expected = Counter(chain.from_iterable(keys))
        for _ in range(3):
            batches = list(loader)
            found = Counter(key for batch in batches for key in batch.key)
            (replacement,) = found - expected
            assert list(expected - found) == [victim[0]]
            assert replacement in ShardDataset.open(FEW).index.shards[1].keys
            assert_pixels(batches)
        assert set(loader.bad_samples) == {victim[0]}
        assert [record.message for record in caplog.records if victim[0] in record.message]
        assert proxy.requests(TARS) == FEW_SHARDS + 1

    @pytest.mark.parametrize("policy", ["fail", "replace"])
    @pytest.mark.parametrize("damage", ["cut to a half", "cut to a tenth", "emptied", "missing"])
    def test_a_shard_that_is_not_whole(self, copy, tmp_path, damage, policy):
        shard = f"{copy}/{SHARD}"
        data = storage.read_bytes(shard)
        storage.delete(shard)
        expected = "write it again"
        if damage == "missing":
            expected = "the shard is missing: write it again"
        elif damage == "emptied":
            storage.write_bytes(shard, b"")
            expected = "write it, or its index, again"
        else:
            storage.write_bytes(shard, data[: len(data) // (2 if "half" in damage else 10)])
        expect_error(open_loader(copy, tmp_path, bad_samples=policy), expected, uri=shard)

    @pytest.mark.parametrize("policy", ["fail", "replace"])
    @pytest.mark.parametrize("side", [48, 49, 8])
    def test_an_index_of_other_shards(self, few, copy, tmp_path, side, policy):
        """Of the same names: other images of the same size, of about it, and far smaller ones."""
        folder = tmp_path / "images"
        folder.mkdir()
        for number in range(FEW_SAMPLES):
            Image.fromarray(draw(number + 1000, side)).save(folder / f"{number:03d}.png")
        other = str(tmp_path / "other")
        count = FEW_SAMPLES // FEW_SHARDS
        build_shards(f"folder:{folder}", other, samples_per_shard=count, on="here")
        for number in range(FEW_SHARDS):
            name = f"shard-{number:06d}.tar"
            storage.upload(f"{other}/{name}", f"{copy}/{name}")
        with pytest.raises(ShardError, match=rf"^{copy}/shard-\d+\.tar") as caught:
            list(open_loader(copy, tmp_path / "cache", bad_samples=policy))
        assert "index" in str(caught.value)

    @pytest.mark.parametrize("fault", ["silent", "silent in mid-body", "a trickle", "busy"])
    def test_a_slow_server_ends_the_run_in_time(self, proxy, many, tmp_path, monkeypatch, fault):
        if fault == "a trickle":
            proxy.slow(TARS, 2000)
        elif fault == "busy":
            proxy.fail(TARS, 503)
        else:
            proxy.stall(TARS, -1 if fault == "silent" else 5000)
        monkeypatch.setattr(objects, "ATTEMPT_SECONDS", 0.3)
        hasty = functools.partial(storage.read_range, deadline_seconds=0.6)
        monkeypatch.setattr(storage, "read_range", hasty)
        started = time.monotonic()
        with pytest.raises(ShardError, match=r"shard-\d+\.tar: no answer at http.*is AWS_ENDPOINT"):
            list(open_loader(MANY, tmp_path))
        assert time.monotonic() - started < 5
        # What failed is not followed by requests for more shards, each to be waited for.
        asked = [shard for shard in many.index.shards if proxy.requests(f"*/{shard.name}")]
        assert len(asked) <= _FETCH_THREADS < MANY_SHARDS

    def test_a_cache_folder_of_another_user(self, few, tmp_path):
        folder = Path("/usr")  # root's
        if os.geteuid() == 0:
            folder = tmp_path / "theirs"
            folder.mkdir()
            os.chown(folder, 65534, 65534)
        before = sorted(folder.iterdir())
        with pytest.raises(ShardError, match=f"cache folder {folder} belongs to another user"):
            list(open_loader(FEW, folder))
        assert sorted(folder.iterdir()) == before

    def test_a_full_disk_names_the_folder_and_the_remedy(self, few, tmp_path):
        program = f"""
import resource, sys
from data_pipelines import ShardDataset, ShardError
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    list(ShardDataset.open({FEW!r}).loader(16, cache_dir=sys.argv[1]))
except ShardError as error:
    print(error)
"""
        child = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert f"cache folder {tmp_path}" in child.stdout, child.stderr
        for part in (f"{FEW}/shard-", "no space for", "data.cache_dir", "data.cache_bytes"):
            assert part in child.stdout
        assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".lock"}


def read_epoch(ranks, folders, epochs=1):
    """Every rank in a thread, with a loader and a cache of its own: the keys that they saw."""
    loaders = [
        ShardDataset.open(MANY).loader(24, rank, ranks, cache_dir=folder, tail="ragged")
        for rank, folder in enumerate(folders)
    ]
    with ThreadPoolExecutor(ranks) as threads:
        for _ in range(epochs):
            found = threads.map(lambda loader: [k for batch in loader for k in batch.key], loaders)
            yield sorted(key for keys in found for key in keys)


def count_bytes(dataset):
    return sum(shard.bytes for shard in dataset.index.shards)


class TestNetwork:
    @pytest.mark.parametrize("ranks", [1, 2, 4])
    def test_ranks_of_a_node_fetch_every_shard_once(self, proxy, many, tmp_path, ranks):
        fetched = []
        for found in read_epoch(ranks, [tmp_path] * ranks, epochs=2):
            assert found == sorted(many.keys)
            fetched.append(proxy.bytes_sent(TARS) - sum(fetched))
        assert 0.5 < fetched[0] / count_bytes(many) <= 1.02
        assert fetched[1] == 0

    @pytest.mark.parametrize("nodes", [2, 3, 4])
    def test_nodes_share_the_bytes(self, proxy, many, tmp_path, nodes):
        folders = [tmp_path / str(node) for node in range(nodes)]
        (found,) = read_epoch(nodes, folders)
        assert found == sorted(many.keys)
        assert 0.5 < proxy.bytes_sent(TARS) / count_bytes(many) <= 1.15

    def test_a_process_killed_in_mid_fetch_leaves_nothing_to_wait_for(self, proxy, few, tmp_path):
        proxy.slow(TARS, 60_000)  # a chunk takes a second
        killed = PROCESSES.Process(target=open_all, args=(FEW, tmp_path, proxy.url))
        killed.start()
        wait_until(lambda: proxy.requests(TARS) == 2)
        dataset, cache = open_cache(FEW, tmp_path)
        found = {}
        other = threading.Thread(
            target=lambda: found.update((c, bytes(cache.open(c))) for c in (1, *range(8)))
        )
        other.start()  # it waits for the second chunk, which the other process fetches
        other.join(0.1)
        assert not found
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        proxy.end_faults()
        other.join(20)
        for chunk, data in found.items():
            shard = few / dataset.index.shards[int(dataset.chunks.shard[chunk])].name
            start, end = int(dataset.chunks.start[chunk]), int(dataset.chunks.end[chunk])
            assert data == shard.read_bytes()[start:end]
        assert sorted(found) == list(range(8))
        sizes = dataset.chunks.end - dataset.chunks.start
        assert proxy.bytes_sent(TARS) <= sizes.sum() + sizes.max()
        assert len(list(tmp_path.rglob("*.chunk"))) == 8
        assert not list(tmp_path.rglob("*.part"))
        for path in tmp_path.glob("*.lock"):
            with path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_a_small_cache_of_two_processes_keeps_its_bound(self, proxy, many, tmp_path):
        sizes = many.chunks.end - many.chunks.start
        bound = int(sizes.sum()) // 3
        processes = [
            PROCESSES.Process(target=open_all, args=(MANY, tmp_path, proxy.url, bound, seed))
            for seed in (1, 2)
        ]
        for process in processes:
            process.start()
        most = 0
        while any(process.is_alive() for process in processes):
            most = max(most, measure(tmp_path))
            time.sleep(0.001)
        assert [process.exitcode for process in processes] == [0, 0]
        assert bound // 2 < most <= bound + 2 * sizes.max()
        assert measure(tmp_path) <= bound


def open_cache(uri, folder, capacity_bytes=2**30):
    dataset = ShardDataset.open(uri)
    base = Location.parse(uri)
    return dataset, ShardCache(base, dataset.index, dataset.chunks, folder, capacity_bytes)


def open_all(uri, folder, endpoint, capacity_bytes=2**30, seed=None):
    """A process that opens every chunk, in an order of its own where there is a seed."""
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    dataset, cache = open_cache(uri, folder, capacity_bytes)
    chunks = list(range(len(dataset.chunks.count)))
    if seed is not None:
        random.Random(seed).shuffle(chunks)
    for chunk in chunks:
        assert len(cache.open(chunk)) == dataset.chunks.end[chunk] - dataset.chunks.start[chunk]


def measure(folder):
    """Bytes of the chunks there now; files may go while they are counted."""
    total = 0
    for path in folder.rglob("*.chunk"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
