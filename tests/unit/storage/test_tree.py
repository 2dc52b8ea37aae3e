import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines import storage
from data_pipelines.build_shards import build_shards
from data_pipelines.building.sources import open_source
from data_pipelines.shards.intake import SourceFaults
from data_pipelines.storage.retries import StorageError
from data_pipelines.storage.tree import Tree

NOBODY = 65534


@pytest.fixture
def folder_of_nobody() -> Iterator[Path]:
    """A folder, and a process without root's right to list every folder."""
    folder = Path(tempfile.mkdtemp(prefix="efae-tree-"))
    folder.chmod(0o777)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        os.seteuid(user)
        for path in folder.rglob("*"):
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_files_and_what_is_none(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "cats").mkdir(parents=True)
    (root / "empty").mkdir()
    elsewhere.mkdir()
    (root / "cats/b").write_bytes(b"bb")
    (root / "a.txt").write_bytes(b"")
    (elsewhere / "dog").write_bytes(b"dog")
    (root / "dogs").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "cats")
    (root / "one").symlink_to(elsewhere / "dog")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "itself").symlink_to(root / "itself")
    (root / "cats/up").symlink_to(root)
    (elsewhere / "round").symlink_to(root / "dogs")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.jpg")).write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(root) + b"/d\xe9")).mkdir()
    tree = storage.list_tree(str(root))
    assert tree.files == {"a.txt": 0, "cats/b": 2, "dogs/dog": 3, "one": 3}
    assert list(tree.files) == sorted(tree.files)
    special = "named pipe, socket or device"
    assert tree.others == {
        "again": "link to a folder of the same tree",
        "caf\\xe9.jpg": "name that is not UTF-8",
        "cats/up": "link to a folder above it",
        "d\\xe9": "folder whose name is not UTF-8",
        "dogs/round": "link to a folder above it",
        "gone": "broken link",
        "itself": "broken link",
        "pipe": special,
        "socket": special,
    }
    assert storage.list_files(str(root)) == tree.files
    with pytest.raises(ValueError, match=r"cannot upload .*: again is a link"):
        storage.upload_folder(root, str(tmp_path / "copy"))


def test_nothing_there_is_an_empty_tree(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for name in ("missing", "file", "file/x"):
        assert storage.list_tree(str(tmp_path / name)) == Tree({}, {})


def test_a_folder_that_may_not_be_listed_is_named(folder_of_nobody):
    for name in ("seen", "hidden", "unsearchable", "lost+found"):
        (folder_of_nobody / name).mkdir()
        (folder_of_nobody / name / "x").write_bytes(b"x")
    (folder_of_nobody / "link").symlink_to(folder_of_nobody / "hidden/x")
    (folder_of_nobody / "hidden").chmod(0)
    (folder_of_nobody / "unsearchable").chmod(0o400)
    (folder_of_nobody / "lost+found").chmod(0)
    tree = storage.list_tree(str(folder_of_nobody))
    closed = "folder that may not be listed"
    assert tree.files == {"seen/x": 1}
    assert tree.others == {
        "hidden": closed,
        "link": "link to what may not be read",
        "lost+found": closed,
        "unsearchable": closed,
    }
    with pytest.raises(StorageError, match=r"hidden, .*unsearchable may not be listed: allow"):
        storage.list_files(str(folder_of_nobody))
    (folder_of_nobody / "hidden").chmod(0o700)
    (folder_of_nobody / "unsearchable").chmod(0o700)
    assert set(storage.list_files(str(folder_of_nobody))) == {
        *("hidden/x", "link", "seen/x", "unsearchable/x")
    }


def test_a_tar_or_an_image_that_may_not_be_read_is_a_fault(folder_of_nobody):
    for name in ("a.png", "b.png", "c.tar"):
        (folder_of_nobody / name).write_bytes(b"x")
        (folder_of_nobody / name).chmod(0)
    for source, faults in (
        ("folder", [f"{folder_of_nobody}/{name}.png: may not be read" for name in "ab"]),
        ("wds", ["c.tar may not be read"]),
    ):
        with pytest.raises(SourceFaults) as error:
            build_shards(f"{source}:{folder_of_nobody}", f"{folder_of_nobody}/{source}")
        assert sorted(error.value.faults) == [f"{fault} (Permission denied)" for fault in faults]


def test_a_folder_whose_name_is_not_utf8_is_a_fault_even_with_a_dot(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/St. \xc9tienne")).mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.tar").write_bytes(b"x")
    listed = f"{tmp_path}/St. \\xc9tienne: folder whose name is not UTF-8"
    assert open_source(f"folder:{tmp_path}").faults == [listed]
    with pytest.raises(SourceFaults) as error:
        open_source(f"wds:{tmp_path}")
    assert error.value.faults == [listed]


def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for action in (
        lambda: storage.read_bytes(str(pipe)),
        lambda: storage.read_range(str(pipe), 0, 1),
        lambda: storage.download(str(pipe), tmp_path / "copy"),
        lambda: storage.upload(pipe, str(tmp_path / "copy")),
    ):
        with pytest.raises(StorageError, match=r"pipe is a named pipe: copy its content to a file"):
            action()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_folder_is_no_object(tmp_path):
    for uri in ("s3://bucket/x", str(tmp_path / "x")):
        with pytest.raises(IsADirectoryError, match=r"cannot upload .* it is a folder"):
            storage.upload(tmp_path, uri)
