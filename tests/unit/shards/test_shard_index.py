import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from data_pipelines.index_shards import make_index
from data_pipelines.loading.dataset import ImageSet
from data_pipelines.storage import Location
from data_pipelines.verify_shards import find_faults
from data_pipelines.verify_shards import main as verify


class TestIndex:
    def test_of_foreign_tars_is_the_builder_s_own(self, shards):
        built = ShardDataset.open(shards).index
        made = make_index(shards)
        assert made.id == built.id
        assert made.image_shape == built.image_shape
        assert ImageSet(shards, made).keys == ImageSet(shards, built).keys

    def test_is_found_by_path_too_and_the_set_s_uri_is_text(self, shards):
        for place in (Path(shards), Location.parse(shards)):
            assert ShardDataset.open(place).uri == shards

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 99}, "format version 99; this package reads 1"),
            ({"id": "0" * 16}, "does not match its shards"),
            ({"shards": [{}]}, r"not a shard index \(shards.0.name: Field required"),
            ({"image_shape": [3, 0, 8]}, "image_shape"),
        ],
    )
    def test_a_wrong_index_is_refused(self, shards, change, message):

        path = Path(shards) / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            ShardDataset.open(shards)

    def test_text_that_is_not_an_index_is_refused(self, tmp_path):
        for text in ("", "[]", "nonsense", "\x00"):
            (tmp_path / "index.json").write_text(text)
            with pytest.raises(ValueError, match="not a shard index"):
                ShardDataset.open(str(tmp_path))

    def test_every_truncation_of_a_tar_is_noticed(self, shards, tmp_path):

        whole = (Path(shards) / "shard-000000.tar").read_bytes()
        content = len(whole.rstrip(b"\0"))
        for length in range(0, content + 1, 256):
            (tmp_path / "x.tar").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"x\.tar"):
                make_index(str(tmp_path))


class TestVerify:
    def test_a_sound_set_passes(self, folder, shards, tmp_path, capsys):
        verify([shards])
        assert "no faults: 23 samples" in capsys.readouterr().out
        build_shards(f"folder:{folder}", f"{tmp_path}/split", held_out=3)
        verify([f"{tmp_path}/split"])
        assert "20 samples" in capsys.readouterr().out

    def test_every_single_damaged_byte_of_a_sample_is_found(self, shards):

        path = Path(shards) / "shard-000001.tar"
        whole = path.read_bytes()
        for position in range(0, 3000, 97):
            data = bytearray(whole)
            data[position] ^= 0x55
            path.write_bytes(data)
            assert any("shard-000001.tar" in fault for fault in find_faults(shards))

    def test_names_missing_extra_and_exits_1(self, shards, capsys):

        (Path(shards) / "shard-000002.tar").rename(Path(shards) / "extra.tar")
        with pytest.raises(SystemExit) as error:
            verify([shards])
        assert error.value.code != 0
        out = capsys.readouterr().out
        assert "extra.tar: not in the index" in out
        assert "shard-000002.tar" in out

    def test_nothing_there_exits_1(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            verify([str(tmp_path)])
        assert "holds no index.json" in capsys.readouterr().out


def test_importing_the_package_is_cheap():
    code = "import data_pipelines, sys; sys.exit('torch' in sys.modules or 'fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
