"""Which checkpoint of a run is used, and which are kept."""

import pytest

from efae.checkpoints import checkpoint
from efae.checkpoints.checkpoint import CheckpointError
from efae.checkpoints.run_folder import (
    find_newest_checkpoint,
    prune_checkpoints,
    read_newest_checkpoint,
    read_newest_origin,
    warn_of_damage,
)
from tests.unit.checkpoints.test_checkpoint import ALL_FILES, damage, make_state, write


def test_the_newest_is_found_by_step_among_other_files(tmp_path):
    assert find_newest_checkpoint(str(tmp_path)) is None
    for step in (100, 20):
        write(tmp_path, step)
    (tmp_path / "step-latest").mkdir()
    (tmp_path / "step-latest" / checkpoint.MANIFEST).write_text("{}")
    (tmp_path / "result.json").write_text("{}")
    assert find_newest_checkpoint(str(tmp_path)) == str(tmp_path / "step-00000100")


@pytest.mark.parametrize("written", range(len(ALL_FILES)))
def test_a_writer_killed_after_any_file_leaves_no_checkpoint(tmp_path, written, caplog):
    """Files are written in this order: with fewer than all of them, the one before is newest."""
    before, half = write(tmp_path, 10), write(tmp_path, 20)
    for name in ALL_FILES[written:]:
        (half / name).unlink()
    assert find_newest_checkpoint(str(tmp_path)) == str(before)
    assert written == 0 or "half-written" in caplog.text


@pytest.mark.parametrize("name", checkpoint.CHECKPOINT_FILES)
def test_an_upload_cut_short_leaves_no_checkpoint(tmp_path, name):
    """Uploads run in parallel: the manifest may arrive before the last byte of another file."""
    before, half = write(tmp_path, 10), write(tmp_path, 20)
    (half / name).write_bytes((half / name).read_bytes()[:-1])
    assert find_newest_checkpoint(str(tmp_path)) == str(before)


@pytest.mark.parametrize("name", [checkpoint.EMA, checkpoint.MANIFEST])
def test_a_damaged_newest_falls_back_loudly(tmp_path, caplog, name):
    for step in (10, 20):
        write(tmp_path, step)
    if name == checkpoint.MANIFEST:
        (tmp_path / "step-00000020" / name).write_text("{")
    else:
        damage(tmp_path / "step-00000020" / name)
    found = read_newest_checkpoint(str(tmp_path), warn_of_damage)
    assert found is not None
    assert found[0] == str(tmp_path / "step-00000010")
    assert found[1].metadata["step"] == 10
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "step-00000020" in caplog.text


def test_damage_everywhere_is_an_error_not_a_fresh_start(tmp_path):
    assert read_newest_checkpoint(str(tmp_path), warn_of_damage) is None
    for step in (10, 20):
        damage(write(tmp_path, step) / checkpoint.MODEL)
    with pytest.raises(CheckpointError, match="step-00000010"):
        read_newest_checkpoint(str(tmp_path), warn_of_damage)


def list_steps(run):
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def write_scored(run, step, **scores):
    checkpoint.write_checkpoint(
        run / checkpoint.checkpoint_name(step), **make_state(step), scores=scores
    )


@pytest.mark.parametrize(
    ("best_by", "kept"), [("", [40, 50]), ("psnr", [20, 40, 50]), ("loss", [30, 40, 50])]
)
def test_the_newest_and_the_best_are_kept(tmp_path, best_by, kept):
    for step, psnr, loss in ((10, 3.0, 0.5), (20, 9.0, 0.4), (30, 8.0, 0.1)):
        write_scored(tmp_path, step, psnr=psnr, loss=loss)
    write_scored(tmp_path, 40)  # before the first look
    write_scored(tmp_path, 50, psnr=7.0, loss=0.3)
    prune_checkpoints(str(tmp_path), 50, 2, best_by)
    assert list_steps(tmp_path) == kept


def test_half_written_ones_go_and_later_ones_stay(tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    (tmp_path / "step-00000020" / checkpoint.MODEL).unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    prune_checkpoints(str(tmp_path), 30, 2)
    assert list_steps(tmp_path) == [10, 30, 40]
    assert (tmp_path / "other" / "file").exists()


def test_the_origin_falls_back_too_but_does_not_read_the_weights(tmp_path, caplog):
    for step in (10, 20, 30):
        write(tmp_path, step)
    damage(tmp_path / "step-00000030" / checkpoint.STATE)
    damage(tmp_path / "step-00000020" / checkpoint.MODEL)
    found = read_newest_origin(str(tmp_path))
    assert found is not None
    assert found[1][0]["step"] == 20
    assert "step-00000030" in caplog.text
    assert read_newest_origin(str(tmp_path / "nothing")) is None
