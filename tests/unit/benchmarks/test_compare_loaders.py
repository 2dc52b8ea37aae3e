"""The arithmetic of the loader benchmark: what is added up, and what a ratio is taken to."""

import numpy as np
import pytest

from benchmarks.compare_loaders import Arguments, Case, add_ranks, list_cases, summarize
from benchmarks.loaders import Task
from benchmarks.loaders.measure import check_batch


def one_round(rate: float) -> dict[str, float]:
    return {"samples_per_cpu_second": rate, "samples_per_second": rate, "share_of_epoch": 1.0}


def test_ranks_add_their_cpu_time_and_wait_for_the_slowest():
    found = add_ranks(
        [
            {"images": 60, "cpu_seconds": 1.0, "wall_seconds": 2.0, "opening_cpu_seconds": 0.5},
            {"images": 40, "cpu_seconds": 3.0, "wall_seconds": 5.0, "opening_cpu_seconds": 0.25},
        ],
        samples=100,
    )
    assert found["samples_per_cpu_second"] == 25
    assert found["samples_per_second"] == 20
    assert found["share_of_epoch"] == 1
    assert found["opening_cpu_seconds"] == 0.75


def test_a_ratio_is_to_the_best_stock_pipeline_of_the_same_kind():
    rows = summarize(
        {
            Case("ours", True, 1): [one_round(800), one_round(900), one_round(100)],
            Case("webdataset, rgb8", True, 1): [one_round(100)],
            Case("webdataset, pil", True, 1): [one_round(200)],
            Case("webdataset, simplejpeg", True, 1): [one_round(400)],
            Case("webdataset, rgb8", False, 1): [one_round(1000)],
            Case("ours", True, 2): [one_round(5)],
        }
    )
    assert [row["ratio"] for row in rows] == [4.0, 0.5, 1.0, 2.0, 1.0, None]
    assert (rows[0]["lowest"], rows[0]["highest"]) == (100, 900)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cases = list_cases(Arguments(ranks=(1,)), "png")
    ours = {"ours", "ours, labels", "ours, pixels kept"}
    assert {case.pipeline for case in cases} == {"bare decode"} | ours
    printed = capsys.readouterr().out
    assert "litdata, PIL: skipped; it needs `pip install 'litdata'`" in printed
    assert "simplejpeg" not in printed  # that pipeline is for JPEG


def test_a_name_is_one_pipeline_and_its_start_all_that_begin_so():
    def names(*only):
        return {case.pipeline for case in list_cases(Arguments(only=only), "png")}

    assert names("ours") == {"ours"}
    assert names("our") == {"ours", "ours, labels", "ours, pixels kept"}
    assert names("bare", "ours, labels") == {"bare decode", "ours, labels"}


def test_a_pipeline_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="use one of bare decode, ours"):
        list_cases(Arguments(only=("tensorflow",)), "jpg")


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (4, 3, 8, 8)])
def test_batches_are_counted_in_either_layout(shape):
    task = Task("s3://bucket/set/tars", "png", 8, 4, "", 4)
    assert check_batch(np.zeros(shape, np.uint8), task) == 4
    with pytest.raises(ValueError, match="not uint8 RGB of 8 px"):
        check_batch(np.zeros(shape, np.float32), task)
    with pytest.raises(ValueError, match="not uint8 RGB of 8 px"):
        check_batch(np.zeros((4, 8, 8, 1), np.uint8), task)
