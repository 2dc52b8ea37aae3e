"""Chunks and their cache, on local files and on a local HTTP server of them."""

import contextlib
import functools
import os
import resource
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.loading.shard_cache import ShardCache, ShardError
from data_pipelines.shards.chunks import LARGEST_BYTES, cut_chunks
from data_pipelines.shards.index import Members, Shard, ShardIndex
from data_pipelines.storage import Location

HEADER = 512


def make_shard(name, image_sizes, label_size=3):
    """A shard with an image and a label in each sample, laid out as in a tar."""
    label_offset = np.zeros(len(image_sizes), np.int64)
    image_offset = np.zeros(len(image_sizes), np.int64)
    end = 0
    for row, size in enumerate(image_sizes):
        label_offset[row] = end + HEADER
        image_offset[row] = end + HEADER + 512 + HEADER
        end = int(image_offset[row]) + -(-size // 512) * 512
    sizes = np.array(image_sizes, np.int64)
    none = np.zeros(len(sizes), np.int64)
    members = {
        "cls": Members(label_offset, none + label_size, none),
        "png": Members(image_offset, sizes, none),
    }
    keys = [f"{name}-{row}" for row in range(len(sizes))]
    return Shard(name, end + 1024, name.encode().hex().ljust(64, "0"), keys, members)


def make_index(shards):
    return ShardIndex(
        tuple(make_shard(f"s{number}.tar", sizes) for number, sizes in enumerate(shards)), None
    )


SIZES = st.one_of(st.integers(1, 5000), st.integers(1, 2**20), st.integers(1, 3 * LARGEST_BYTES))
SHARDS = st.lists(st.lists(SIZES, max_size=60), max_size=12)


class TestCutting:
    @given(SHARDS)
    def test_every_sample_is_in_one_chunk_of_its_shard_in_order(self, sizes):
        index = make_index(sizes)
        chunks = cut_chunks(index)
        assert (chunks.count > 0).all()
        ends = np.cumsum(chunks.count)
        assert chunks.first.tolist() == (ends - chunks.count).tolist()
        samples = np.arange(sum(len(shard.keys) for shard in index.shards))
        of = chunks.of(samples)
        assert of.tolist() == np.repeat(np.arange(len(ends)), chunks.count).tolist()
        owner = [number for number, shard in enumerate(index.shards) for _ in shard.keys]
        assert chunks.shard[of].tolist() == owner

    @given(SHARDS)
    def test_a_chunk_holds_its_samples_and_no_more_than_it_must(self, sizes):
        index = make_index(sizes)
        chunks = cut_chunks(index)
        spans = [shard.span() for shard in index.shards if shard.keys]
        start = np.concatenate([np.zeros(0, np.int64), *(span[0] for span in spans)])
        end = np.concatenate([np.zeros(0, np.int64), *(span[1] for span in spans)])
        for row, (first, count) in enumerate(zip(chunks.first, chunks.count, strict=True)):
            samples = slice(first, first + count)
            assert chunks.start[row] == start[samples].min()
            assert chunks.end[row] == end[samples].max()
            # Without its last sample it is within the bound: a large sample may stick out.
            assert start[first + count - 1] - chunks.start[row] < LARGEST_BYTES
        bounds = [shard.bytes for shard in index.shards]
        assert (chunks.end <= np.array(bounds, np.int64)[chunks.shard]).all()

    @given(SHARDS, st.data())
    def test_neighbours_are_the_largest_wanted_run_that_is_within_the_bound(self, sizes, data):
        chunks = cut_chunks(make_index(sizes))
        total = len(chunks.count)
        if not total:
            return
        chunk = data.draw(st.integers(0, total - 1))
        among = data.draw(st.sets(st.integers(0, total - 1))) | {chunk}
        run = chunks.neighbours(chunk, among)
        assert chunk in run
        assert run == list(range(run[0], run[-1] + 1))
        assert set(run) <= among

        def fits(first, last):
            same = first >= 0 and last < total and chunks.shard[first] == chunks.shard[last]
            return same and chunks.end[last] - chunks.start[first] <= LARGEST_BYTES

        assert run == [chunk] or fits(run[0], run[-1])
        for longer in ((run[0] - 1, run[-1]), (run[0], run[-1] + 1)):
            assert not (fits(*longer) and set(range(longer[0], longer[1] + 1)) <= among)


class QuietServer(SimpleHTTPRequestHandler):
    """Serves a folder and knows no ranges: storage cuts them out."""

    def log_message(self, format, *args):
        pass


@pytest.fixture
def tars(tmp_path, request):
    """8 shards, of bytes that differ, in 2 chunks each, or in 7 where the parameter is 80.

    Where it is "many", 40 shards in 2 chunks each.
    """
    param = getattr(request, "param", 20)
    samples, number = (20, 40) if param == "many" else (param, 8)
    index = make_index([[9000] * samples] * number)
    assert len(cut_chunks(index).count) == (7 if samples == 80 else 2) * number
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, shard in enumerate(index.shards):
        data = np.random.default_rng(number).integers(0, 256, shard.bytes, np.uint8)
        (folder / shard.name).write_bytes(data.tobytes())
    return folder, index


@pytest.fixture
def open_cache(tars, tmp_path):
    """Makes caches of the set behind an HTTP server, each as in a process of its own."""
    folder, index = tars
    handler = functools.partial(QuietServer, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    base = Location.parse(f"http://127.0.0.1:{server.server_address[1]}")

    def open_one(capacity_chunks=100):
        chunks = cut_chunks(index)
        capacity = capacity_chunks * int((chunks.end - chunks.start).max())
        return ShardCache(base, index, chunks, tmp_path / "cache", capacity)

    yield open_one
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.contextmanager
def few_open_files():
    """The limit from which a cache that is made here derives its number of mappings, 16."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def count_open_files(folder):
    """How many descriptors this process has of files below the folder; not the server's sockets."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += str(descriptor.readlink()).startswith(f"{folder}/")
    return found


def expected(tars, chunk):
    folder, index = tars
    chunks = cut_chunks(index)
    data = (folder / f"s{chunks.shard[chunk]}.tar").read_bytes()
    return data[chunks.start[chunk] : chunks.end[chunk]]


def list_chunks(tmp_path, tars):
    """Numbers of the chunks that the cache folder holds."""
    chunks = cut_chunks(tars[1])
    names = {f"{path.parent.name}/{path.name}" for path in (tmp_path / "cache").rglob("*.chunk")}
    numbers = {
        f"{tars[1].shards[shard].sha256[:32]}/{start}-{end}.chunk": number
        for number, (shard, start, end) in enumerate(
            zip(chunks.shard, chunks.start, chunks.end, strict=True)
        )
    }
    return {numbers[name] for name in names}


def name_files(tmp_path, tars):
    chunks = cut_chunks(tars[1])
    rows = zip(chunks.shard, chunks.start, chunks.end, strict=True)
    return [
        tmp_path / "cache" / tars[1].shards[shard].sha256[:32] / f"{start}-{end}.chunk"
        for shard, start, end in rows
    ]


class TestRemote:
    def test_opens_every_chunk_and_holds_it(self, open_cache, tars, tmp_path):
        cache = open_cache()
        for chunk in (5, 0, 15):
            assert not cache.holds(chunk)
            assert cache.open(chunk) == expected(tars, chunk)
            assert cache.holds(chunk)
        assert [bytes(data) for data in cache.fetch([4, 5])] == [expected(tars, c) for c in (4, 5)]
        assert list_chunks(tmp_path, tars) == {0, 4, 5, 15}
        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("tars", [80], indirect=True)
    def test_a_file_is_of_one_request_and_serves_each_of_its_chunks(
        self, open_cache, tars, tmp_path
    ):
        open_cache().open(2)
        whole = [expected(tars, chunk) for chunk in range(7)]
        assert open_cache().fetch(range(7)) == whole
        files = sorted((tmp_path / "cache").rglob("*.chunk"))
        assert len(files) == 3  # chunks 0 and 1, 2, and 3 to 6
        other = open_cache()
        assert [other.open(chunk) for chunk in (5, 0, 2)] == [whole[chunk] for chunk in (5, 0, 2)]
        assert other.fetch(range(1, 6)) == whole[1:6]
        assert sorted((tmp_path / "cache").rglob("*.chunk")) == files

    @pytest.mark.parametrize("tars", [80], indirect=True)
    def test_fetching_again_keeps_what_lay_beside_the_damage(self, open_cache, tars, tmp_path):
        open_cache().fetch(range(7))
        (path,) = (tmp_path / "cache").rglob("*.chunk")
        whole = path.read_bytes()
        path.write_bytes(bytes(len(whole)))
        cache = open_cache()
        cache.fetch(range(7))
        assert cache.refetch(3) == expected(tars, 3)
        assert list((tmp_path / "cache").rglob("*.chunk")) == [path]
        assert path.read_bytes() == whole
        assert cache.open(6) == expected(tars, 6)

    def test_the_least_recently_opened_goes_first(self, open_cache, tars, tmp_path):
        cache = open_cache(capacity_chunks=4)
        files = name_files(tmp_path, tars)
        for age, chunk in enumerate((2, 0, 3, 1)):
            cache.open(chunk)
            os.utime(files[chunk], (age, age))
        other = open_cache(capacity_chunks=4)
        other.open(2)  # as another rank does
        for chunk in (8, 9):
            other.open(chunk)
        assert list_chunks(tmp_path, tars) <= {1, 2, 3, 8, 9}
        assert {2, 8, 9} <= list_chunks(tmp_path, tars)

    def test_an_evicted_chunk_is_still_read_where_it_was_open(self, open_cache, tars, tmp_path):
        cache = open_cache(capacity_chunks=2)
        first = cache.open(0)
        for chunk in range(1, 16):
            cache.open(chunk)
        assert 0 not in list_chunks(tmp_path, tars)
        assert first == expected(tars, 0)
        assert not cache.holds(0)  # its disk space is free again when nobody reads it
        assert cache.open(0) == expected(tars, 0)

    @pytest.mark.parametrize("tars", [80], indirect=True)
    def test_the_bound_holds_when_the_ranks_take_turns(self, open_cache, tars, tmp_path):
        """Each opens a chunk; one opens all while the others rest; then these open some more."""
        bound = 32
        ranks = [open_cache(capacity_chunks=bound) for _ in range(8)]
        for number, rank in enumerate(ranks):
            rank.open(number)
        for chunk in range(56):
            ranks[0].open(chunk)
        for number, rank in enumerate(ranks[1:]):
            for chunk in range(3 * number, 3 * number + 3):
                assert rank.open(chunk) == expected(tars, chunk)
                assert len(list_chunks(tmp_path, tars)) <= bound + 1

    def test_a_rank_lets_go_of_what_another_evicted(self, open_cache, tars, tmp_path):
        idle, busy = open_cache(capacity_chunks=4), open_cache(capacity_chunks=4)
        idle.open(0)
        for chunk in range(1, 16):
            busy.open(chunk)
        assert 0 not in list_chunks(tmp_path, tars)
        idle.open(1)
        assert not idle.holds(0)

    @pytest.mark.parametrize("content", [b"", b"12", bytes(9), b"\xff"])
    def test_an_account_that_was_lost_is_made_again(self, open_cache, tars, tmp_path, content):
        cache = open_cache(capacity_chunks=4)
        for chunk in range(16):
            assert cache.open(chunk) == expected(tars, chunk)
            (tmp_path / "cache/evict.lock").write_bytes(content)
            assert len(list_chunks(tmp_path, tars)) <= 4

    def test_downloads_that_were_abandoned_are_removed(self, open_cache, tmp_path):
        folder = tmp_path / "cache" / ("ab" * 16)
        folder.mkdir(parents=True)
        old, new = folder / "x.1.2.part", folder / "x.3.4.part"
        for path, age in ((old, 7200), (new, 60)):
            path.write_bytes(b"half")
            os.utime(path, (time.time() - age, time.time() - age))
        open_cache().open(0)
        assert not old.exists()
        assert new.exists()

    @pytest.mark.parametrize("damage", [b"", b"short"])
    def test_a_file_of_another_size_is_fetched_again(self, open_cache, tars, tmp_path, damage):
        open_cache().open(3)
        (path,) = (tmp_path / "cache").rglob("*.chunk")
        path.write_bytes(damage)
        assert open_cache().open(3) == expected(tars, 3)
        assert path.read_bytes() == expected(tars, 3)

    def test_fetches_again_what_is_damaged(self, open_cache, tars, tmp_path):
        open_cache().open(3)
        (path,) = (tmp_path / "cache").rglob("*.chunk")
        path.write_bytes(bytes(path.stat().st_size))
        cache = open_cache()
        assert cache.open(3) == bytes(path.stat().st_size)
        assert cache.refetch(3) == expected(tars, 3)
        assert cache.open(3) == expected(tars, 3)

    @pytest.mark.parametrize("tars", [80], indirect=True)
    def test_keeps_few_files_open(self, open_cache, tars, tmp_path):
        with few_open_files():
            cache = open_cache()
        for chunk in [*range(56), *range(56)]:
            assert cache.open(chunk) == expected(tars, chunk)
            assert cache.open(0) == expected(tars, 0)
            assert cache.holds(chunk)
            assert cache.holds(0)
            assert count_open_files(tmp_path / "cache") <= 16

    def test_leaves_few_lock_files(self, open_cache, tmp_path):
        cache = open_cache()
        for chunk in range(16):
            cache.open(chunk)
        assert len(list((tmp_path / "cache").glob("*.lock"))) <= 17

    def test_a_missing_shard_says_what_to_do(self, open_cache, tars):
        (tars[0] / "s2.tar").unlink()
        with pytest.raises(ShardError, match=r"^http://[^ ]*/s2\.tar: the shard is missing: write"):
            open_cache().open(4)

    def test_threads_fetch_a_chunk_once(self, open_cache, tars, tmp_path):
        caches = [open_cache() for _ in range(4)]
        started = threading.Barrier(8)
        found = []

        def read(cache):
            started.wait()
            found.append([bytes(cache.open(chunk)) for chunk in (2, 3, 2)])

        threads = [threading.Thread(target=read, args=(cache,)) for cache in caches * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [[expected(tars, chunk) for chunk in (2, 3, 2)]] * 8
        assert list_chunks(tmp_path, tars) == {2, 3}


class TestLocal:
    def test_maps_the_shards_where_they_lie(self, tars, tmp_path):
        folder, index = tars
        chunks = cut_chunks(index)
        cache = ShardCache(Location.parse(folder), index, chunks, tmp_path / "cache", 0)
        assert cache.local
        for chunk in range(16):
            assert cache.open(chunk) == expected(tars, chunk)
        assert not (tmp_path / "cache").exists()

    def test_refetching_reads_the_file_again_and_leaves_it(self, tars):
        folder, index = tars
        cache = ShardCache(Location.parse(folder), index, cut_chunks(index), None, 0)
        before = bytes(cache.open(0))
        path = folder / "s0.tar"
        path.rename(folder / "old")
        path.write_bytes(bytes(index.shards[0].bytes))
        assert cache.open(0) == before
        assert cache.refetch(0) == bytes(len(before))
        assert path.exists()

    def test_a_shard_is_one_open_file_whatever_its_chunks(self, tars):
        folder, index = tars
        cache = ShardCache(Location.parse(folder), index, cut_chunks(index), None, 0)
        views = [cache.open(chunk) for chunk in range(16)]
        assert count_open_files(folder) == 8
        assert views == [expected(tars, chunk) for chunk in range(16)]

    @pytest.mark.parametrize("tars", ["many"], indirect=True)
    def test_keeps_few_shards_open(self, tars):
        folder, index = tars
        with few_open_files():
            cache = ShardCache(Location.parse(folder), index, cut_chunks(index), None, 0)
        for chunk in [*range(80), *range(80)]:
            assert cache.open(chunk) == expected(tars, chunk)
            assert count_open_files(folder) <= 16

    def test_a_shard_of_another_size_or_none_is_named(self, tars):
        folder, index = tars
        cache = ShardCache(Location.parse(folder), index, cut_chunks(index), None, 0)
        (folder / "s1.tar").write_bytes(b"short")
        (folder / "s2.tar").unlink()
        with pytest.raises(ShardError, match=r"s1\.tar: 5 bytes, the index says \d+.*write it"):
            cache.open(2)
        with pytest.raises(ShardError, match=r"s2\.tar: the shard is missing: write it again"):
            cache.open(4)
