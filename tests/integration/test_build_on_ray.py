"""Building and indexing of shards by Ray tasks: the same bytes as locally, also after kills."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import storage
from data_pipelines.build_shards import build_shards
from data_pipelines.index_shards import index_shards
from data_pipelines.storage import Location, clients
from data_pipelines.verify_shards import find_faults
from tests.conftest import find_workers

pytestmark = [pytest.mark.s3, pytest.mark.ray]
ROOT = Path(__file__).parents[2]
BUCKET = "s3://efae-data"


@pytest.fixture(scope="module")
def environment(local_stack):
    yield {**os.environ, "PYTHONPATH": str(ROOT)}
    for folder in ("ray-source", "ray-here", "ray-built", "ray-killed", "ray-tars"):
        storage.delete(f"{BUCKET}/{folder}")


def start(environment, module, *arguments, cwd=ROOT):
    """A command of the package, as users start it; Ray is imported in its process only."""
    return subprocess.Popen(
        [sys.executable, "-m", f"data_pipelines.{module}", *arguments, "--on", "ray"],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(exit status, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


def read_set(uri):
    return {name: storage.read_bytes(f"{uri}/{name}") for name in storage.list_files(uri)}


def find_written(uri):
    """{name: time of its last write}, as the server keeps it."""
    details = clients.open_client(Location.parse(uri)).find(uri, detail=True)
    return {name.rsplit("/", 1)[-1]: entry["LastModified"] for name, entry in details.items()}


@pytest.fixture(scope="module")
def images(environment, tmp_path_factory):
    """200 noisy images on S3, which take a while to resize."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number in range(200):
        pixels = draw.integers(0, 256, (96, 96, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"n{number:03d}.jpg", quality=90)
    storage.upload_folder(folder, f"{BUCKET}/ray-source")
    return f"folder:{BUCKET}/ray-source"


OPTIONS = ["--samples-per-shard", "10", "--resolution", "48", "--held-out", "20"]


@pytest.fixture(scope="module")
def built_here(images):
    build_shards(images, f"{BUCKET}/ray-here", 48, samples_per_shard=10, held_out=20)
    return read_set(f"{BUCKET}/ray-here")


def test_the_bytes_are_those_of_a_build_here(environment, images, built_here):
    uri = f"{BUCKET}/ray-built"
    arguments = ["--source", images, "--output", uri, *OPTIONS]
    status, out, err = finish(start(environment, "build_shards", *arguments))
    assert status == 0, err
    assert "180 images in 18 shards" in out
    assert environment["AWS_SECRET_ACCESS_KEY"] not in out + err
    assert read_set(uri) == built_here
    assert list(find_faults(f"{uri}/train")) == []


def wait_for(condition, process=None):
    give_up = time.monotonic() + 60
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver_cost_nothing_that_was_finished(
    environment, images, built_here
):
    uri = f"{BUCKET}/ray-killed"
    arguments = ["--source", images, "--output", uri, *OPTIONS]
    driver = start(environment, "build_shards", *arguments)
    try:
        wait_for(lambda: find_workers("ray::write_shard", environment), driver)[0].send_signal(
            signal.SIGKILL
        )

        def count_records():
            names = storage.list_files(f"{uri}/train/.unfinished")
            return len([name for name in names if name.startswith("shard-")]) >= 4

        wait_for(count_records, driver)
        driver.send_signal(signal.SIGKILL)
    finally:
        finish(driver)
    wait_for(lambda: not find_workers("ray::write_shard", environment))
    finished = {
        name.removesuffix(".json")
        for name in storage.list_files(f"{uri}/train/.unfinished")
        if name.startswith("shard-")
    }
    assert 4 <= len(finished) < 18
    assert "index.json" not in storage.list_files(f"{uri}/train")
    before = find_written(f"{uri}/train")
    time.sleep(1.1)  # the server's times are whole seconds
    status, _, err = finish(start(environment, "build_shards", *arguments))
    assert status == 0, err
    after = find_written(f"{uri}/train")
    tars = [name for name in after if name.endswith(".tar")]
    assert {name for name in tars if before.get(name) == after[name]} == finished
    assert read_set(uri) == built_here


def test_a_damaged_image_fails_the_build_with_its_name_alone(environment, tmp_path):
    """From relative paths, which mean something else in the folder of a worker."""
    (tmp_path / "in").mkdir()
    (tmp_path / "data_pipelines").symlink_to(ROOT / "data_pipelines")  # as if installed
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"in/{number}.png")
    (tmp_path / "in/bad.png").write_bytes((tmp_path / "in/1.png").read_bytes()[:40])
    arguments = ["--source", "folder:in", "--output", "set"]
    status, out, err = finish(start(environment, "build_shards", *arguments, cwd=tmp_path))
    assert status == 1
    assert out.startswith(f"{tmp_path}/in/bad.png: damaged PNG")
    assert err.strip().splitlines()[-1].startswith("build_shards: 1 faults in folder:in")
    assert "Traceback" not in err
    (tmp_path / "in/bad.png").unlink()
    (tmp_path / "set/.unfinished/build.json").unlink()
    status, _, err = finish(start(environment, "build_shards", *arguments, cwd=tmp_path))
    assert status == 0, err
    assert list(find_faults(f"{tmp_path}/set")) == []


def test_what_the_cluster_lacks_is_said_in_one_line(environment, tmp_path):
    """A package, and a GPU, which may come later."""
    (tmp_path / "only_here.py").write_text("def double(shared, job):\n    return 2 * job\n")
    code = """
import signal
import only_here
from data_pipelines.building import ray_tasks
try:
    list(ray_tasks.run_tasks(only_here.double, None, [1], "ray"))
except ray_tasks.TaskFailed as error:
    print(error)
ray_tasks._PATIENCE_SECONDS = 0.5
signal.alarm(4)
list(ray_tasks.run_tasks(only_here.double, None, [1], "ray", use_gpu=True))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == -signal.SIGALRM, result.stderr
    assert result.stderr.count("waiting for a node with 1 CPU and 1 GPU free: ") == 1
    assert "leave out --use-gpu, or use --on here" in result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert "No module named 'only_here'): install the package on every node" in result.stdout


SCRIPT = """
import pathlib, sys
from data_pipelines.building import ray_tasks, shard_writer, sources
from data_pipelines.storage import Location
folder = pathlib.Path(sys.argv[1])
source = sources.open_source(f"folder:{folder}")
output = Location.parse(folder / "set")
job = shard_writer.ShardJob(output, "x.tar", source.list_entries(), None, False, {})
(folder / "a.png").unlink()
list(ray_tasks.run_tasks(shard_writer.write_shard, source, [job], "ray"))
"""


def test_a_file_that_a_node_does_not_see_is_named_with_the_node(environment, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith("ValueError: ")
    assert f"{tmp_path}/a.png" in said
    assert f"on node {os.uname().nodename}: on Ray, every node must see the files" in said


def test_tars_are_indexed_by_tasks_as_here(environment, built_here, tmp_path):
    uri = f"{BUCKET}/ray-tars"
    for name, data in built_here.items():
        if name.startswith("train/shard-"):
            storage.write_bytes(f"{uri}/{name.removeprefix('train/')}", data)
    index_shards(uri, f"{uri}/here")
    status, out, err = finish(start(environment, "index_shards", uri, "--output", f"{uri}/ray"))
    assert status == 0, err
    assert "180 images in 18 tars" in out
    assert read_set(f"{uri}/ray") == read_set(f"{uri}/here")
    assert json.loads(storage.read_bytes(f"{uri}/ray/index.json"))["base"] == uri
    assert list(find_faults(f"{uri}/ray")) == []


def test_faults_of_tars_are_listed_by_tasks(environment, tmp_path):
    for name, member in (("a", "../x.png"), ("b", "y.txt")):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(member))
    status, out, err = finish(start(environment, "index_shards", str(tmp_path)))
    assert status == 1
    assert "a.tar: sample '../x' leaves the folder" in out
    assert "b.tar: sample 'y' has no image" in out
    assert err.strip().splitlines()[-1] == (
        f"index_shards: 2 faults in {tmp_path}, all listed in {tmp_path}/faults.txt: no index"
        " written; fix them, or use --bad-images skip for those of single images"
    )


def test_a_cluster_without_address_is_refused(environment, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = ["--source", f"folder:{tmp_path}", "--output", f"{tmp_path}/set"]
    away = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    status, _, err = finish(start(away, "build_shards", *arguments))
    assert status == 1
    assert err.strip() == (
        "build_shards: --on ray: RAY_ADDRESS is not set; set it, or use --on here"
    )
