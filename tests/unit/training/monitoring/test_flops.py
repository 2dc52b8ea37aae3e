"""FLOPs that a step is said to take, and the profile of steps."""

import gzip
import json
import re
import shutil

import pytest
import torch

from efae.config import Config
from efae.config.forms import with_overrides
from efae.presets import PRESETS
from efae.training.monitoring.flops import Utilization, count_flops, find_peak
from efae.training.monitoring.profiling import StepProfiler

TINY = {
    "data.resolution": 16,
    "model.hidden_size": 64,
    "model.encoder_hidden_size": 64,
    "model.num_heads": 2,
    "model.depth": 1,
    "model.encoder_depth": 1,
}


def count(**overrides):
    return count_flops(with_overrides(Config(), TINY | overrides))


def test_a_block_more_adds_its_matrices_and_its_attention():
    """By hand: 16 tokens of width 64 at level none; MLP of 3 x 64; backward costs twice forward.

    And a little more for attention, whose backward computes products of the forward pass again.
    """
    m, tokens, width = 64, 16, 64
    matrices = tokens * (3 * m * m + m * m + 2 * 3 * m * m) + m * 6 * m  # adaLN: once per image
    attention = 2 * tokens * tokens * width
    more = count(**{"model.level": "none", "model.depth": 2}).own
    less = count(**{"model.level": "none"}).own
    assert more - less == pytest.approx(3 * 2 * (matrices + attention), rel=0.03)


def test_an_exact_network_is_counted_as_its_dense_twin_too():
    exact, dense = count(), count(**{"model.level": "none"})
    assert exact.as_dense == dense.own == dense.as_dense
    assert 2 < exact.as_dense / exact.own < 8


@pytest.mark.parametrize(
    "settings",
    [
        {"loss.scaling_probability": 1.0, "loss.rotation_probability": 1.0},
        {"model.level": "regularized", "representation.learned_basis": True},
        {"model.kind": "unet", "data.resolution": (16, 32)},
    ],
    ids=["loss", "learned basis", "rectangles under quarter turns"],
)
def test_no_setting_stops_the_count(settings):
    assert count(**settings).own > 0
    count(**{"model.bottleneck": "kl", "flow.condition_drop": 0.5, "training.precision": "bf16"})


def test_utilisation_is_known_only_on_a_known_gpu():
    config = PRESETS["quickstart"][1]
    measured = Utilization(config, torch.device("cpu"), world_size=2).measure(1000.0)
    assert measured == {"tflops_per_second": pytest.approx(count_flops(config).own * 500 / 1e12)}


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A2", None),
    ],
)
def test_the_peak_is_that_of_the_very_card(monkeypatch, name, bf16):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    device = torch.device("cuda")
    assert find_peak(device, "bf16") == (bf16 and bf16 * 1e12)
    config = with_overrides(Config(), {"data.buckets": ((32, 32),)})  # whose FLOPs are not counted
    assert Utilization(config, device, world_size=1).unknown_card == ("" if bf16 else name)


@pytest.mark.parametrize(
    ("steps", "profiled", "missing"),
    [(30, {"step 12", "step 13"}, []), (14, {"step 12", "step 13"}, []), (13, {"step 12"}, ["1"])],
)
def test_a_profile_holds_the_steps_after_the_first_ones(tmp_path, steps, profiled, missing):
    saved, lines = {}, []

    def save(path, name):
        saved[name] = tmp_path / path.name
        shutil.copy(path, saved[name])

    profiler = StepProfiler(2, torch.device("cpu"), save)
    for step in range(steps):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.step()
    profiler.close(lines.append)
    assert [re.search(r"before the last (\d) of them", line)[1] for line in lines] == missing
    (name,) = saved
    assert name == "profile/trace.json.gz"
    with gzip.open(saved[name]) as file:
        events = json.load(file)["traceEvents"]
    found = {event["name"] for event in events if event["name"].startswith("step ")}
    assert found == profiled


def test_a_process_without_a_step_to_profile_saves_nothing():
    profiler = StepProfiler(2, torch.device("cpu"), lambda *_: pytest.fail("nothing to save"))
    for _ in range(11):
        profiler.step()
    lines = []
    profiler.close(lines.append)
    assert "before the last 2 of them" in lines[0]
