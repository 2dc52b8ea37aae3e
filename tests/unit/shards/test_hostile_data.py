"""Tars, indexes and checkpoints made to harm their reader: refused in time, and nothing is run."""

import hashlib
import io
import json
import random
import struct
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.build_shards import build_shards
from data_pipelines.building.checks import TarChecks, check_tar
from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import index_shards
from data_pipelines.loading.dataset import ShardDataset
from data_pipelines.shards.index import VERSION, parse_index
from data_pipelines.storage import Location
from data_pipelines.verify_shards import find_faults
from efae.checkpoints.checkpoint import (
    CHECKPOINT_FILES,
    CheckpointError,
    read_checkpoint,
    write_checkpoint,
)
from efae.checkpoints.events import read_events, record_event
from efae.presets import PRESETS
from tests.planted import make_pickle

CONFIG = PRESETS["quickstart"][1]
PNG = encode_png(np.zeros((8, 8, 3), np.uint8))
LINK_TO_NOTHING = b"A"  # a type that tarfile neither knows nor takes for a file
END = b"\0" * 10240


def make_header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """One block of a tar, of any size, also a negative one."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = b"\xff" * 4 + struct.pack(">q", size) if size < 0 else b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    return fill_in_sum(block)


def fill_in_sum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def make_pax(payload: bytes, kind: bytes = b"x") -> bytes:
    whole_blocks = -(-len(payload) // 512) * 512
    return make_header(b"pax", len(payload), kind) + payload.ljust(whole_blocks, b"\0")


FOLDER = make_header(b"folder", 0, b"5")
IMAGE = make_header(b"a.png", 512) + b"1" * 512
SPARSE = make_header(b"sparse.png", 512, b"S")
TARS = {
    "a negative size, back to its own header": FOLDER + make_header(b"a", -512, LINK_TO_NOTHING),
    "a negative size, before the start": make_header(b"a", -1024, LINK_TO_NOTHING),
    "a pax header with a negative size": FOLDER
    + make_pax(b"14 size=-1536\n")
    + make_header(b"a", 0, LINK_TO_NOTHING),
    "a pax header that is slow to parse": make_pax(b"1" * 400_000) + make_header(b"a.png", 0),
    "one size for all": make_pax(b"11 size=10\n", b"g") + IMAGE,
    "one name for all": make_pax(b"14 path=b.png\n", b"g") + IMAGE,
    "a size that is no number": make_pax(b"12 size=0x9\n") + IMAGE,
    "a later volume": make_pax(b"24 GNU.volume.offset=18\n", b"g") + IMAGE,
    "a size beyond the end": make_header(b"a.png", 8**11 - 1),
    "a sparse file, cut off": fill_in_sum(
        bytearray(SPARSE[:482] + b"\1" + SPARSE[483:])  # it says that more of its map follows
    ),
}


@pytest.mark.timeout(20)  # without its defence a case takes hours, or for ever
@pytest.mark.parametrize("tar", TARS.values(), ids=TARS)
def test_a_tar_that_would_hold_up_its_reader_is_refused(tar: bytes, tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(tar if tar == TARS["a sparse file, cut off"] else tar + END)
    began = time.monotonic()
    record, faults = check_tar(TarChecks(Location.parse(tmp_path)), "a.tar")
    assert record is None
    assert len(faults) == 1
    assert "a.tar is not a plain, whole tar" in faults[0]
    assert time.monotonic() - began < 5


@pytest.mark.timeout(60)
def test_no_change_of_a_header_brings_more_than_a_fault(tmp_path: Path):
    """Headers changed at random, with their sums made right again: a record or faults, no more."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a" * 150 + ".png", "é.png"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"12345"))
    generator = random.Random(0)
    refused = 0
    for _ in range(400):
        data = bytearray(generator.choice([file.getvalue()[:6144], SPARSE + END[:1024]]))
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(data) // 512) * 512
            data[at + generator.randrange(512)] = generator.randrange(256)
            data[at + 156] = generator.choice(b"0123456789SxgXLKADMNV\0")
            data[at : at + 512] = fill_in_sum(data[at : at + 512])
        (tmp_path / "a.tar").write_bytes(data[: generator.choice([None, 700, 1300])])
        record, faults = check_tar(TarChecks(Location.parse(tmp_path)), "a.tar")
        refused += record is None
        assert (record is None) == bool(faults)
    assert refused > 300


def make_index(shard: dict[str, Any] | None = None, place: Any = (512, 5), **changes: Any) -> bytes:
    """An index of one sample, with the id that belongs to it."""
    offset, size = place
    one = {"name": "a.tar", "bytes": 10240, "sha256": "0" * 64, "keys": ["k"]}
    one["members"] = {"png": {"offset": [offset], "size": [size], "crc32": [0]}}
    one |= shard or {}
    content = json.dumps([VERSION, [[one["name"], one["sha256"], 1]]])
    tree = {
        "format": "efae-shards",
        "version": VERSION,
        "id": hashlib.sha256(content.encode()).hexdigest()[:16],
        "image_shape": [3, 32, 32],
        "provenance": {},
        "shards": [one],
    }
    return json.dumps(tree | changes).encode()


def test_the_index_that_is_changed_below_is_a_good_one():
    assert parse_index(make_index(), "here").shards[0].keys == ["k"]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (make_index({"name": "../a.tar"}), "leaves the folder"),
        (make_index({"name": "/etc/a.tar"}), "leaves the folder"),
        (make_index({"sha256": "../../planted"}), "sha256"),
        (make_index({"sha256": "/tmp/planted"}), "sha256"),
        (make_index({"sha256": "0" * 64 + "\n"}), "sha256"),
        (make_index({"bytes": 2**70}), "bytes"),
        (make_index(place=(2**63 - 1, 2)), "beyond the shard's end"),
        (make_index(place=(2**64, 2)), "too large"),
        (make_index(place=(-512, 5)), "before the shard's start"),
        (make_index(place=(512, -1000)), "before the shard's start"),
        (make_index(image_shape=[3, 10**6, 10**6]), "pixels"),
        (make_index(base="/etc"), "base '/etc' is a local path"),
        (make_index(base="pipe:touch planted"), "'pipe' is refused"),
        (b"[" * 200_000, "is not a shard index"),
    ],
    ids=[
        *("name: above", "name: absolute", "sha256: above", "sha256: absolute", "sha256: newline"),
        *("bytes", "end overflows", "offset overflows", "offset below 0", "size below 0"),
        *("shape", "base: local", "base: pipe", "nested too deep"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(index: bytes, said: str):
    with pytest.raises(ValueError, match=said):
        parse_index(index, "s3://bucket/set/index.json")


def test_a_pickle_in_a_shard_stays_bytes(tmp_path: Path):
    """Under each name that WebDataset would unpickle by, through all that reads a shard."""
    trace = tmp_path / "unpickled"
    data = make_pickle(trace)
    names = ("pkl", "pyd", "pickle", "pth", "pt", "ten")
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key in "ab":
            for name, content in (("png", PNG), *((name, data) for name in names)):
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index_shards(str(folder))
    assert list(find_faults(str(folder))) == []
    dataset = ShardDataset.open(str(folder))
    (batch,) = dataset.loader(2, members=names)
    assert batch.members == {name: [data, data] for name in names}
    build_shards(f"wds:{folder}", str(tmp_path / "built"))
    assert not trace.exists()


@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_a_pickle_in_a_checkpoint_is_refused(file: str, tmp_path: Path):
    """Put there together with its hash, as who may write to the storage can."""
    trace, uri = tmp_path / "unpickled", tmp_path / "step-00000001"
    weights = {"w": torch.zeros(2)}
    write_checkpoint(
        uri, model=weights, ema=weights, optimizer={}, metadata={"step": 1}, config=CONFIG
    )
    assert read_checkpoint(uri).metadata == {"step": 1}
    data = make_pickle(trace)
    (uri / file).write_bytes(data)
    manifest = json.loads((uri / "manifest.json").read_text())
    manifest["files"][file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (uri / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{file} is not"):
        read_checkpoint(uri)
    assert not trace.exists()


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "config.json"])
def test_json_that_is_nested_too_deep_is_refused(file: str, tmp_path: Path):
    uri, data = tmp_path / "step-00000001", b"[" * 200_000
    write_checkpoint(uri, model={}, ema={}, optimizer={}, metadata={"step": 1}, config=CONFIG)
    (uri / file).write_bytes(data)
    if file != "manifest.json":
        manifest = json.loads((uri / "manifest.json").read_text())
        manifest["files"][file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (uri / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{file} is not"):
        read_checkpoint(uri)


def test_what_is_no_event_does_not_end_the_run_that_reads_it(tmp_path: Path):
    record_event(str(tmp_path), "start", "2 workers begin", world_size=2)
    for number, data in enumerate(
        [b"{", b"[]", b"{}", b'{"time": "x", "kind": 1, "facts": {"what": 1}}', b"[" * 200_000]
    ):
        (tmp_path / f"events/{number}.json").write_bytes(data)
    (event,) = read_events(str(tmp_path))
    assert event.facts == {"what": "2 workers begin", "world_size": 2}
