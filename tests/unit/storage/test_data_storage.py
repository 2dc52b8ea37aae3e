import hashlib
import sys

import pytest

from data_pipelines import storage
from data_pipelines.storage import Location
from data_pipelines.storage.retries import StorageError


@pytest.mark.parametrize("uri", ["pipe:cat /etc/passwd", "ftp://host/x", "memory://x", "S3X://b"])
def test_other_schemes_are_refused(uri):
    for operation in (storage.read_bytes, storage.exists, storage.list_files, storage.delete):
        with pytest.raises(
            ValueError, match="is refused; use a file path, file://, s3://"
        ) as error:
            operation(uri)
        assert repr(uri) in str(error.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("S3://bucket/x", r"'S3://bucket/x': write s3: in lower case"),
        ("HTTPS://host/x", r"write https: in lower case"),
        ("s3:/bucket/x", r"'s3:/bucket/x': write s3:// with two slashes"),
        ("s3:bucket/x", r"write s3:// with two slashes"),
        ("photos:2024/x", r"a file of this name is './photos:2024/x'"),
        ("s3://bucket/a/../x", r"take \. and \.\. out of it"),
        ("s3://bucket/" + "n" * 1025, r"the name has 1025 bytes, s3:// takes 1024"),
        ("s3://bucket/caf\udce9", r"not UTF-8: rename it"),
        ("a\0b", r"zero byte"),
    ],
)
def test_what_no_storage_takes_is_refused_with_a_remedy(uri, message):
    for operation in (storage.read_bytes, storage.exists, storage.list_files, storage.delete):
        with pytest.raises(ValueError, match=message):
            operation(uri)


def test_a_whole_bucket_is_not_deleted():
    for uri in ("s3://bucket", "gs://bucket/"):
        with pytest.raises(ValueError, match="is a whole bucket: name a folder in it"):
            storage.delete(uri)


def test_a_long_name_has_room_for_its_temporary_neighbour(tmp_path):
    for name in ("x" * 255, "\u00e9" * 127):
        storage.write_bytes(str(tmp_path / name), b"x")
        assert storage.list_files(str(tmp_path)) == {name: 1}
        storage.delete(str(tmp_path / name))


@pytest.mark.parametrize("scheme", ["s3", "https", "ftp", "file"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(scheme):
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as error:
        storage.read_bytes(f"{scheme}://someone:hunter2@host/x")
    assert "hunter2" not in str(error.value)
    assert "someone" not in str(error.value)


def test_local_files_round_trip(tmp_path):
    for root in (str(tmp_path / "plain"), f"file://{tmp_path}/scheme"):
        uri = Location.parse(root) / "a/b.bin"
        assert not storage.exists(uri)
        storage.write_bytes(uri, b"x")
        storage.write_bytes(uri, b"content")
        assert storage.read_bytes(uri) == b"content"
        storage.write_bytes(Location.parse(root) / "c", b"")
        assert storage.list_files(root) == {"a/b.bin": 7, "c": 0}
        storage.upload_folder(tmp_path / root.rsplit("/")[-1], f"{root}-copy")
        storage.download_folder(f"{root}-copy", tmp_path / "back")
        assert (tmp_path / "back/a/b.bin").read_bytes() == b"content"
        storage.check_readable(root)
        storage.check_writable(root)
        assert storage.list_files(root) == {"a/b.bin": 7, "c": 0}
        storage.delete(root)
        storage.delete(root)
        assert storage.list_files(root) == {}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(str(path), "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_download_appears_whole_or_not_at_all(tmp_path):
    source, target = tmp_path / "source", tmp_path / "folder/target"
    source.write_bytes(b"content")
    for wrong in ({"expected_bytes": 8}, {"sha256": "0" * 64}):
        with pytest.raises(StorageError, match="expected"):
            storage.download(str(source), target, deadline_seconds=0.05, **wrong)
        assert list(target.parent.iterdir()) == []
    sha256 = hashlib.sha256(b"content").hexdigest()
    storage.download(str(source), target, expected_bytes=7, sha256=sha256)
    assert target.read_bytes() == b"content"


def test_a_range_of_a_file_is_all_of_it_or_an_error(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    for uri in (str(tmp_path / "file"), f"file://{tmp_path}/file"):
        assert storage.read_range(uri, 0, 100) == bytes(range(100))
        assert storage.read_range(uri, 3, 9) == bytes(range(3, 9))
        assert storage.read_range(uri, 100, 100) == b""
        with pytest.raises(StorageError, match="file: 10 bytes arrived, 11 expected from 90 on"):
            storage.read_range(uri, 90, 101)
        for start, end in ((-1, 5), (5, 4)):
            with pytest.raises(ValueError, match="no range"):
                storage.read_range(uri, start, end)


def test_a_scheme_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for read in (storage.read_bytes, lambda uri: storage.read_range(uri, 0, 9)):
        with pytest.raises(StorageError, match="gs:// needs `pip install gcsfs`"):
            read("gs://bucket/x")


def test_missing_things_are_named(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        storage.read_range(missing, 0, 9)
    with pytest.raises(FileNotFoundError, match="missing"):
        storage.read_bytes(missing)
    with pytest.raises(StorageError, match="missing does not exist"):
        storage.check_readable(missing)
    with pytest.raises(FileNotFoundError, match="missing does not exist or is empty"):
        storage.download_folder(missing, tmp_path / "x")


def test_a_folder_that_cannot_be_made_is_not_writable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/x cannot be written"):
        storage.check_writable(str(tmp_path / "file/x"))
