import pytest

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards, main, split_entries
from data_pipelines.image_sources import ImageFolder, open_source


def contents(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


class TestBuild:
    def test_is_reproducible_and_a_second_run_does_nothing(self, folder, tmp_path, monkeypatch):
        for name in ("a", "b"):
            build_shards(f"folder:{folder}", f"{tmp_path}/{name}", samples_per_shard=5, held_out=6)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
        monkeypatch.setattr(ImageFolder, "list_entries", None)  # would raise if it were called
        text = build_shards(f"folder:{folder}", f"{tmp_path}/a", samples_per_shard=5, held_out=6)
        assert "nothing to do" in text
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}

    def test_splits_exactly_and_completely(self, folder, tmp_path):
        build_shards(f"folder:{folder}", str(tmp_path), held_out=6)
        train = ShardDataset.open(f"{tmp_path}/train").keys
        held_out = ShardDataset.open(f"{tmp_path}/held_out").keys
        assert len(held_out) == 6
        assert sorted(train + held_out) == [f"n{number:02d}" for number in range(23)]
        assert train != sorted(train)
        with pytest.raises(ValueError, match=rf"open {tmp_path}/train or {tmp_path}/held_out"):
            ShardDataset.open(str(tmp_path))

    @pytest.mark.parametrize("held_out", [1, 100, 512])
    def test_families_stay_on_one_side(self, held_out):
        parts = split_entries(open_source("openmoji").list_entries(), held_out)
        families = {name: {entry.family for entry in part} for name, part in parts.items()}
        assert len(parts["held_out"]) == held_out
        assert len(parts["train"]) == 4495 - held_out
        assert not families["train"] & families["held_out"]

    def test_goes_on_where_it_was_cut_off(self, folder, tmp_path, monkeypatch):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        build_shards(f"folder:{folder}", str(whole), samples_per_shard=5)
        load = ImageFolder.load
        calls = []

        def load_until_killed(self, entry, resolution):
            calls.append(entry.key)
            if len(calls) == 12:
                raise KeyboardInterrupt
            return load(self, entry, resolution)

        monkeypatch.setattr(ImageFolder, "load", load_until_killed)
        with pytest.raises(KeyboardInterrupt):
            build_shards(f"folder:{folder}", str(cut), samples_per_shard=5)
        with pytest.raises(ValueError, match=r"holds no index\.json"):
            ShardDataset.open(str(cut))
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"unfinished.*samples_per_shard 5 instead of 6"):
            build_shards(f"folder:{folder}", str(cut), samples_per_shard=6)
        calls.clear()
        monkeypatch.setattr(
            ImageFolder, "load", lambda *args: calls.append(args[1].key) or load(*args)
        )
        build_shards(f"folder:{folder}", str(cut), samples_per_shard=5)
        assert len(calls) == 23 - 2 * 5
        assert contents(cut) == contents(whole)

    def test_refuses_an_output_built_from_something_else(self, folder, shards, tmp_path):
        with pytest.raises(ValueError, match=r"resolution None instead of 4.*delete that one"):
            build_shards(f"folder:{folder}", shards, samples_per_shard=5, resolution=4)
        with pytest.raises(ValueError, match="held_out 0 instead of 3"):
            build_shards(f"folder:{folder}", shards, samples_per_shard=5, held_out=3)
        (tmp_path / "other").mkdir()
        (tmp_path / "other/mine.tar").write_bytes(b"mine")
        with pytest.raises(ValueError, match="not written by this command"):
            build_shards(f"folder:{folder}", f"{tmp_path}/other")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--source", "nonsense", "--output", "x"], "unknown source 'nonsense'"),
            (["--source", "mnist", "--output", "pipe:x"], "'pipe' is refused"),
            (["--source", "mnist", "--output", "x", "--resolution", "0"], "--resolution 0"),
            (["--source", "mnist", "--output", "x", "--held-out", "-1"], "--held-out -1"),
        ],
    )
    def test_the_command_ends_with_one_line(self, arguments, message):
        with pytest.raises(SystemExit, match=message) as error:
            main(arguments)
        assert "\n" not in str(error.value)
