"""jobs/encode.py on the real stack: complete, killed and restarted, refused."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import ShardDataset, storage
from data_pipelines.build_shards import build_shards
from data_pipelines.building.sample_encoding import Encoding
from data_pipelines.verify_shards import find_faults
from efae.config import Config
from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.symmetry import D4
from jobs.encode import main
from tests.conftest import ROOT, find_workers
from tests.integration.train_jobs import SHARDS, run_job

pytestmark = [pytest.mark.s3, pytest.mark.ray]
BUCKET = "s3://efae-data/encode-job"
SMALL = {
    "data.channels": 1,
    "representation.dim": 12,
    "representation.multiplicities": (4, 0, 2, 2, 2),
    "model.hidden_size": 32,
    "model.encoder_hidden_size": 64,
    "model.num_heads": 2,
    "model.depth": 1,
}


def write_model(folder: Path, **changes) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(with_overrides(Config(), SMALL | changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(train_shards, tmp_path_factory):
    yield tmp_path_factory.mktemp("encode")
    storage.delete(BUCKET)


@pytest.fixture(scope="module")
def model(folder):
    return write_model(folder / "model")


def options(folder, output, **changes):
    values = {
        "model": folder / "model",
        "data": f"{SHARDS}/train",
        "output": output,
        "batch-size": 16,
        "cache-dir": folder / "cache",
    } | changes
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def whole(folder, model):
    """What a run leaves that nothing disturbs."""
    uri = f"{BUCKET}/whole"
    result = run_job("encode", *options(folder, uri))
    assert result.returncode == 0, result.stdout + result.stderr
    return uri, result.stdout


def read_set(uri):
    return {name: storage.read_bytes(f"{uri}/{name}") for name in storage.list_files(uri)}


def test_every_image_has_its_latent(whole, model):
    uri, out = whole
    images, latents = ShardDataset.open(f"{SHARDS}/train"), ShardDataset.open(uri)
    assert latents.keys == images.keys
    assert list(find_faults(uri)) == []
    batch = next(iter(images.loader(64, members=("cls",), channels=1)))
    pixels = dict(zip(batch.key, batch.image.float() / 127.5 - 1, strict=True))
    labels = dict(zip(batch.key, batch.members["cls"], strict=True))
    for views in latents.loader(64, augment="group", members=("cls",)):
        rows = [row for row, key in enumerate(views.key) if key in pixels]
        if not rows:
            continue
        elements = [views.element[row] for row in rows]
        acted = [
            g.act_on_image(pixels[views.key[row]]) for g, row in zip(elements, rows, strict=True)
        ]
        expected = model.encode(torch.stack(acted))
        difference = (views.latent[rows].float() - expected).abs()
        assert (difference <= 2**-10 * expected.abs() + 1e-4).all()
        assert [views.members["cls"][row] for row in rows] == [
            labels[views.key[row]] for row in rows
        ]
    certificate = latents.certificate
    assert certificate["max_abs_difference"] <= 1e-5
    assert set(certificate["by_element"]) == {g.name for g in D4}
    assert (certificate["images"], certificate["data"]) == (64, f"{SHARDS}/held_out")
    assert certificate["representation"] == {
        "group": "D4",
        **{"a1": 4, "a2": 0, "b1": 2, "b2": 2, "e": 2},
    }
    assert f"{len(images)} latents in 10 shards" in out
    assert f"{len(images)} of them encoded now" in out


def refuse(capsys, arguments) -> str:
    """What the job says that ends before it needs a cluster; in this process, to save time."""
    status = main(arguments)
    error = capsys.readouterr().err
    assert status == 1
    assert "Traceback" not in error
    return error


def test_a_second_run_finds_it_whole_and_other_settings_are_refused(whole, folder, capsys):
    uri, _ = whole
    before = read_set(uri)
    assert main(options(folder, uri, resolution=32)) == 0  # as by default
    assert "0 of them encoded now" in capsys.readouterr().out
    write_model(folder / "other", **{"model.latent_noise": 0.1})
    for changes, message in (
        ({"dtype": "float32"}, "dtype 'float16' instead of 'float32'"),
        ({"resolution": 16}, r"shape \[12, 4, 4\] instead of \[12, 2, 2\]"),
        ({"tile": 64}, "tile None instead of 64"),
        ({"model": folder / "other"}, "config_digest"),
        ({"data": f"{SHARDS}/held_out"}, "data"),
    ):
        error = refuse(capsys, options(folder, uri, **changes))
        assert re.search(f"error: {uri} already holds .*{message}", error)
    assert read_set(uri) == before


def wait_for(condition, process=None):
    give_up = time.monotonic() + 120
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_killed_and_begun_again_it_is_byte_for_byte_the_same(whole, folder, local_stack):
    uri = f"{BUCKET}/killed"
    driver = subprocess.Popen(
        [sys.executable, "jobs/encode.py", *options(folder, uri)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def list_finished():
        names = storage.list_files(f"{uri}/.unfinished")
        return {name.removesuffix(".json") for name in names if name.startswith("shard-")}

    try:
        wait_for(lambda: len(list_finished()) >= 1, driver)
        wait_for(lambda: find_workers("_Encoder", local_stack), driver)[0].send_signal(
            signal.SIGKILL
        )
        wait_for(lambda: len(list_finished()) >= 3, driver)
        driver.send_signal(signal.SIGKILL)
    finally:
        driver.kill()
        driver.communicate()
    wait_for(lambda: not find_workers("_Encoder", local_stack))
    finished = list_finished()
    assert 3 <= len(finished) < 10
    assert "index.json" not in storage.list_files(uri)
    again = run_job("encode", *options(folder, uri))
    assert again.returncode == 0, again.stderr
    samples = {s.name: len(s.keys) for s in ShardDataset.open(uri).index.shards}
    left = sum(count for name, count in samples.items() if name not in finished)
    assert f"{left} of them encoded now" in again.stdout
    assert read_set(uri) == read_set(whole[0])


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_named_and_the_rest_goes_on_later(folder, model):
    data = folder / "damaged"
    for number in range(6):
        sides = (32, 40) if number < 5 else (40, 32)
        pixels = np.random.default_rng(number).integers(0, 256, sides, np.uint8)
        (folder / f"images/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"images/{number % 2}/{number}.png")
    encoding = Encoding(labels="folders")
    build_shards(f"folder:{folder / 'images'}", str(data), samples_per_shard=2, encoding=encoding)
    index = ShardDataset.open(str(data)).index
    path, members = data / index.shards[1].name, index.shards[1].members["png"]
    whole, at = path.read_bytes(), int(members.offset[0]) + int(members.size[0]) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    output = f"{BUCKET}/damaged"
    arguments = [
        *options(folder, output, data=data, **{"certificate-data": f"{SHARDS}/held_out"}),
        *("--buckets", "16", "24", "16", "16", "24", "16", "--tile", "64"),
    ]
    failed = run_job("encode", *arguments)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert repr(index.shards[1].keys[0]) in last
    assert index.shards[1].name in last
    assert "Traceback" not in failed.stderr
    path.write_bytes(whole)
    again = run_job("encode", *arguments)
    assert again.returncode == 0, again.stderr
    for sides, keys, shape in (("16x24", "01234", [12, 2, 3]), ("24x16", "5", [12, 3, 2])):
        latents = ShardDataset.open(f"{output}/{sides}")
        assert sorted(key[-1] for key in latents.keys) == list(keys)
        assert latents.format.shape == shape
        assert latents.certificate["tile"] == 64
        assert list(find_faults(latents.uri)) == []
        assert latents.index.provenance["classes"] == ["0", "1"]
        batch = next(iter(latents.loader(6, members=("cls",))))
        assert [key[0].encode() for key in batch.key] == batch.members["cls"]
    assert "bucket 16 x 16: 0 of 6 images" in again.stdout
    assert {name.split("/")[0] for name in storage.list_files(output)} == {"16x24", "24x16"}


def test_what_cannot_work_is_refused_before_anything_is_written(folder, model, capsys):
    write_model(
        folder / "wide",
        **{
            "data.resolution": (16, 64),
            "representation.group": "flips",
            "representation.multiplicities": (6, 2, 0, 0, 2),
        },
    )
    output = f"{BUCKET}/refused"
    for changes, message in (
        ({"model": folder / "wide"}, "32 x 32, less than the 16 x 64 to encode at"),
        ({"resolution": 40}, "32 x 32, less than the 40 x 40 to encode at"),
        ({"resolution": 20}, "--resolution 20 20: not divisible into latent cells"),
        ({"tile": 12}, "--tile=12: must be a multiple of model.downsampling=8"),
        ({"model": folder / "nowhere"}, "no model or checkpoint"),
        ({"data": SHARDS}, "holds two shard sets"),
        ({"data": "pipe:cat /etc/passwd"}, "pipe"),
    ):
        assert message in refuse(capsys, options(folder, output, **changes))
    for sides, message in (
        ("16 20", "--buckets 16 20: not divisible into latent cells"),
        ("32 32 40 40", "held_out: its images are 32 x 32, less than the 40 x 40"),
    ):
        buckets = ["--buckets", *sides.split()]
        assert message in refuse(capsys, [*options(folder, output), *buckets])
    for name, message in (("batch-size", "must be at least 1"), ("resolution", "must be positive")):
        with pytest.raises(SystemExit):
            main(options(folder, output, **{name: 0}))
        assert message in capsys.readouterr().err
    assert storage.list_files(output) == {}
