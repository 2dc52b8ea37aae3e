import errno
import json
import os
import re
import resource
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards, main, split_entries
from data_pipelines.building import unfinished
from data_pipelines.building.sample_encoding import Encoding, Entry
from data_pipelines.building.sources import ImageFolder, open_source
from data_pipelines.shards.index import write_index
from data_pipelines.shards.intake import SourceFaults, Tolerance
from data_pipelines.storage.retries import StorageError
from data_pipelines.verify_shards import find_faults


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

    def test_a_held_out_part_smaller_than_every_family_is_refused(self):
        entries = [Entry(f"n{n}.{kind}", f"n{n}", None) for n in range(3) for kind in "ab"]
        with pytest.raises(ValueError, match=r"--held-out 1: .* smallest family, 'n0', has 2"):
            split_entries(entries, 1)
        assert len(split_entries(entries, 2)["held_out"]) == 2

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

    def test_all_faults_are_found_in_one_run_and_skipped_on_request(self, folder, tmp_path, capsys):
        source, output = tmp_path / "source", tmp_path / "set"
        shutil.copytree(folder, source)
        bad = [f"n{number:02d}.png" for number in (1, 5, 11, 22)]
        for name in bad:
            (source / name).write_bytes((source / name).read_bytes()[:50])
        (source / "z.heic").write_bytes(b"x")
        with pytest.raises(SourceFaults) as error:
            build_shards(f"folder:{source}", str(output), samples_per_shard=4, held_out=6)
        assert sorted(f"{f}: ".split(": ")[0].rpartition("/")[2] for f in error.value.faults) == [
            *bad,
            "z.heic",
        ]
        assert (output / "faults.txt").read_text().splitlines() == error.value.faults
        assert "1 images cannot be used; reading the others" in capsys.readouterr().err
        assert not list(output.rglob("index.json"))
        with pytest.raises(SourceFaults):
            build_shards(f"folder:{source}", str(output), None, 4, 6, tolerance=Tolerance(4))
        text = build_shards(f"folder:{source}", str(output), None, 4, 6, tolerance=Tolerance(5))
        assert f"5 bad images left out, listed in {output}/faults.txt" in text
        assert re.search(r"4 x bad image \(such as n\d\d\.png\)", text)
        keys = [
            key
            for part in ("train", "held_out")
            for key in ShardDataset.open(f"{output}/{part}").keys
        ]
        assert sorted(keys) == [
            f"n{number:02d}" for number in range(23) if f"n{number:02d}.png" not in bad
        ]
        assert not list(find_faults(f"{output}/train"))
        statistics = json.loads((output / "train/statistics.json").read_text())
        assert statistics["left_out"]["bad image"]["count"] >= 1

    def test_a_full_folder_for_temporary_files_is_named(self, folder, tmp_path):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limit[1]))
        try:
            with pytest.raises(
                StorageError, match=r"no space to pack shard-000000\.tar.*set TMPDIR"
            ):
                build_shards(f"folder:{folder}", str(tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def test_mended_files_are_built_under_the_same_output(self, folder, tmp_path):
        source, output = tmp_path / "source", tmp_path / "set"
        shutil.copytree(folder, source)
        good = (source / "n03.png").read_bytes()
        (source / "n03.png").write_bytes(good[:50])
        with pytest.raises(SourceFaults, match=r"n03\.png"):
            build_shards(f"folder:{source}", str(output), samples_per_shard=4)
        (output / "mine.txt").write_text("mine")
        (source / "n03.png").write_bytes(good)
        for number in range(4, 12):  # two shards fewer than before
            (source / f"n{number:02d}.png").unlink()
        with pytest.raises(ValueError, match="resolution None instead of 4"):
            build_shards(f"folder:{source}", str(output), 4, 4)
        build_shards(f"folder:{source}", str(output), samples_per_shard=4)
        build_shards(f"folder:{source}", f"{tmp_path}/afresh", samples_per_shard=4)
        (output / "mine.txt").unlink()
        assert contents(output) == contents(tmp_path / "afresh")

    def test_a_file_on_a_damaged_disk_is_a_fault_of_that_file(self, folder, tmp_path, monkeypatch):
        pread, fault = os.pread, {"number": errno.EIO}

        def read_from_damaged_disk(file, *place):
            if Path(f"/proc/self/fd/{file}").readlink() == folder / "n03.png":
                raise OSError(fault["number"], os.strerror(fault["number"]))
            return pread(file, *place)

        monkeypatch.setattr(os, "pread", read_from_damaged_disk)
        with pytest.raises(SourceFaults) as error:
            build_shards(f"folder:{folder}", f"{tmp_path}/set")
        assert error.value.faults == [f"{folder}/n03.png: cannot be read (Input/output error)"]
        for number in (errno.EMFILE, errno.ESTALE):  # not the file's
            fault["number"] = number
            with pytest.raises(OSError, match=rf"{os.strerror(number)}: .*n03\.png"):
                build_shards(f"folder:{folder}", f"{tmp_path}/set", tolerance=Tolerance(9))

    def test_a_file_that_was_mended_at_equal_size_is_read_again(self, folder, tmp_path):
        source, output = tmp_path / "source", tmp_path / "set"
        shutil.copytree(folder, source)
        good = {name: (source / name).read_bytes() for name in ("n03.png", "n07.png")}
        for name, data in good.items():
            (source / name).write_bytes(bytes(len(data)))
        with pytest.raises(SourceFaults, match="2 faults"):
            build_shards(f"folder:{source}", str(output), None, 4, tolerance=Tolerance(1))
        (source / "n03.png").write_bytes(good["n03.png"])
        text = build_shards(f"folder:{source}", str(output), None, 4, tolerance=Tolerance(1))
        assert "1 bad images left out" in text
        assert "n07.png" in (output / "faults.txt").read_text()
        assert len(ShardDataset.open(str(output))) == 22

    def test_an_interrupted_build_keeps_shards_with_faults(self, folder, tmp_path):
        source, output = tmp_path / "source", tmp_path / "set"
        shutil.copytree(folder, source)
        good = (source / "n03.png").read_bytes()
        for name in ("n03.png", "n07.png"):
            (source / name).write_bytes(bytes((source / name).stat().st_size))
        with pytest.raises(SourceFaults, match="2 faults"):
            build_shards(f"folder:{source}", str(output), None, 4, tolerance=Tolerance(1))
        sorted((output / ".unfinished").glob("*.tar.json"))[-1].unlink()  # as if not reached
        (source / "n03.png").write_bytes(good)
        text = build_shards(f"folder:{source}", str(output), None, 4, tolerance=Tolerance(2))
        assert "2 bad images left out" in text  # n03 belongs to a shard that was kept

    def test_a_restart_between_the_sets_keeps_the_report(self, folder, tmp_path, monkeypatch):
        source, output = tmp_path / "source", tmp_path / "set"
        shutil.copytree(folder, source)
        for number in range(1, 23, 2):
            (source / f"n{number:02d}.png").write_bytes(b"")
        (source / "notes.txt").write_text("")
        options = {"samples_per_shard": 4, "held_out": 10, "tolerance": Tolerance(20)}
        build_shards(f"folder:{source}", f"{tmp_path}/whole", **options)
        write = write_index

        def write_one(folder, index):
            if str(folder).endswith("train"):
                raise KeyboardInterrupt
            write(folder, index)

        monkeypatch.setattr("data_pipelines.build_shards.write_index", write_one)
        with pytest.raises(KeyboardInterrupt):
            build_shards(f"folder:{source}", str(output), **options)
        monkeypatch.undo()
        text = build_shards(f"folder:{source}", str(output), **options)
        assert not list(output.glob("*/.unfinished"))
        assert "11 bad images left out" in text
        assert "11 x bad image" in text
        assert "1 x not an image file (.txt)" in text
        assert contents(output) == contents(tmp_path / "whole")
        assert len((output / "faults.txt").read_text().splitlines()) == 11

    def test_what_was_skipped_is_known_after_a_restart(self, folder, tmp_path, monkeypatch):
        source, output = tmp_path / "source", tmp_path / "set"
        shutil.copytree(folder, source)
        (source / "n03.png").write_bytes(b"")
        clear = unfinished.clear
        monkeypatch.setattr(unfinished, "clear", lambda uri: sys.exit("killed"))
        with pytest.raises(SystemExit):
            build_shards(
                f"folder:{source}", str(output), samples_per_shard=4, tolerance=Tolerance(1)
            )
        (output / "index.json").unlink()
        monkeypatch.setattr(unfinished, "clear", clear)
        with pytest.raises(SourceFaults, match=r"n03\.png"):
            build_shards(f"folder:{source}", str(output), samples_per_shard=4)
        text = build_shards(f"folder:{source}", str(output), None, 4, tolerance=Tolerance(1))
        assert "1 bad images left out" in text
        assert len(ShardDataset.open(str(output))) == 22

    @pytest.mark.parametrize("damage", [b"", b'{"format": "efae', b"\xff", b"[]", b"{}"])
    def test_a_shard_whose_record_a_power_cut_emptied_is_made_again(
        self, folder, tmp_path, monkeypatch, damage
    ):
        options = {"samples_per_shard": 4}
        build_shards(f"folder:{folder}", f"{tmp_path}/whole", **options)
        monkeypatch.setattr(unfinished, "clear", lambda uri: sys.exit("killed"))
        with pytest.raises(SystemExit):
            build_shards(f"folder:{folder}", f"{tmp_path}/set", **options)
        monkeypatch.undo()
        (tmp_path / "set/index.json").unlink()
        (tmp_path / "set/.unfinished/shard-000002.tar.json").write_bytes(damage)
        kept = (tmp_path / "set/shard-000001.tar").stat()
        build_shards(f"folder:{folder}", f"{tmp_path}/set", **options)
        assert contents(tmp_path / "set") == contents(tmp_path / "whole")
        assert (tmp_path / "set/shard-000001.tar").stat() == kept

    def test_a_run_after_one_cut_off_at_its_very_end_clears_up(self, folder, tmp_path, monkeypatch):
        clear = unfinished.clear
        monkeypatch.setattr(unfinished, "clear", lambda uri: sys.exit("killed"))
        with pytest.raises(SystemExit):
            build_shards(f"folder:{folder}", str(tmp_path), held_out=5)
        monkeypatch.setattr(unfinished, "clear", clear)
        assert list(tmp_path.glob("*/.unfinished"))
        assert "nothing to do" in build_shards(f"folder:{folder}", str(tmp_path), held_out=5)
        assert not list(tmp_path.glob("*/.unfinished"))

    def test_the_command_says_what_it_did_not_take(self, folder, tmp_path, capsys):
        source = tmp_path / "source"
        shutil.copytree(folder, source)
        (source / "notes.txt").write_text("x")
        for number in range(22):
            (source / f"bad{number:02d}.png").write_bytes(b"x")
        command = ["--source", f"folder:{source}", "--output", f"{tmp_path}/set", "--on=here"]
        with pytest.raises(SystemExit, match=r"22 faults .* or use --bad-images skip"):
            main(command)
        assert capsys.readouterr().out.splitlines()[20] == "… and 2 more"
        main([*command, "--bad-images", "skip"])
        said = capsys.readouterr().out
        assert "22 x bad image (such as " in said
        assert "1 x not an image file (.txt) (such as notes.txt)" in said
        with pytest.raises(SystemExit, match=r"22 faults in .*, more than --most-bad-images 21"):
            main([*command[:3], f"{tmp_path}/b", "--bad-images", "skip", "--most-bad-images", "21"])

    @pytest.mark.parametrize("kind", ["folder", "wds"])
    def test_labels_are_the_ranks_of_folders(self, folder, tmp_path, kind):
        source, output, labels = tmp_path / "in", tmp_path / "set", Encoding(labels="folders")
        places = {f"n{n:02d}": f"{'bac'[n % 3]}/{n % 2}/n{n:02d}" for n in range(23)}
        for name, place in places.items():
            (source / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{name}.png", source / f"{place}.png")

        def build(name="set", origin=source, **options):
            if kind == "wds":
                with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
                    for path in sorted(origin.rglob("*.*")):
                        tar.add(path, path.relative_to(origin))
                (tmp_path / name / "in").mkdir(parents=True)
                origin = (tmp_path / f"{name}.tar").rename(tmp_path / name / "in/x.tar").parent
            build_shards(f"{kind}:{origin}", f"{tmp_path}/{name}", **options)

        build(held_out=5, encoding=labels)
        for part, count in (("train", 18), ("held_out", 5)):
            images = ShardDataset.open(output / part)
            assert images.index.provenance["classes"] == ["a", "b", "c"]
            batch = next(iter(images.loader(count, members=("cls",))))
            for key, label in zip(batch.key, batch.members["cls"], strict=True):
                assert places[key[-3:]][0] == "abc"[int(label)]
            assert len(batch.key) == count
        for name in ("x", "y"):
            shutil.copy(folder / "n00.png", source / f"{name}.png")
        damaged = source / "a/0/damaged.png"
        damaged.write_bytes(b"no image")
        with pytest.raises(SourceFaults) as error:
            build("other", encoding=labels)
        named = [re.search(r"\b([xy]|damaged)\b", fault)[0] for fault in error.value.faults]
        assert sorted(named) == ["damaged", "x", "y"]
        assert len((tmp_path / "other/faults.txt").read_text().splitlines()) == 3
        damaged.unlink()
        build("skips", encoding=labels, tolerance=Tolerance(2))
        assert len(ShardDataset.open(tmp_path / "skips")) == 23
        (source / f"{places['n00']}.cls").write_text("7")
        if kind == "wds":
            with pytest.raises(SourceFaults, match=r"n00.*has a label of its own"):
                build("own", encoding=labels, tolerance=Tolerance(2))
        shutil.copytree(source / "a", tmp_path / "one_class/a")
        with pytest.raises(ValueError, match=r"all images are in the folder 'a'"):
            build("one", tmp_path / "one_class", encoding=labels)

    @pytest.mark.parametrize("refused", ["heic", "broken link", "unreadable", "damaged"])
    def test_a_class_without_a_usable_image_does_not_shift_the_others(
        self, folder, tmp_path, refused
    ):
        for name in "abc":
            (tmp_path / "in" / name).mkdir(parents=True)
            shutil.copy(folder / "n01.png", tmp_path / f"in/{name}/{name}.png")
        image = tmp_path / "in/b/b.png"
        if refused == "heic":
            image.rename(image.with_suffix(".heic"))
        elif refused == "broken link":
            image.unlink()
            image.symlink_to("nowhere")
        elif refused == "unreadable":
            shutil.rmtree(image.parent)
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/b\xc9.")).mkdir()
        else:
            image.write_bytes(b"damaged")
        source, options = f"folder:{tmp_path}/in", {"encoding": Encoding(labels="folders")}
        build_shards(source, f"{tmp_path}/set", **options, tolerance=Tolerance(1))
        images = ShardDataset.open(f"{tmp_path}/set")
        first, *others = images.index.provenance["classes"]
        assert (first, others[0][0], others[1]) == ("a", "b", "c")
        (batch,) = images.loader(2, members=("cls",), shuffle=False)
        labels = dict(zip(batch.key, batch.members["cls"], strict=True))
        assert labels == {"a/a": b"0", "c/c": b"2"}
        if refused != "damaged":  # that one is in the listing, with its size
            shutil.rmtree(next((tmp_path / "in").glob("b*")))
            with pytest.raises(ValueError, match=r"already holds shards with files"):
                build_shards(source, f"{tmp_path}/set", **options, tolerance=Tolerance(1))

    def test_a_class_of_faulty_samples_does_not_shift_the_others(self, folder, tmp_path):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name in ("a/a.png", "b/b.heic", "c/c.png"):
                tar.add(folder / "n01.png", name)
        options = {"encoding": Encoding(labels="folders"), "tolerance": Tolerance(1)}
        build_shards(f"wds:{tmp_path}", f"{tmp_path}/set", **options)
        images = ShardDataset.open(f"{tmp_path}/set")
        assert images.index.provenance["classes"] == ["a", "b", "c"]
        (batch,) = images.loader(2, members=("cls",), shuffle=False)
        assert sorted(batch.members["cls"]) == [b"0", b"2"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--source", "nonsense", "--output", "x"], "unknown source 'nonsense'"),
            (["--source", "mnist", "--output", "pipe:x"], "'pipe' is refused"),
            (["--source", "mnist", "--output", "x", "--resolution", "0"], "--resolution 0"),
            (["--source", "mnist", "--output", "x", "--held-out", "-1"], "--held-out -1"),
            (["--source=mnist", "--output=x", "--labels=folders"], "mnist has no folders"),
        ],
    )
    def test_the_command_ends_with_one_line(self, arguments, message):
        with pytest.raises(SystemExit, match=message) as error:
            main(arguments)
        assert "\n" not in str(error.value)
