import gzip
import io
import json
import os
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from data_pipelines import build_shards, contact_sheet, storage
from data_pipelines.building.statistics import draw_sample, map_images
from data_pipelines.images.codec import decode_image, encode_png
from data_pipelines.index_shards import index_shards, list_tars, main
from data_pipelines.shards.index import load_index
from data_pipelines.shards.intake import SourceFaults
from data_pipelines.storage.retries import StorageError
from data_pipelines.verify_shards import find_faults
from tests.opened_files import watch_opens


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (6, 6, 3), dtype=np.uint8)


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, encoder=False) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})


@pytest.fixture
def tars(tmp_path):
    """4 tars of 3 samples, image n drawn with seed n // 2: every image is there twice."""
    folder = tmp_path / "set"
    for tar in range(4):
        write_tar(
            folder / f"part-{tar}.tar",
            {
                f"s{n:02d}": {"png": encode_png(draw(n // 2)), "cls": str(n % 3).encode()}
                for n in range(3 * tar, 3 * tar + 3)
            },
        )
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_tars_become_a_set_where_they_lie(tars, capsys):
    before = contents(tars)
    main([str(tars), "--on", "here"])
    assert "12 images in 4 tars" in capsys.readouterr().out
    after = contents(tars)
    assert set(after) == {*before, "index.json", "statistics.json", "contact_sheet.png"}
    assert {name: after[name] for name in before} == before
    assert load_index(str(tars)).base is None
    assert list(find_faults(str(tars))) == []
    assert "nothing to do" in index_shards(str(tars))
    assert contents(tars) == after
    write_tar(tars / "part-9.tar", {"new": {"png": encode_png(draw(1))}})
    with pytest.raises(ValueError, match="tars 4 instead of 5"):
        index_shards(str(tars))


def test_tars_in_the_root_of_the_filesystem_are_found_there(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in ("/x-0.tar", "/x-1.tar"))
    base, names, _ = list_tars("/x-{0..1}.tar")
    assert (str(base), [*names]) == ("/", ["x-0.tar", "x-1.tar"])


def test_the_index_of_a_source_that_stays_untouched_lies_elsewhere(tars, tmp_path, monkeypatch):
    before = contents(tars)
    monkeypatch.chdir(tmp_path)
    index_shards("set", f"{tmp_path}/index")
    assert contents(tars) == before
    assert load_index(f"{tmp_path}/index").base == str(tars)
    assert list(find_faults(f"{tmp_path}/index")) == []
    (tars / "part-2.tar").unlink()
    assert any("set/part-2.tar" in fault for fault in find_faults(f"{tmp_path}/index"))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tars):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tars)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_cannot_be_listed_is_named_with_braces(server, tars, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be listed.*\{000000\.\.000099\}\.tar"):
        index_shards(server, f"{tmp_path}/index")
    with pytest.raises(ValueError, match="--output"):
        index_shards(f"{server}/part-{{0..3}}.tar")
    with pytest.raises(SourceFaults) as error:
        index_shards(f"{server}/part-{{0..5}}.tar", f"{tmp_path}/index")
    assert [("part-4" in f, "part-5" in f) for f in error.value.faults] == [
        (True, False),
        (False, True),
    ]
    index_shards(f"{server}/part-{{0..3}}.tar", f"{tmp_path}/other")
    assert load_index(f"{tmp_path}/other").base == server
    assert list(find_faults(f"{tmp_path}/other")) == []
    with pytest.raises(ValueError, match="query") as error:
        list_tars(f"{server}/part-{{0..3}}.tar?signature=secret")
    assert "secret" not in str(error.value)


def add_member(path, name, data, size=None):
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def claim_two_gibibytes(path):
    """A tar with a member so large, which takes no room on the disk."""
    member = tarfile.TarInfo("huge.png")
    member.size = 2**31
    with path.open("wb") as file:
        file.write(member.tobuf())
        file.truncate(2**31 + 2048)


PNG = encode_png(draw(99))
FAULTS = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:2000]),
    "compressed inside": lambda p: p.write_bytes(gzip.compress(p.read_bytes())),
    "concatenated": lambda p: p.write_bytes(p.read_bytes() * 2),
    "empty": lambda p: p.write_bytes(b""),
    "leaves": lambda p: add_member(p, "../../x.png", PNG),
    "absolute": lambda p: add_member(p, "/etc/x.png", PNG),
    "twice": lambda p: add_member(p, "s03.png", PNG),
    "no image": lambda p: add_member(p, "lonely.txt", b"text"),
    "no picture": lambda p: add_member(p, "odd.png", b"text"),
    "other tar's key": lambda p: add_member(p, "s10.png", PNG),
    "oversized": claim_two_gibibytes,
}
NAMES = {
    "cut": "part-1.tar",
    "compressed inside": "part-1.tar is not a plain, whole tar (it is compressed: unpack it)",
    "concatenated": "part-1.tar holds another tar after 3 samples: split them",
    "empty": "part-1.tar is empty",
    "leaves": "part-1.tar: sample '../../x' leaves the folder",
    "absolute": "part-1.tar: sample '/etc/x' leaves the folder",
    "twice": "part-1.tar holds 's03.png' twice",
    "no image": "part-1.tar: sample 'lonely' has no image",
    "no picture": "part-1.tar: sample 'odd': not an image",
    "other tar's key": "key 's10' is in part-1.tar and in part-3.tar",
    "oversized": "part-1.tar: member 'huge.png' has 2.0 GiB",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_no_index_written(fault, tars):
    FAULTS[fault](tars / "part-1.tar")
    with pytest.raises(SourceFaults) as error:
        index_shards(str(tars))
    assert len(error.value.faults) == 1
    assert NAMES[fault] in error.value.faults[0]
    assert not (tars / "index.json").exists()


def test_compressed_tars_are_all_named(tars):
    for number in (0, 2):
        (tars / f"part-{number}.tar").rename(tars / f"part-{number}.tar.gz")
    with pytest.raises(SourceFaults) as error:
        index_shards(str(tars))
    assert [fault.split(" is ")[0] for fault in error.value.faults] == [
        f"{tars}/part-0.tar.gz",
        f"{tars}/part-2.tar.gz",
    ]


def test_all_faults_are_listed_and_repaired_tars_alone_are_read_again(tars, capsys):
    good = (tars / "part-1.tar").read_bytes()
    add_member(tars / "part-1.tar", "../a.png", PNG)
    add_member(tars / "part-1.tar", "b.txt", PNG)
    FAULTS["empty"](tars / "part-3.tar")
    with pytest.raises(SystemExit, match=rf"3 faults.*{tars}/faults\.txt"):
        main([str(tars), "--on", "here"])
    lines = capsys.readouterr().out.splitlines()
    assert [("'../a'" in line, "'b'" in line, "part-3" in line) for line in lines] == [
        (False, True, False),
        (True, False, False),
        (False, False, True),
    ]
    assert (tars / "faults.txt").read_text().splitlines() == lines
    records = sorted(path.name for path in (tars / ".unfinished").iterdir())
    assert records == ["build.json", "part-0.tar.json", "part-2.tar.json"]
    (tars / "part-1.tar").write_bytes(good)
    (tars / "part-3.tar").unlink()
    record = tars / ".unfinished/part-0.tar.json"
    record.write_text(record.read_text().replace('"s00"', '"t00"'))  # lost if it were read again
    assert "9 images in 3 tars" in index_shards(str(tars))
    assert load_index(str(tars)).shards[0].keys == ["t00", "s01", "s02"]
    assert not (tars / "faults.txt").exists()
    assert not (tars / ".unfinished").exists()


def write_members(path, names, size):
    """A tar of images of `size` bytes, at least, and of labels."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = b"1" if name.endswith("cls") else PNG + bytes(size)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("order", "size"), [("pngs first", 20_000), ("labels first", 200_000), ("by sample", 200_000)]
)
def test_a_tar_whose_samples_are_not_compact_is_a_fault(tmp_path, order, size):
    ends = ("png", "cls") if order == "pngs first" else ("cls", "png")
    names = [f"s{n:02d}.{end}" for end in ends for n in range(60)]
    write_members(tmp_path / "set/a.tar", sorted(names) if order == "by sample" else names, size)
    # Interleaving within a chunk does no harm.
    write_members(tmp_path / "set/b.tar", [f"t{n}.{end}" for end in ends for n in range(5)], size)
    if order == "by sample":
        assert "65 images in 2 tars" in index_shards(f"{tmp_path}/set")
        return
    with pytest.raises(SourceFaults) as error:
        index_shards(f"{tmp_path}/set")
    (fault,) = error.value.faults
    assert fault.startswith(f"{tmp_path}/set/a.tar: members of a sample are not adjacent")
    build_shards.build_shards(f"wds:{tmp_path}/set", f"{tmp_path}/built")  # the remedy
    assert "65 images" in index_shards(f"{tmp_path}/built", f"{tmp_path}/index")


def test_all_tars_that_are_not_there_are_named(tars):
    with pytest.raises(SourceFaults) as error:
        index_shards(f"{tars}/part-{{3..5}}.tar")
    assert error.value.faults == [f"{tars}/part-{number}.tar does not exist" for number in (4, 5)]
    with pytest.raises(StorageError, match=r"nowhere does not exist on this machine"):
        index_shards(f"{tars}/nowhere")
    with pytest.raises(ValueError, match="empty path"):
        index_shards(str(tars), output="")


def test_a_record_spares_reading_its_tar(tars, monkeypatch):
    FAULTS["empty"](tars / "part-3.tar")
    with pytest.raises(SourceFaults):
        index_shards(str(tars))
    with watch_opens() as opened, pytest.raises(SourceFaults) as error:
        index_shards(str(tars))
    assert ["part-3.tar" in fault for fault in error.value.faults] == [True]
    assert {path for path in opened if path.endswith(".tar")} == {f"{tars}/part-3.tar"}


@pytest.mark.parametrize("place", ["here", "http"])
def test_a_tar_that_was_replaced_at_equal_size_is_read_again(place, server, tars, tmp_path):
    """Even if its time of modification is the old one, as after a backup is restored."""
    uri = str(tars) if place == "here" else f"{server}/part-{{0..3}}.tar"
    path, output = tars / "part-0.tar", f"{tmp_path}/index"
    last = tars / "part-3.tar"
    whole = last.read_bytes()
    add_member(last, "b.txt", PNG)
    with pytest.raises(SourceFaults):
        index_shards(uri, output)
    last.write_bytes(whole)
    before = path.stat()
    write_tar(path, {n: {"png": encode_png(draw(7)), "cls": b"0"} for n in ("t00", "s01", "s02")})
    assert path.stat().st_size == before.st_size
    shift = 0 if place == "here" else 10
    os.utime(path, (before.st_atime, before.st_mtime + shift))
    index_shards(uri, output)
    assert list(find_faults(output)) == []
    assert load_index(output).shards[0].keys == ["t00", "s01", "s02"]


class TestDescription:
    def test_counts_what_is_there(self, tars):
        index_shards(str(tars))
        figures = json.loads((tars / "statistics.json").read_text())
        pixels = np.stack([draw(n // 2) for n in range(12)]) / 255
        assert figures["images"] == 12
        assert figures["repeated_images"] == 6
        assert figures["members"] == {"cls": 12, "png": 12}
        assert figures["labels"] == {"different": 3, "counts": {"0": 4, "1": 4, "2": 4}}
        sample = figures["sample"]
        assert (sample["formats"], sample["channels"]) == ({"PNG": 12}, {"3": 12})
        assert sample["width"] == {"min": 6, "median": 6.0, "max": 6}
        assert sample["mean"] == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-6)
        assert sample["std"] == pytest.approx(pixels.std((0, 1, 2)), abs=1e-6)

    def test_of_mixed_sizes_and_grey(self, tmp_path):
        images = [draw(0, 4, 8), draw(1, 10, 6, 3), draw(2, 10, 6, 3)]
        write_tar(
            tmp_path / "a.tar", {f"k{n}": {"png": encode_png(i)} for n, i in enumerate(images)}
        )
        index_shards(str(tmp_path))
        sample = json.loads((tmp_path / "statistics.json").read_text())["sample"]
        assert sample["channels"] == {"3": 2, "1": 1}
        assert sample["commonest_sizes"] == {"6 x 10": 2, "8 x 4": 1}
        assert sample["height"] == {"min": 4, "median": 10.0, "max": 10}
        red = np.concatenate([images[0].ravel(), *(i[..., 0].ravel() for i in images[1:])])
        assert sample["mean"][0] == pytest.approx(red.mean() / 255, abs=1e-6)
        with Image.open(tmp_path / "contact_sheet.png") as sheet:
            assert sheet.size == (1204, 132)

    def test_the_sheet_shows_the_images_of_the_sample_in_order(self, tars):
        index_shards(str(tars))
        index = load_index(str(tars))
        with Image.open(tars / "contact_sheet.png") as sheet:
            pixels = np.asarray(sheet)
        for number in range(12):
            left = 4 + number * 100
            tile = pixels[32 : 32 + 96 : 16, left : left + 96 : 16]
            assert (tile == draw(number // 2)).all()
        assert index.image_shape == (3, 6, 6)

    def test_a_line_break_in_the_source_is_a_space_in_the_caption(self, tars):
        index_shards(str(tars))
        index = load_index(str(tars))
        broken, plain = (
            replace(index, provenance={"fingerprint": {"source": f"/images/some{gap}cats"}})
            for gap in ("\n", " ")
        )
        drawn = [np.asarray(contact_sheet.draw_sheet(str(tars), i)) for i in (broken, plain)]
        np.testing.assert_array_equal(*drawn)

    def test_a_command_draws_sets_of_others(self, tars, tmp_path, capsys):
        index_shards(str(tars))
        sheet = (tars / "contact_sheet.png").read_bytes()
        (tars / "contact_sheet.png").unlink()
        contact_sheet.main([str(tars), "--output", f"{tmp_path}/seen"])
        assert "12 images, 6 of them repeated" in capsys.readouterr().out
        assert (tmp_path / "seen/contact_sheet.png").read_bytes() == sheet
        assert not (tars / "contact_sheet.png").exists()
        with pytest.raises(SystemExit, match=r"holds no index\.json"):
            contact_sheet.main([str(tmp_path)])

    def test_samples_come_back_in_order_whatever_is_asked(self, tars):
        index_shards(str(tars))
        index = load_index(str(tars))
        samples = draw_sample(index, 7)
        assert samples == draw_sample(index, 7) == sorted(set(samples))
        back = samples[::-1]
        found = map_images(lambda data: decode_image(data, 3), str(tars), index, back)
        for (shard, row), image in zip(back, found, strict=True):
            assert (image.transpose(1, 2, 0) == draw((3 * shard + row) // 2)).all()

    def test_damaged_images_are_all_named(self, tars, capsys):
        index_shards(str(tars))
        index = load_index(str(tars))
        for number, row in ((2, 1), (3, 0)):
            with (tars / f"part-{number}.tar").open("r+b") as file:
                file.seek(int(index.shards[number].images().offset[row]))
                file.write(b"?")
        with pytest.raises(SystemExit, match="2 damaged images"):
            contact_sheet.main([str(tars)])
        one, other = capsys.readouterr().out.splitlines()
        assert "part-2.tar, sample 's07'" in one
        assert "part-3.tar, sample 's09'" in other


@pytest.mark.parametrize("command", [main, contact_sheet.main, build_shards.main])
def test_help_explains(command, capsys):
    with pytest.raises(SystemExit) as error:
        command(["--help"])
    assert error.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.tar file"):
        index_shards(str(tmp_path))
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(SourceFaults, match="hold no sample"):
        index_shards(str(tmp_path))
    with pytest.raises(ValueError, match="on this machine"):
        index_shards(str(tmp_path), "s3://bucket/index")
    assert storage.list_files(str(tmp_path)).keys() >= {"a.tar"}
