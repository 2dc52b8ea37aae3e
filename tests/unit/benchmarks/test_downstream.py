"""The comparison of latents downstream: its metric, its arms, its resumption."""

import json
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.downstream import runs
from benchmarks.downstream.__main__ import Arguments, collect, list_jobs
from benchmarks.downstream.arms import ARMS, select_shards, stream
from benchmarks.downstream.features import nearest
from benchmarks.downstream.images import read_images, write_images
from benchmarks.downstream.latent_flow import LatentFlow, measure_loss, sample_latents, train_flow
from benchmarks.downstream.report import draw_samples, print_tables
from benchmarks.downstream.settings import Settings, claim_folder
from data_pipelines import ShardDataset
from efae.symmetry import D4
from efae.symmetry.group import act_on_grid

TINY = {
    "sizes": (16, 32),
    "tokenizer_seconds": 0.15,
    "classifier_steps": 2,
    "flow_steps": 2,
    "batch_size": 8,
    "hidden_size": 32,
    "depth": 1,
    "sampler_steps": 2,
    "samples": 24,
}


def test_nearest_is_the_nearest():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert nearest(torch.tensor([[0.0, 1.0], [3.0, 4.0]]), points).tolist() == [1.0, 0.0]


class TestFlow:
    def test_the_view_reaches_the_velocity(self):
        torch.manual_seed(0)
        model = LatentFlow((3, 4, 4), Settings("", **TINY)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        with torch.no_grad():
            out = model(
                torch.randn(1, 3, 4, 4).expand(8, -1, -1, -1), torch.ones(8), torch.arange(8)
            )
        differences = (out[:, None] - out).abs().amax((2, 3, 4))
        assert (differences + torch.eye(8) > 1e-3).all()

    def test_it_learns(self):
        latent, view = torch.full((8, 3, 2, 2), 2.0), torch.zeros(8, dtype=torch.long)
        settings = Settings("", **TINY | {"flow_steps": 60, "learning_rate": 2e-2})
        model = train_flow(iter(lambda: (latent, view), None), (3, 2, 2), settings, 0)
        sampled = sample_latents(model, (3, 2, 2), 16, 8, 0)
        assert (sampled - 2).abs().mean() < 1  # 2 at the start
        assert measure_loss(model, latent) < 1  # 5 at the start

    def test_it_is_a_function_of_the_seed(self):
        latent, view = torch.randn(8, 3, 2, 2), torch.arange(8)
        batches = iter(lambda: (latent, view), None)
        settings = Settings("", **TINY)
        models = [train_flow(batches, (3, 2, 2), settings, seed) for seed in (0, 0, 1)]
        first, again, other = (sample_latents(m, (3, 2, 2), 4, 2, 0) for m in models)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory) -> Path:
    """Idx files of few images, two sloping ramps by label."""
    folder = tmp_path_factory.mktemp("fashion")
    for part, count in (("train", 96), ("t10k", 64)):
        rng = np.random.default_rng(count)
        labels = rng.integers(0, 2, count).astype(np.uint8)
        ramp = np.linspace(0, 200, 28).astype(np.uint8)
        images = np.where(labels[:, None, None], ramp, ramp[:, None]) + rng.integers(
            0, 50, (count, 28, 28), dtype=np.uint8
        )
        header = np.array([count, 28, 28], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + header + images.astype(np.uint8).tobytes()
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + header[:4] + labels.tobytes()
        )
    return folder


@pytest.fixture(scope="module")
def finished(fashion, tmp_path_factory):
    """Every arm on both data sets, one seed; the jobs, what was said and the features' report."""
    folder = tmp_path_factory.mktemp("downstream")
    arguments = Arguments(str(fashion), **TINY, folder=folder, seeds=1)
    jobs, said = list_jobs(arguments), []
    claim_folder(folder, jobs[0].settings)
    features = runs.prepare(jobs[0].settings, folder, arguments.poses, said.append)
    for job in jobs:
        runs.run_job(job, said.append)
    return jobs, said, features


def take(arm, latents, count, seed=3):
    with closing(stream(ARMS[arm], latents, 8, seed)) as batches:
        return list(islice(batches, count))


@pytest.fixture(scope="module")
def sets(finished):
    (job, *_), _, _ = finished
    exact = ShardDataset.open(str(job.place / "exact-latents"))
    plain = ShardDataset.open(str(job.place / "plain-latents-views"))
    return job, exact, plain


class TestArms:
    def test_sizes_and_copies_select_images_and_views(self, sets):
        _, exact, plain = sets
        assert len(select_shards(exact, 16, False)) == 16
        assert len(select_shards(exact, 32, False)) == 32
        assert len(select_shards(plain, 16, True)) == 8 * 16
        keys = select_shards(plain, 16, False).keys
        assert keys == [f"{row:06}-identity" for row in range(16)]

    def test_views_are_the_elements_that_act(self, sets):
        _, exact, _ = sets
        latents = select_shards(exact, 16, False)
        stored = torch.cat([batch.latent for batch in latents.loader(8, shuffle=False)]).float()
        representation = exact.format.representation
        every = torch.stack([representation.act(g, stored) for g in D4])
        seen = set()
        for latent, view in take("exact, free views", latents, 12):
            near = (latent[:, None] - every[view]).abs().amax((2, 3, 4)).amin(1)
            assert near.max() == 0
            seen |= set(view.tolist())
        assert seen == set(range(8))

    def test_half_of_a_batch_is_as_stored(self, sets):
        _, exact, _ = sets
        name = "exact, free views in half of a batch"
        views = torch.stack([view for _, view in take(name, exact, 12)])
        assert (views[:, :4] == 0).all()
        assert len(views[:, 4:].unique()) == 8

    def test_stored_copies_say_their_view(self, sets):
        job, _, plain = sets
        model = runs.train_tokenizer("plain", Path(), job.place / "plain-tokenizer", None, 0, print)
        images, _ = read_images(job.folder / "images" / "train", "upright")
        turned = torch.stack([g.act_on_image(images[:16]) for g in D4])
        for latent, view in take("plain, eight stored copies", select_shards(plain, 16, True), 4):
            for row, place in zip(latent, view, strict=True):
                expected = runs.encode(model, turned[place])
                assert (row - expected).abs().amax((1, 2, 3)).min() < 5e-3  # float16

    def test_grid_flips_leave_channels_as_they_are(self, sets):
        _, _, plain = sets
        latents = select_shards(plain, 16, False)
        stored = take("plain, as stored", latents, 4)
        acted = take("plain, grid flips and turns", latents, 4)
        for (latent, none), (moved, view) in zip(stored, acted, strict=True):
            assert (none == 0).all()
            assert torch.equal(moved, act_on_grid(D4, view, latent))
        assert len(torch.cat([view for _, view in acted]).unique()) > 4

    def test_streams_are_functions_of_the_seed(self, sets):
        _, exact, plain = sets
        for name, arm in ARMS.items():
            latents = plain if arm.tokenizer == "plain" else exact
            one, again, other = (take(name, latents, 3, seed) for seed in (0, 0, 1))
            for (a, g), (b, h) in zip(one, again, strict=True):
                assert torch.equal(a, b)
                assert torch.equal(g, h)
            assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


class TestRuns:
    def test_every_arm_has_its_record(self, finished, tmp_path, capsys):
        jobs, _, features = finished
        results = collect(jobs, features)
        assert len(results["runs"]) == 2 * (len(ARMS) + len(ARMS) - 1)
        assert len(results["floors"]) == 4
        by_arm = {(run["pose"], run["arm"], run["size"]): run for run in results["runs"]}
        free = by_arm["upright", "exact, free views", 32]
        copies = by_arm["upright", "plain, eight stored copies", 32]
        assert copies["images_encoded"] == 8 * free["images_encoded"] == 8 * 32
        assert copies["bytes_stored"] == 8 * free["bytes_stored"]
        assert not results["settings"].keys() & {"images", "folder"}  # paths of a machine
        print_tables(json.loads(json.dumps(results)))
        printed = capsys.readouterr().out
        assert all(
            f"| any | 16 | {name} |" in printed for name, a in ARMS.items() if a.acted != "half"
        )
        assert [path.name for path in draw_samples(jobs, tmp_path)] == [
            f"samples-{pose}-{size}.png" for pose in ("upright", "any") for size in (16, 32)
        ]

    def test_what_is_finished_is_not_repeated_and_what_is_lost_comes_back_the_same(self, finished):
        (job, *_), _, _ = finished
        name = "exact, free views"
        said: list[str] = []
        path = job.record_path(name, 16)
        before = json.loads(path.read_text())
        path.unlink()
        untouched = job.record_path("plain, as stored", 16)
        time = untouched.stat().st_mtime_ns
        runs.run_job(job, said.append)
        assert len(said) == 1
        assert name in said[0]
        assert untouched.stat().st_mtime_ns == time
        after = json.loads(path.read_text())
        for record in (before, after):
            del record["cpu_seconds"], record["training_cpu_seconds"]
        assert after == before

    def test_settings_of_a_folder_are_not_mixed(self, finished):
        (job, *_), _, _ = finished
        claim_folder(job.folder, job.settings)
        with pytest.raises(ValueError, match="flow_steps"):
            claim_folder(job.folder, replace(job.settings, flow_steps=3))

    def test_bad_arguments(self, fashion, finished, tmp_path):
        (job, *_), _, _ = finished
        with pytest.raises(ValueError, match="use some of exact, free views"):
            list_jobs(Arguments(str(fashion), arms=("exact",)))
        with pytest.raises(ValueError, match="may hold at most 48 images"):
            runs.run_job(replace(job, seed=1), print)
        with pytest.raises(ValueError, match="holds no train-images"):
            runs.build_images(Settings(str(tmp_path)), tmp_path / "set")


def test_images_without_an_upright_are_turned_once(fashion, tmp_path):
    runs.build_images(Settings(str(fashion)), tmp_path)
    upright, labels = read_images(tmp_path / "train", "upright")
    turned, same_labels = read_images(tmp_path / "train", "any")
    again, _ = read_images(tmp_path / "train", "any")
    assert torch.equal(turned, again)
    assert torch.equal(labels, same_labels)
    views = torch.stack([g.act_on_image(upright) for g in D4])
    is_view = (views == turned).flatten(2).all(2)
    assert is_view.any(0).all()
    assert is_view.float().sum(1).min() > 3
    write_images(tmp_path / "views", upright[:4], 2, views=True)
    assert len(ShardDataset.open(str(tmp_path / "views")).index.shards) == 16
