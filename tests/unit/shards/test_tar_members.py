"""Members are read as GNU tar and Python's tarfile extract them, or they are named."""

import io
import os
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from data_pipelines.shards.tar_members import TarContent, read_members, split_name

DATA = Path(__file__).parents[2] / "data"
LONG = f"{'l' * 60}/{'m' * 80}.jpg"
CONTENTS = {
    name: random.Random(size).randbytes(size)
    for name, size in {"a.jpg": 700, "sub/b.png": 512, "größe.jpg": 30, "c.txt": 0}.items()
}
SPARSE = b"\0" * 4096 + b"x" * 100 + b"\0" * 12188


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of `CONTENTS`, one under a long name, one with holes, a hard and a symbolic link."""
    folder = tmp_path / "tree"
    for name, data in {**CONTENTS, LONG: b"long" * 200}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with (folder / "sparse.jpg").open("wb") as file:
        file.seek(4096)
        file.write(b"x" * 100)
        file.truncate(len(SPARSE))
    (folder / "first.jpg").write_bytes(b"linked")
    (folder / "second.jpg").hardlink_to(folder / "first.jpg")
    (folder / "soft.jpg").symlink_to("a.jpg")
    return folder


def extract_with_gnu_tar(path: Path, folder: Path) -> dict[str, bytes]:
    """{name: bytes} of all that lies in `folder` afterwards but symbolic links."""
    folder.mkdir()
    command = ["tar", "--no-same-owner", "-xf", path, "-C", folder]
    subprocess.run(command, check=True, capture_output=True)
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in files
        if not file.is_symlink()
    }


def extract_with_python(path: Path) -> dict[str, bytes]:
    """{name: bytes} of regular members; sparse ones are, too."""
    with tarfile.open(path, "r:") as tar:
        found = {member.name: tar.extractfile(member) for member in tar if member.isreg()}
        return {name.removeprefix("./"): file.read() for name, file in found.items() if file}


def read(path: Path) -> tuple[dict[tuple[str, str], bytes], TarContent]:
    """The bytes that an index would point to."""
    content = read_members(path, path.name, path.name, ())
    data = path.read_bytes()
    return {
        (key.removeprefix("./"), extension): data[offset : offset + size]
        for key, row in content.rows.items()
        for extension, (offset, size, _) in row.items()
    }, content


def compare(path: Path, extracted: dict[str, bytes]) -> None:
    """Each member that we take is one of `extracted`; each other one of those is named."""
    taken, content = read(path)
    expected = {split_name(name): data for name, data in extracted.items()}
    assert {place: expected.get(place) for place in taken} == taken
    told = [fault.text for fault in content.faults] + list(content.left_out.examples.values())
    for name in extracted:
        if split_name(name) not in taken:
            assert any(name in text for text in told), name


GNU_TAR = {
    **{name: [f"--format={name}"] for name in ("gnu", "oldgnu", "posix", "ustar")},
    "gnu, sparse": ["--format=gnu", "--sparse"],
    **{
        f"posix, sparse {version}": ["--format=posix", "--sparse", f"--sparse-version={version}"]
        for version in ("0.0", "0.1", "1.0")
    },
    "gnu, big uid": ["--format=gnu", "--owner=big:4294967294", "--group=big:3000000"],
    "posix, big uid": ["--format=posix", "--owner=big:4294967294", "--mtime=@99999999999.5"],
    "gnu, incremental": ["--format=gnu", "--incremental"],
    "posix, incremental": ["--format=posix", "--incremental"],
    "gnu, links resolved": ["--format=gnu", "--hard-dereference", "--dereference"],
    "gnu, label": ["--format=gnu", "--label=volume.jpg"],
    "posix, label": ["--format=posix", "--label=volume.jpg"],
    "v7": ["--format=v7", f"--exclude={LONG}"],
}


@pytest.mark.parametrize("options", GNU_TAR.values(), ids=GNU_TAR)
def test_tars_of_gnu_tar(options: list[str], tree: Path, tmp_path: Path):
    path = tmp_path / "a.tar"
    subprocess.run(["tar", *options, "-cf", path, "-C", tree, "."], check=True)
    compare(path, extract_with_gnu_tar(path, tmp_path / "out"))
    if "--incremental" not in options:  # of which Python's tarfile misreads the names
        compare(path, extract_with_python(path))
    taken, content = read(path)
    assert taken.items() >= {split_name(name): data for name, data in CONTENTS.items()}.items()
    reasons = sorted(fault.reason for fault in content.faults)
    links = [] if "--dereference" in options else ["hard link", "symbolic link"]
    assert reasons == sorted([*links, *(["sparse file"] if "--sparse" in options else [])])


@pytest.mark.parametrize("name", ["pax", "gnutar", "ustar"])
def test_tars_of_bsdtar(name: str, tmp_path: Path):
    """Made once by ``bsdtar --format=NAME -b 1 -cf bsdtar-NAME.tar *`` (libarchive 3.6.2).

    Its pax format stores files with holes as sparse ones without being asked.
    """
    path = DATA / f"bsdtar-{name}.tar"
    compare(path, extract_with_gnu_tar(path, tmp_path / "out"))
    compare(path, extract_with_python(path))
    taken, content = read(path)
    reasons = ["hard link", "symbolic link", *(["sparse file"] if name == "pax" else [])]
    assert [fault.reason for fault in content.faults] == reasons
    assert len(taken) == 6 - (name == "pax")


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_tars_of_python(tar_format: int, tree: Path, tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        tar.add(tree, ".")
    compare(path, extract_with_gnu_tar(path, tmp_path / "out"))
    compare(path, extract_with_python(path))


@pytest.mark.parametrize("mtime", [None, 0])
def test_tars_of_webdataset(mtime: int | None, tmp_path: Path):
    """With the members that img2dataset writes."""
    path = tmp_path / "00000.tar"
    with path.open("wb") as file, TarWriter(file, mtime=mtime, encoder=False) as writer:
        for number in range(20):
            key = f"{number:09d}"
            image = random.Random(number).randbytes(number * 100)
            row = {"jpg": image, "txt": "Größe".encode(), "json": b'{"url": ""}'}
            writer.write({"__key__": key, **row})
    compare(path, extract_with_gnu_tar(path, tmp_path / "out"))
    compare(path, extract_with_python(path))
    taken, content = read(path)
    assert len(taken) == 60
    assert not content.faults
    assert not content.left_out.counts


names = st.builds(
    lambda folder, base: f"{folder}{base}",
    st.sampled_from(["", "d/", "d.x/", "__MACOSX/", "n" * 99 + "/", "ü/"]),
    st.sampled_from(
        ["a.jpg", "a.JPG", "b.seg.png", "._a.jpg", ".jpg", "README", "é" * 60 + ".jpg"]
    ),
)
kinds = st.sampled_from([b"0", b"\0", b"7", b"1", b"2", b"3", b"4", b"5", b"6", b"M", b"V", b"Z"])


@settings(max_examples=150, deadline=None)
@given(
    members=st.lists(st.tuples(names, kinds, st.binary(max_size=1100)), max_size=6),
    tar_format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@example(
    members=[("n" * 99 + "/a.jpg", b"\0", b"tarfile takes it for a folder")],
    tar_format=tarfile.GNU_FORMAT,
)
def test_any_member_is_taken_as_it_lies_or_named(
    members: list[tuple[str, bytes, bytes]],
    tar_format: int,
    tmp_path_factory: pytest.TempPathFactory,
):
    path = tmp_path_factory.mktemp("any") / "a.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind not in tarfile.SUPPORTED_TYPES or member.isreg():
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    taken, content = read(path)
    regular = [
        (split_name(name), data) for name, kind, data in members if kind in (b"0", b"\0", b"7")
    ]
    assert all(member in regular for member in taken.items())
    named = len(content.faults) + sum(content.left_out.counts.values())
    assert len(taken) + named == sum(kind != b"5" for _, kind, _ in members)
