"""Storage and shards on real S3: operations, shared caches, damage and checks."""

import hashlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from data_pipelines import ShardDataset, ShardError, storage
from data_pipelines.build_shards import build_shards
from data_pipelines.build_shards import main as build
from data_pipelines.storage.retries import StorageError
from data_pipelines.verify_shards import find_faults
from data_pipelines.verify_shards import main as verify

pytestmark = pytest.mark.s3
BUCKET = "s3://efae-data"


@pytest.fixture(scope="module")
def s3_endpoint(local_stack):
    """The S3 server's URL; clients find it, and their keys, in the environment."""
    yield local_stack["AWS_ENDPOINT_URL"]
    for folder in ("numbers", "damaged", "damaged.bin", "threads", "preflight"):
        storage.delete(f"{BUCKET}/{folder}")


def test_every_operation_round_trips(s3_endpoint, tmp_path):
    uri = f"{BUCKET}/storage/a.bin"
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    assert storage.exists(uri)
    storage.write_bytes(uri, b"three")
    assert storage.read_bytes(uri) == b"three"
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/b.txt").write_bytes(b"bb")
    (tmp_path / "in/c.txt").write_bytes(b"")
    storage.upload_folder(tmp_path / "in", f"{BUCKET}/storage/folder")
    assert storage.list_files(f"{BUCKET}/storage") == {
        "a.bin": 5,
        "folder/c.txt": 0,
        "folder/deep/b.txt": 2,
    }
    storage.download_folder(f"{BUCKET}/storage/folder", tmp_path / "out")
    assert (tmp_path / "out/deep/b.txt").read_bytes() == b"bb"
    digest = hashlib.sha256(b"three").hexdigest()
    storage.download(uri, tmp_path / "a.bin", expected_bytes=5, sha256=digest)
    assert (tmp_path / "a.bin").read_bytes() == b"three"
    storage.delete(f"{BUCKET}/storage")
    storage.delete(f"{BUCKET}/storage")
    assert storage.list_files(f"{BUCKET}/storage") == {}
    assert not storage.exists(f"{BUCKET}/storage")


def test_a_download_of_other_content_is_refused_and_leaves_no_file(s3_endpoint, tmp_path):
    uri = f"{BUCKET}/damaged.bin"
    storage.write_bytes(uri, b"other")
    with pytest.raises(StorageError, match="sha256 is"):
        storage.download(uri, tmp_path / "x", sha256="0" * 64, deadline_seconds=0.5)
    with pytest.raises(StorageError, match="5 bytes arrived, 6 expected"):
        storage.download(uri, tmp_path / "x", expected_bytes=6, deadline_seconds=0.5)
    assert list(tmp_path.iterdir()) == []


def test_many_threads_share_the_client(s3_endpoint):
    uris = [f"{BUCKET}/threads/{i}" for i in range(32)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda uri: storage.write_bytes(uri, uri.encode()), uris))
        assert list(threads.map(storage.read_bytes, uris)) == [uri.encode() for uri in uris]


@pytest.fixture(scope="module")
def shards(s3_endpoint, tmp_path_factory):
    """40 images in 8 shards on S3; image n is all n."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(40):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"n{number:02d}.png")
    uri = f"{BUCKET}/numbers"
    build_shards(f"folder:{folder}", uri, samples_per_shard=5)
    assert "nothing to do" in build_shards(f"folder:{folder}", uri, samples_per_shard=5)
    return uri


class TestShards:
    def test_are_sound_and_leave_nothing_else(self, shards):
        assert list(find_faults(shards)) == []
        names = [f"shard-{number:06d}.tar" for number in range(8)]
        beside = ["contact_sheet.png", "index.json", "statistics.json"]
        assert list(storage.list_files(shards)) == sorted([*beside, *names])

    def test_ranks_that_share_a_cache_see_every_image_once(self, shards, tmp_path):
        dataset = ShardDataset.open(shards)

        def read(rank):
            loader = dataset.loader(8, rank, 4, cache_dir=tmp_path)
            return [pair for batch in loader for pair in zip(batch.key, batch.image, strict=True)]

        with ThreadPoolExecutor(4) as ranks:
            pairs = [pair for rank in ranks.map(read, range(4)) for pair in rank]
        assert sorted(key for key, _ in pairs) == sorted(dataset.keys)
        assert all((image == int(key[1:])).all() for key, image in pairs)
        cached = {path.parent.name for path in tmp_path.rglob("*.chunk")}
        assert cached == {shard.sha256[:32] for shard in dataset.index.shards}

    def test_a_small_cache_stays_within_its_bound(self, shards, tmp_path):
        dataset = ShardDataset.open(shards)
        bound = 3 * max(shard.bytes for shard in dataset.index.shards)
        keys = []
        for batch in dataset.loader(2, cache_dir=tmp_path, cache_bytes=bound):
            keys += batch.key
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.chunk")) <= bound
        assert sorted(keys) == sorted(dataset.keys)
        with pytest.raises(ValueError, match="cache_bytes=100 is less than the largest piece"):
            dataset.loader(2, cache_dir=tmp_path, cache_bytes=100)

    def test_damage_on_storage_is_noticed_and_named(self, shards, tmp_path):
        copy = f"{BUCKET}/damaged"
        storage.download_folder(shards, tmp_path / "set")
        data = bytearray((tmp_path / "set/shard-000003.tar").read_bytes())
        data[530] ^= 1  # in the first image
        (tmp_path / "set/shard-000003.tar").write_bytes(data)
        storage.upload_folder(tmp_path / "set", copy)
        with pytest.raises(ShardError, match=r"damaged/shard-000003\.tar, sample 'n\d\d': .*bytes"):
            list(ShardDataset.open(copy).loader(4, cache_dir=tmp_path / "cache"))
        assert any("shard-000003.tar" in fault for fault in find_faults(copy))

    def test_a_missing_set_says_what_to_do(self, s3_endpoint):
        with pytest.raises(ValueError, match=r"build_shards --source SOURCE --output s3://"):
            ShardDataset.open(f"{BUCKET}/nothing-here")


def test_the_commands_give_up_within_seconds(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
    started = time.monotonic()
    for command, arguments in (
        (build, ["--source", "mnist", "--output", f"{BUCKET}/x"]),
        (verify, [f"{BUCKET}/x"]),
    ):
        with pytest.raises(SystemExit, match="is AWS_ENDPOINT_URL right"):
            command(arguments)
    assert time.monotonic() - started < 16


class TestPreflight:
    def test_passes_where_it_should(self, s3_endpoint):
        storage.check_writable(f"{BUCKET}/new-folder")
        storage.write_bytes(f"{BUCKET}/preflight/x", b"x")
        storage.check_readable(f"{BUCKET}/preflight")
        assert storage.list_files(f"{BUCKET}/new-folder") == {}

    @pytest.mark.parametrize("check", [storage.check_readable, storage.check_writable])
    def test_missing_bucket(self, s3_endpoint, check):
        self.expect(check, "s3://no-such-bucket/x", s3_endpoint, "create bucket 'no-such-bucket'")

    @pytest.mark.parametrize("check", [storage.check_readable, storage.check_writable])
    def test_wrong_secret(self, s3_endpoint, check, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        self.expect(check, f"{BUCKET}/x", s3_endpoint, "AWS_SECRET_ACCESS_KEY")

    @pytest.mark.parametrize("check", [storage.check_readable, storage.check_writable])
    def test_nobody_listens(self, s3_endpoint, check, monkeypatch):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        self.expect(check, f"{BUCKET}/x", endpoint, "is AWS_ENDPOINT_URL right")

    @pytest.mark.parametrize("check", [storage.check_readable, storage.check_writable])
    def test_listens_but_never_answers(self, s3_endpoint, check, monkeypatch):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            self.expect(check, f"{BUCKET}/x", endpoint, "is AWS_ENDPOINT_URL right")

    @staticmethod
    def expect(check, uri, endpoint, remedy):
        started = time.monotonic()
        with pytest.raises(StorageError) as caught:
            check(uri)
        assert time.monotonic() - started < 8
        message = str(caught.value)
        assert "\n" not in message
        for part in (uri, endpoint, remedy):
            assert part in message
        assert "wrong-secret" not in message
