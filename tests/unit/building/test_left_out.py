"""Tars of which something is not taken: it is counted or named, and the rest can be had."""

import dataclasses
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from data_pipelines import ShardDataset, build_shards, storage
from data_pipelines.building.checks import select_tars
from data_pipelines.building.sample_encoding import Encoding
from data_pipelines.building.sources import open_source
from data_pipelines.building.tar_source import ForeignTars
from data_pipelines.contact_sheet import draw_sheet
from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import index_shards, main
from data_pipelines.loading.dataset import ImageSet
from data_pipelines.shards.index import load_index
from data_pipelines.shards.intake import LeftOut, SourceFaults, Tolerance
from data_pipelines.storage import Location
from data_pipelines.storage.tree import Tree
from data_pipelines.verify_shards import find_faults


def draw(seed: int) -> bytes:
    return encode_png(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))


PNG = draw(0)
TORN = PNG[:-40] + bytes(28) + PNG[-12:]
"""Its header and its end are sound."""


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def add_link(path: Path, name: str, kind: bytes) -> None:
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "s0.png"
        tar.addfile(member)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """12 samples in three tars: s1 torn, s5 no image, s6 a link, s10 with a link beside it."""
    folder = tmp_path / "set"
    for tar in range(3):
        samples = {f"s{n}.png": draw(n) for n in range(4 * tar, 4 * tar + 4)}
        samples.update({f"s{n}.cls": b"1" for n in range(4 * tar, 4 * tar + 4)})
        write_tar(folder / f"{tar}.tar", samples)
    first = {f"s{n}.png": TORN if n == 1 else draw(n) for n in range(4)}
    write_tar(folder / "0.tar", first)
    write_tar(folder / "1.tar", {"s4.png": draw(4), "s5.cls": b"1", "s7.png": draw(7)})
    add_link(folder / "1.tar", "s6.png", tarfile.LNKTYPE)
    add_link(folder / "2.tar", "s10.json", tarfile.SYMTYPE)
    return folder


FAULTY = {"s1": "damaged PNG", "s5": "no image", "s6": "hard link", "s10": "symbolic link"}
GOOD = [f"s{n}" for n in range(12) if f"s{n}" not in FAULTY]


def test_all_are_named_in_one_run(tars: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="4 faults"):
        main([str(tars), "--verify", "--on", "here"])
    lines = capsys.readouterr().out.splitlines()
    for key, said in FAULTY.items():
        assert sum(f"'{key}" in line and said in line for line in lines) == 1
    assert not (tars / "index.json").exists()


def test_without_verify_a_torn_image_is_found_in_the_sample_for_the_statistics(tmp_path: Path):
    samples = {f"s{n}.png": TORN if n in (1, 3) else draw(n) for n in range(6)}
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(SourceFaults) as error:
        index_shards(str(tmp_path))
    assert [re.findall("'s.'", fault) for fault in error.value.faults] == [["'s1'"], ["'s3'"]]
    assert not (tmp_path / "index.json").exists()


def test_the_rest_is_a_set(tars: Path, capsys: pytest.CaptureFixture[str]):
    main([str(tars), "--bad-images", "skip", "--on", "here"])
    printed = capsys.readouterr().out
    index = load_index(str(tars))
    assert [shard.left_out for shard in index.shards] == [["s1"], ["s6", "s5"], ["s10"]]
    left_out = LeftOut.from_json(index.provenance["left_out"])
    assert left_out.counts == {
        "damaged image": 1,
        "sample without an image": 1,
        "hard link": 1,
        "symbolic link": 1,
    }
    assert left_out.examples["hard link"] == "1.tar: s6"
    assert str(left_out) in printed
    assert len((tars / "faults.txt").read_text().splitlines()) == 4
    statistics = json.loads((tars / "statistics.json").read_text())
    assert statistics["left_out"] == index.provenance["left_out"]
    silent = dataclasses.replace(index, provenance={"source": index.provenance["source"]})
    told, untold = (np.asarray(draw_sheet(str(tars), i)) for i in (index, silent))
    assert (told[:28] != untold[:28]).any()
    assert (told[28:] == untold[28:]).all()
    assert list(find_faults(str(tars))) == []
    dataset = ShardDataset.open(str(tars))
    assert dataset.keys == GOOD
    (batch,) = dataset.loader(8, shuffle=False)
    for key, image in zip(batch.key, batch.image, strict=True):
        seed = int(key[1:])
        expected = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        assert (image.permute(1, 2, 0).numpy() == expected).all()
    assert str(left_out) in index_shards(str(tars))


def test_what_is_left_out_is_part_of_the_id(tars: Path):
    index_shards(str(tars), tolerance=Tolerance(9))
    index = load_index(str(tars))
    path = tars / "index.json"
    tree = json.loads(path.read_text())
    del tree["shards"][0]["left_out"]
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=f"id {index.id} does not match"):
        load_index(str(tars))


def test_too_many_fail_and_a_higher_limit_goes_on(tars: Path):
    arguments = [str(tars), "--bad-images", "skip", "--most-bad-images", "3", "--on", "here"]
    with pytest.raises(SystemExit, match=r"4 faults in .*, more than --most-bad-images 3"):
        main(arguments)
    for tar in range(3):  # lost if it were read again
        record = tars / f".unfinished/{tar}.tar.json"
        record.write_text(record.read_text().replace(f'"s{4 * tar}"', f'"t{4 * tar}"'))
    assert "hard link" in index_shards(str(tars), tolerance=Tolerance(4))
    shards = load_index(str(tars)).shards
    assert shards[0].left_out == ["s1"]
    assert [shard.keys[0] for shard in shards] == ["t0", "t4", "t8"]


def test_a_record_made_with_other_options_is_not_taken_over(tmp_path: Path):
    write_tar(tmp_path / "0.tar", {"a.png": PNG, "b.png": TORN})
    write_tar(tmp_path / "1.tar", {"c.png": draw(1)})
    (tmp_path / "2.tar").write_bytes(b"")
    for options, texts in (
        ({"tolerance": Tolerance(9)}, ["2.tar is empty"]),
        ({"verify": True}, ["'b'", "2.tar is empty"]),
        ({}, ["2.tar is empty"]),
    ):
        with pytest.raises(SourceFaults) as error:
            index_shards(str(tmp_path), **options)
        faults = error.value.faults
        assert len(faults) == len(texts)
        assert all(text in fault for text, fault in zip(texts, faults, strict=True))


@pytest.mark.parametrize("damage", ["cut off", "not a tar", "twice", "outside", "two tars"])
def test_a_damaged_tar_is_never_skipped(damage: str, tars: Path):
    path = tars / "2.tar"
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:3000])
    elif damage == "not a tar":
        path.write_bytes(b"text" * 1000)
    elif damage == "two tars":
        write_tar(tars / "3.tar", {"s11.png": PNG})
    else:
        name = "s8.png" if damage == "twice" else "../s.png"
        with tarfile.open(path, "a") as tar:
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(SourceFaults):
        index_shards(str(tars), tolerance=Tolerance(9))
    assert not (tars / "index.json").exists()


def test_litter_is_counted(tmp_path: Path):
    tar = {
        "a.png": PNG,
        "._a.png": b"\0\5\x16\7",
        "d/.DS_Store": b"",
        "__MACOSX/d/._b.png": b"",
        "__key__": b"",
        ".gitkeep": b"",
        "a.seg.png": PNG,
    }
    write_tar(tmp_path / "set/a.TAR", tar)
    for name in ("._a.tar", "notes.txt", "00000.parquet", "index/index.json"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"text")
    expected = {
        "macOS metadata": 4,
        "WebDataset metadata": 1,
        "hidden file": 1,
        "further image of a sample": 1,
        "not a tar (.txt)": 1,
        "not a tar (.parquet)": 1,
    }
    source = open_source(f"wds:{tmp_path}/set")
    assert isinstance(source, ForeignTars)
    assert [entry.key for entry in source.list_entries()] == ["a"]
    assert source.left_out.counts == expected
    assert source.faults == []
    index_shards(f"{tmp_path}/set", f"{tmp_path}/index")
    index = load_index(f"{tmp_path}/index")
    assert LeftOut.from_json(index.provenance["left_out"]).counts == expected
    assert ImageSet(f"{tmp_path}/index", index).keys == ["a"]
    assert list(find_faults(f"{tmp_path}/index")) == []


def test_an_output_below_the_source_is_no_part_of_it(tmp_path: Path):
    for name in ("a.tar", "out/shard-000000.tar", "output/b.tar"):
        write_tar(tmp_path / name, {f"{Path(name).stem}.png": PNG})
    source = ForeignTars(str(tmp_path), Encoding(), output=Location.parse(f"{tmp_path}/out"))
    assert [entry.key for entry in source.list_entries()] == ["a", "b"]


@pytest.mark.parametrize("output", [None, "s3://b/set", "s3://b/set/out"])
def test_objects_below_an_empty_folder_name_are_not_lost(
    output: str | None, monkeypatch: pytest.MonkeyPatch
):
    """No local folder can have such names, so the listing of an object store is played here."""
    folder, place = Location("s3://b/set"), output and Location(output)
    tars = Tree({"a.tar": 1, "/lost.tar": 1, "/notes.txt": 1, "/x.tar.gz": 1}, {})
    with pytest.raises(SourceFaults) as error:
        select_tars(folder, tars, place)
    assert [fault.partition(": two")[0].partition(" is")[0] for fault in error.value.faults] == [
        "s3://b/set//lost.tar",
        "s3://b/set//x.tar.gz",
    ]
    found, left_out = select_tars(folder, Tree({"a.tar": 1, "/notes.txt": 1}, {}), place)
    assert (list(found), left_out.counts) == (["a.tar"], {"not a tar (.txt)": 1})
    monkeypatch.setattr(storage, "check_readable", lambda uri: None)
    listing = Tree({"a.png": 1, "/b.png": 1, "/notes.txt": 1}, {})
    monkeypatch.setattr(storage, "list_tree", lambda uri: listing)
    source = open_source(f"folder:{folder}", output=place)
    assert [entry.key for entry in source.list_entries()] == ["a", "b"]
    assert source.left_out.counts == {"not an image file (.txt)": 1}


def test_a_later_fault_is_not_hidden_by_what_was_left_out(tars: Path):
    with tarfile.open(tars / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo(".png"))  # its sample is called "", like that of a damage
    index_shards(str(tars), tolerance=Tolerance(9))
    assert list(find_faults(str(tars))) == []
    path = tars / "0.tar"
    path.write_bytes(path.read_bytes()[:3000])
    assert any("is not a plain, whole tar" in fault for fault in find_faults(str(tars)))


def test_compressed_tars_are_refused_by_both(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"a.png": PNG})
    names = "b.tar.gz c.TGZ d.tar.bz2 e.tbz2 f.tar.xz g.txz h.tar.zst i.tzst j.tar.lz4 k.tar.Z"
    for name in names.split():
        (tmp_path / name).write_bytes(b"")
    for read in (index_shards, lambda uri: open_source(f"wds:{uri}")):
        with pytest.raises(SourceFaults) as error:
            read(str(tmp_path))
        assert len(error.value.faults) == 10
        for name, fault in zip(names.split(), error.value.faults, strict=True):
            assert f"{name} is compressed: unpack it" in fault


def test_compressed_images_are_named(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"a.jpg.gz": b"", "b.png": PNG, "b.json.gz": b""})
    with pytest.raises(SourceFaults) as error:
        index_shards(str(tmp_path))
    (fault,) = error.value.faults
    assert "sample 'a' has no image member, but .jpg.gz, which is compressed" in fault


def test_images_that_a_dot_makes_one_sample_are_named_or_allowed(tmp_path: Path):
    write_tar(
        tmp_path / "set/a.tar",
        {
            **{f"2024.05.01_{name}.png": draw(n) for n, name in enumerate("abc")},
            "d/000.png": PNG,
            "d/000.seg.png": PNG,
            "e.v1.png": PNG,
        },
    )
    with pytest.raises(SourceFaults) as error:
        index_shards(f"{tmp_path}/set")
    (fault,) = error.value.faults
    assert "'2024.05.01_a.png' and '2024.05.01_b.png' and 1 more are one sample, '2024'" in fault
    with pytest.raises(SourceFaults, match="one sample"):
        open_source(f"wds:{tmp_path}/set").list_entries()
    index_shards(f"{tmp_path}/set", tolerance=Tolerance(dotted_keys=True))
    index = load_index(f"{tmp_path}/set")
    assert index.provenance["left_out"]["further image of a sample"]["count"] == 3
    assert index.shards[0].keys == ["2024", "d/000", "e"]
    assert list(find_faults(f"{tmp_path}/set")) == []


def test_a_name_in_latin_1_is_named_and_can_be_left_out(tmp_path: Path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.png").write_bytes(PNG)
    name = "gr\udcfc\udcdf.png"
    (tmp_path / "files" / name).write_bytes(PNG)
    (tmp_path / "files" / f"._{name}").write_bytes(b"")
    command = ["tar", "--format=gnu", "-cf", "a.tar", "-C", "files", "."]
    subprocess.run(command, check=True, cwd=tmp_path)
    arguments = ["data_pipelines.index_shards", f"{tmp_path}", "--output", f"{tmp_path}/index"]
    command = [sys.executable, "-m", *arguments, "--on", "here"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 1
    assert rb"member './gr\udcfc\udcdf.png' has a name that is not UTF-8" in done.stdout
    index_shards(*arguments[1::2], tolerance=Tolerance(9))
    assert ShardDataset.open(f"{tmp_path}/index").keys == ["./a"]
    assert list(find_faults(f"{tmp_path}/index")) == []


def test_thousands_of_repeated_keys_are_bounded_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for tar in "ab":
        with (tmp_path / f"{tar}.tar").open("wb") as file, TarWriter(file) as writer:
            for number in range(3000):
                writer.write({"__key__": f"{number:04d}", "png": PNG})
    with pytest.raises(SystemExit, match="3000 faults"):
        main([str(tmp_path), "--on", "here"])
    assert len(capsys.readouterr().out.splitlines()) == 21
    faults = (tmp_path / "faults.txt").read_text().splitlines()
    assert len(faults) == 3000
    assert "'2999' is in a.tar and in b.tar" in faults[-1]


def test_further_frames_are_counted(tmp_path: Path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "green", "blue")]
    gif, mpo = io.BytesIO(), io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    frames[0].save(mpo, "MPO", save_all=True, append_images=frames[1:2])
    samples = {"a.gif": gif.getvalue(), "b.png": PNG, "c.jpg": mpo.getvalue()}
    write_tar(tmp_path / "tars/a.tar", samples)
    index_shards(f"{tmp_path}/tars")
    left_out = load_index(f"{tmp_path}/tars").provenance["left_out"]
    assert left_out == {
        "further frame or page of a file": {"count": 3, "example": "a.tar: a"},
    }
    for resolution in (None, 4):
        output = f"{tmp_path}/set{resolution}"
        build_shards.build_shards(f"wds:{tmp_path}/tars", output, resolution)
        left_out = load_index(output).provenance["left_out"]
        assert left_out["further frame or page of a file"]["count"] == 3


def test_a_folder_of_faults_alone_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "source").mkdir()
    for name in "ab":
        (tmp_path / f"source/{name}.heic").write_bytes(b"x")
    arguments = ["--source", f"folder:{tmp_path}/source", "--output", f"{tmp_path}/set"]
    with pytest.raises(SystemExit) as ended:
        build_shards.main([*arguments, "--on", "here", "--bad-images", "skip"])
    assert "more than" not in str(ended.value)
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "set/faults.txt").read_text().splitlines() == lines
    assert [line.partition(": ")[0].rpartition("/")[2] for line in lines[:2]] == [
        "a.heic",
        "b.heic",
    ]
    assert "no other image files" in lines[2]


def test_a_source_without_samples_says_so(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(ValueError, match="the tars hold no sample"):
        open_source(f"wds:{tmp_path}").list_entries()
    write_tar(tmp_path / "a.tar", {"a.txt": b""})
    with pytest.raises(SourceFaults, match=r"no image.*hold no sample"):
        index_shards(str(tmp_path), tolerance=Tolerance(9))
    with pytest.raises(ValueError, match=r"a\.tar holds no \.tar file: name the folder"):
        open_source(f"wds:{tmp_path}/a.tar")
