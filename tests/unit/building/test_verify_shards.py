"""Every fault that can be planted into a sound set is found, by the name of what it hit."""

import dataclasses
import io
import json
import os
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from webdataset.writer import TarWriter

from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import index_shards
from data_pipelines.shards.index import ShardIndex, index_tar, load_index, write_index
from data_pipelines.verify_shards import find_faults, main


def png(number, side=6):
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    return encode_png(pixels)


def samples(tar):
    return {
        f"s{n:02d}": {"png": png(n), "cls": str(n).encode()} for n in range(4 * tar, 4 * tar + 4)
    }


def write_tar(path, content):
    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for key, members in content.items():
            writer.write({"__key__": key, **members})


@pytest.fixture
def folder(tmp_path):
    """3 tars of 4 samples with labels, and their index."""
    for tar in range(3):
        write_tar(tmp_path / f"p{tar}.tar", samples(tar))
    index_shards(str(tmp_path))
    return tmp_path


def place(folder, extension, row, tar=1):
    members = load_index(str(folder)).shards[tar].members[extension]
    return int(members.offset[row]), int(members.size[row])


def flip(folder, position, tar=1):
    path = folder / f"p{tar}.tar"
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)


def flip_member(extension, row):
    return lambda folder: flip(folder, sum(place(folder, extension, row)) - 1)


def flip_header(folder):
    flip(folder, place(folder, "png", 2)[0] - 512 + 1)


def cut(folder):
    path = folder / "p1.tar"
    path.write_bytes(path.read_bytes()[: place(folder, "png", 2)[0] + 20])


def cut_between_samples(folder):
    path = folder / "p1.tar"
    path.write_bytes(path.read_bytes()[: place(folder, "cls", 2)[0] - 512])


def rewrite(folder, content, reindex):
    """p1.tar with other samples; `reindex`: the index knows, so that only a reader can object."""
    write_tar(folder / "p1.tar", content)
    if reindex:
        replace_shard(folder, index_tar(folder / "p1.tar", "p1.tar"))


def replace_shard(folder, shard):
    index = load_index(str(folder))
    shards = (index.shards[0], shard, index.shards[2])
    write_index(str(folder), dataclasses.replace(index, shards=shards))


def change_shard(**changes):
    def change(folder):
        replace_shard(folder, dataclasses.replace(load_index(str(folder)).shards[1], **changes))

    return change


def change_samples(change, reindex):
    def plant(folder):
        content = samples(1)
        content = change(content) or content
        rewrite(folder, content, reindex)

    return plant


def append(name, data):
    def plant(folder):
        with tarfile.open(folder / "p1.tar", "a") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        replace_shard(folder, index_tar(folder / "p1.tar", "p1.tar"))

    return plant


def replace_png(data):
    return lambda content: content["s06"].update(png=data)


def change_id(folder):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id": "0" * 16}))


def lie_about_crc(folder):
    shard = load_index(str(folder)).shards[1]
    shard.members["png"].crc32[2] = zlib.crc32(b"another")
    replace_shard(folder, shard)


FAULTS = {
    "cut in an image": (cut, ["p1.tar", "'s06'"]),
    "cut between samples": (cut_between_samples, ["p1.tar", "'s06' and 1 more"]),
    "emptied": (lambda f: os.truncate(f / "p1.tar", 0), ["p1.tar: 0 bytes"]),
    "bit in an image": (flip_member("png", 2), ["p1.tar, sample 's06': .png", "crc32"]),
    "bit in a header": (flip_header, ["p1.tar, sample 's06': the tar header of .png"]),
    "bit in a label": (flip_member("cls", 2), ["p1.tar, sample 's06': .cls", "crc32"]),
    "missing shard": (lambda f: (f / "p1.tar").unlink(), ["p1.tar"]),
    "extra tar": (lambda f: write_tar(f / "x.tar", {}), ["x.tar: not in the index"]),
    "wrong size": (change_shard(bytes=2**20), ["p1.tar", "the index says 1048576"]),
    "wrong hash": (change_shard(sha256="0" * 64), ["p1.tar: sha256", "000000000000"]),
    "wrong order": (
        change_samples(lambda c: dict(sorted(c.items(), reverse=True)), reindex=False),
        ["p1.tar: sample 0 is 's07', the index says 's04'"],
    ),
    "sample lost": (
        change_samples(lambda c: {k: v for k, v in c.items() if k != "s07"}, reindex=False),
        ["p1.tar: sample 3 is None, the index says 's07'"],
    ),
    "key of another shard": (append("s09.png", png(50)), ["'s09' is in p1.tar and in p2.tar"]),
    "no image": (append("lonely.cls", b"1"), ["p1.tar: sample 'lonely' has no image"]),
    "bad image, right crc": (
        change_samples(replace_png(png(6)[:80]), reindex=True),
        ["p1.tar, sample 's06': ", "image"],
    ),
    "image of another size": (
        change_samples(replace_png(png(6, side=7)), reindex=True),
        ["p1.tar, sample 's06': shape (3, 7, 7), the index says (3, 6, 6)"],
    ),
    "leaves the folder": (append("../../x.png", png(50)), ["p1.tar: sample '../../x' leaves"]),
    "other id": (change_id, ["index.json: id 0000000000000000 does not match"]),
    "no index": (lambda f: (f / "index.json").unlink(), ["holds no index.json"]),
    "crc of the index": (lie_about_crc, ["p1.tar, sample 's06': .png", "crc32"]),
}


def test_a_sound_set_has_none(folder, capsys):
    assert list(find_faults(str(folder))) == []
    main([str(folder)])
    assert capsys.readouterr().out == f"no faults: 12 samples in {folder}\n"


@pytest.mark.parametrize("fault", FAULTS)
def test_names(fault, folder, capsys):
    plant, words = FAULTS[fault]
    plant(folder)
    faults = list(find_faults(str(folder)))
    assert any(all(word in text for word in words) for text in faults), faults
    assert not any("p0.tar" in text for text in faults)
    with pytest.raises(SystemExit, match=rf"verify_shards: {len(faults)} faults in "):
        main([str(folder)])
    assert capsys.readouterr().out.splitlines() == faults


def test_faults_of_all_shards_come_in_their_order(folder):
    for tar in range(3):
        flip(folder, place(folder, "png", 0, tar)[0] + 30, tar)
    found = [f for f in find_faults(str(folder)) if "crc32" in f]
    assert [fault.split("sample ")[1][:5] for fault in found] == ["'s00'", "'s04'", "'s08'"]


def test_names_that_an_index_has_are_not_judged_again(tmp_path):
    """Sets were made before such names counted as litter."""
    write_tar(tmp_path / "a.tar", {"@eaDir/a": {"png": png(1)}, "__MACOSX/b": {"png": png(2)}})
    write_index(str(tmp_path), ShardIndex((index_tar(tmp_path / "a.tar", "a.tar"),), (3, 6, 6)))
    assert load_index(str(tmp_path)).shards[0].keys == ["@eaDir/a", "__MACOSX/b"]
    assert list(find_faults(str(tmp_path))) == []


def test_a_tar_elsewhere_leaves_no_copy_behind(folder, tmp_path_factory, monkeypatch):
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    index = load_index(str(folder))
    other = tmp_path_factory.mktemp("index")
    write_index(str(other), ShardIndex(index.shards, (3, 6, 6), {}, str(folder)))
    assert list(find_faults(str(other))) == []
    flip_member("cls", 1)(folder)
    assert any(f"{folder}/p1.tar, sample 's05'" in fault for fault in find_faults(str(other)))
    assert list(Path(scratch).iterdir()) == []
