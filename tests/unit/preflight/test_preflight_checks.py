"""Checks before a run: what they find in real folders and of real HTTP servers, and say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from cluster.ports import pick_free
from data_pipelines.build_shards import build_shards
from data_pipelines.storage import Location
from data_pipelines.storage.retries import StorageError
from efae.config import Config
from efae.config.forms import with_overrides
from efae.experiment.facts import describe_data
from efae.preflight import node_checks
from efae.preflight.checks import Note, Outcome, merge_outcomes, run_check, run_checks
from efae.preflight.cluster_checks import join_cluster, run_preflight
from efae.preflight.driver_checks import (
    RunData,
    check_configuration,
    check_training_images,
    list_checks,
    measure_data,
    read_facts,
)
from efae.tracking.server import Server
from jobs.preflight import main
from tests.opened_files import watch_opens

GIB = 2**30


@pytest.fixture
def serve():
    """Starts servers that answer with a status and a date that is off by seconds; None omits it."""
    running = []

    def start(status=200, seconds_off=0.0, body=b""):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response_only(status)
                if seconds_off is not None:
                    self.send_header("Date", self.date_time_string(time.time() + seconds_off))
                if status == 302:
                    self.send_header("Location", "/login")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("status", [401, 403])
def test_mlflow_that_refuses_the_credentials_names_them(serve, status):
    address = serve(status)
    with pytest.raises(ValueError, match=rf"refuses these credentials \({status}\)") as error:
        Server(f"http://someone:hunter2@{address}").check()
    message = str(error.value)
    assert f"MLflow at http://***@{address}" in message
    assert "hunter2" not in message
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        assert name in message


def test_a_token_of_mlflow_that_no_request_can_carry_is_not_repeated(serve, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter2\n")
    with pytest.raises(ValueError, match=r"^MLFLOW_TRACKING_TOKEN holds a line break") as error:
        Server(f"http://{serve()}").check()
    assert "hunter2" not in str(error.value)


def test_mlflow_that_fails_is_not_said_to_refuse(serve):
    with pytest.raises(ValueError, match=r"does not answer .*; start the local stack"):
        Server(f"http://{serve(500)}").check()


@pytest.mark.parametrize(
    ("name", "imported"), [("MLFLOW_OTHER", False), ("MLFLOW_TRACKING_USERNAME", True)]
)
def test_mlflow_is_imported_to_check_credentials_alone(serve, name, imported):
    script = (
        "import sys; from efae.tracking.server import Server; Server(sys.argv[1]).check();"
        "print('mlflow' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, f"http://{serve(body=b'{}')}"],
        env={**os.environ, name: "someone"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == str(imported)


def test_a_page_is_no_answer_of_mlflow(serve):
    """A proxy in front of the server may show its own, for anyone to log in."""
    with pytest.raises(ValueError, match="does not answer"):
        Server(f"http://{serve(body=b'<html>')}").check()


@pytest.mark.parametrize("status", [200, 403])
def test_clocks_that_agree(serve, status):
    assert "within" in node_checks.check_clock(f"http://{serve(status)}")


@pytest.mark.parametrize(("off", "word"), [(290, "behind"), (-290, "ahead of")])
def test_clocks_that_differ_a_little(serve, off, word):
    found = node_checks.check_clock(f"http://{serve(seconds_off=off)}")
    assert word in found
    assert int(re.findall(r"about (\d+) s", found)[0]) == pytest.approx(290, abs=5)


@pytest.mark.parametrize(("off", "word"), [(310, "behind"), (-310, "ahead of"), (86400, "behind")])
def test_clocks_that_differ_too_much(serve, off, word):
    with pytest.raises(ValueError, match=f"{word}.*set the clock"):
        node_checks.check_clock(f"http://{serve(seconds_off=off)}")


def test_clocks_that_cannot_be_compared(serve):
    with pytest.raises(Note, match="sends no Date header"):
        node_checks.check_clock(f"http://{serve(seconds_off=None)}")
    with pytest.raises(Note, match="no answer"):
        node_checks.check_clock(f"http://127.0.0.1:{pick_free(1)[0]}")


def test_the_clock_that_counts(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage:8333")
    mlflow = Server("https://user:secret@mlflow:5000/path")
    assert node_checks.find_clock("s3://runs/ray", mlflow) == "http://storage:8333"
    assert node_checks.find_clock("/runs/ray", mlflow) == "https://mlflow:5000"
    assert node_checks.find_clock("/runs/ray", Server("")) == ""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    assert node_checks.find_clock("s3://runs/ray", mlflow) == "https://s3.amazonaws.com"


def test_disk_for_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "SPARE_BYTES", 0)
    cache = tmp_path / "not" / "yet"
    assert str(tmp_path) in node_checks.check_disk(str(cache), 1000)
    too_much = shutil.disk_usage(tmp_path).free + 10 * GIB
    with pytest.raises(ValueError, match=f"{tmp_path}.*data.cache_bytes"):
        node_checks.check_disk(str(cache), too_much)
    with pytest.raises(ValueError, match="may need"):
        node_checks.check_disk(tempfile.gettempdir(), 2**60)
    # What the cache holds already needs no new room.
    shard = cache / ("ab" * 16)
    shard.mkdir(parents=True)
    with (shard / "0-9.chunk").open("wb") as file:
        file.truncate(20 * GIB)  # a hole: no bytes on the disk
    node_checks.check_disk(str(cache), too_much)


def test_disk_for_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "SPARE_BYTES", 2**60)
    with pytest.raises(ValueError, match="TMPDIR"):
        node_checks.check_disk(str(tmp_path), 0)


def test_shared_memory(tmp_path, monkeypatch):
    assert "GiB free" in node_checks.check_shared_memory(True, str(tmp_path))
    with pytest.raises(ValueError, match=r"emptyDir of medium Memory"):
        node_checks.check_shared_memory(True, str(tmp_path / "none"))
    with pytest.raises(Note, match=r"emptyDir of medium Memory.*slower"):
        node_checks.check_shared_memory(False, str(tmp_path / "none"))


def test_versions():
    ours = node_checks.list_versions()
    assert ours["torch"] == torch.__version__.split("+")[0]
    assert ours["torch"] in node_checks.check_versions(ours)
    with pytest.raises(ValueError, match=rf"ray {ours['ray']} here, 2\.1 where the driver runs"):
        node_checks.check_versions(ours | {"ray": "2.1"})


def test_mark(tmp_path):
    (tmp_path / "mark").write_bytes(b"efae")
    node_checks.check_mark(Location.parse(tmp_path / "mark"))
    with pytest.raises(ValueError, match=rf"{tmp_path} is not visible.*ray\.storage_uri"):
        node_checks.check_mark(Location.parse(tmp_path / "none"))


def test_auth(serve):
    assert "401" in node_checks.check_auth(serve(401))
    assert "403" in node_checks.check_auth(serve(403))
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=token"):
        node_checks.check_auth(serve(200))
    for status in (302, 503):  # a page to log in at is not an open door
        with pytest.raises(Note, match=f"answered {status}"):
            node_checks.check_auth(serve(status))
    with pytest.raises(Note, match="no answer"):
        node_checks.check_auth(f"127.0.0.1:{pick_free(1)[0]}")


def test_missing_gpus():
    more = torch.cuda.device_count() + 1
    with pytest.raises(ValueError, match=f"Ray counts {more} GPUs here, torch"):
        node_checks.check_gpus(more, "bf16", several_workers=True)


def test_compiler(monkeypatch):
    assert node_checks.check_compiler("step", on_gpu=False).endswith("g++")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("CC", "cc")
    with pytest.raises(ValueError, match=r"training\.compile=step needs a compiler \(/no/such"):
        node_checks.check_compiler("step", on_gpu=False)
    if importlib.util.find_spec("triton") is None:
        with pytest.raises(ValueError, match=r"training\.compile=blocks needs Triton, which"):
            node_checks.check_compiler("blocks", on_gpu=True)
    monkeypatch.setenv("CC", "false")  # as a compiler without header files
    with pytest.raises(Note, match=r"header files that .*/false does not find.*exact models"):
        node_checks.check_compiler("none", on_gpu=True)


@pytest.mark.gpu
def test_gpus():
    found = node_checks.check_gpus(1, "bf16", several_workers=True)
    assert torch.cuda.get_device_name(0) in found
    assert "NCCL" in found


def test_every_check_has_an_outcome():
    def fail(error):
        raise error

    outcomes = run_checks(
        [
            ("disk", lambda: "room"),
            ("images", lambda: None),
            ("auth", lambda: fail(Note("not checked"))),
            ("clock", lambda: fail(ValueError("set it"))),
            ("storage", lambda: fail(StorageError("denied"))),
        ]
    )
    assert list(map(str, outcomes)) == [
        "ok  disk: room",
        "ok  images",
        "note auth: not checked",
        "FAIL clock: set it",
        "FAIL storage: denied",
    ]


def test_a_defect_of_a_check_is_no_outcome():
    with pytest.raises(ZeroDivisionError):
        run_check("clock", lambda: str(1 / 0))


def test_nodes_that_agree_share_a_line():
    slow, full = Outcome("FAIL", "clock", "10 s behind"), Outcome("FAIL", "disk", "full")
    nodes = {f"n{number}": [Outcome("ok", "clock"), Outcome("ok", "disk")] for number in range(6)}
    nodes["n1"][0] = nodes["n4"][0] = slow
    nodes["n5"] = [Outcome("FAIL", "clock", "a day ahead"), full]
    assert set(map(str, merge_outcomes(nodes))) == {
        "ok  clock on n0, n2, n3",
        "FAIL clock on n1, n4: 10 s behind",
        "FAIL clock on n5: a day ahead",
        "ok  disk on n0, n1, n2 and 2 more",
        "FAIL disk on n5: full",
    }


def test_what_nodes_found_is_summed_up():
    nodes = {f"n{number}": [Outcome("ok", "disk", f"{number} GiB")] for number in range(5)}
    (line,) = merge_outcomes(nodes)
    assert str(line) == "ok  disk on n0, n1, n2 and 2 more: 0 GiB; 1 GiB; 2 GiB and 2 more"


def test_local_shards_need_no_cache(shards):
    config = with_overrides(Config(), {"data.uri": shards, "data.held_out_uri": shards})
    assert measure_data(config, RunData(config.data)) == 0


@pytest.mark.parametrize(("bound", "expected"), [(2**20, 23 * 3 * 8 * 8), (1000, 1000)])
def test_pixels_that_are_to_be_kept_need_room(shards, bound, expected):
    config = with_overrides(
        Config(),
        {
            "data.uri": shards,
            "data.held_out_uri": shards,
            "data.resolution": 8,
            "data.pixel_cache_bytes": bound,
        },
    )
    assert measure_data(config, RunData(config.data)) == expected


def test_buckets_need_the_sizes_of_the_images(tmp_path):
    (tmp_path / "images").mkdir()
    for side in (8, 16):
        Image.new("RGB", (8, side)).save(tmp_path / f"images/{side}.png")
    build_shards(f"folder:{tmp_path}/images", f"{tmp_path}/set")
    found = read_facts(f"{tmp_path}/set")
    config = with_overrides(Config(), {"data.buckets": [(8, 8), (16, 8)]})
    assert check_training_images(config, found).startswith("2 at ")
    unsized = replace(found, sized=False)
    assert check_training_images(Config(), unsized).startswith("2 at ")
    with pytest.raises(ValueError, match=rf"^data\.buckets=.*index_shards {found.uri}`$"):
        check_training_images(config, unsized)


def test_a_run_reads_the_index_of_each_of_its_sets_once(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "held_out")
    held_out = str(tmp_path / "held_out")
    config = with_overrides(
        Config(),
        {
            "data.uri": shards,
            "data.held_out_uri": held_out,
            "data.resolution": 8,
            "data.pixel_cache_bytes": 1000,
            "tracking.run_name": "x",
            "ray.storage_uri": str(tmp_path / "run"),
        },
    )
    data = RunData(config.data)
    with watch_opens() as opened:
        outcomes = [run_check(what, check) for what, check in list_checks(config, data, Server(""))]
        measure_data(config, data)
        described = describe_data(data)
    passed = {outcome.what for outcome in outcomes if outcome.state == "ok"}
    assert passed >= {"images", "held-out images", "storage"}
    assert described["held_out_data"].startswith(f"{held_out} (23 images")
    for uri in (shards, held_out):
        assert opened.count(f"{uri}/index.json") == 1


def test_a_report_folder_that_cannot_be_written_is_refused():
    changes = {"tracking.run_name": "x", "tracking.report_folder": "ftp://x"}
    config = with_overrides(Config(), changes)
    checks = dict(list_checks(config, RunData(config.data), Server("")))
    with pytest.raises(ValueError, match="ftp://x"):
        checks["report folder"]()


def test_a_linear_start_from_cells_too_large_to_fit_is_refused():
    def configure(side: int) -> Config:
        linear = {"model.start": "closed_form", "model.bottleneck": "running"}
        sizes = {"data.resolution": 2 * side, "model.patch_size": side, "model.downsampling": side}
        named = {"tracking.run_name": "x"}
        return with_overrides(Config(), {**linear, **sizes, **named})

    check_configuration(configure(32))
    with pytest.raises(ValueError, match=r"downsampling=48: .* 6912 values.* at most 4096"):
        check_configuration(configure(48))


def test_images_too_small_for_ssim_are_refused():
    sizes = {"model.downsampling": 4, "model.patch_size": 2, "tracking.run_name": "x"}
    check_configuration(with_overrides(Config(), {**sizes, "data.resolution": 8}))
    with pytest.raises(ValueError, match=r"data\.resolution=4: SSIM needs sides of 6"):
        check_configuration(with_overrides(Config(), {**sizes, "data.resolution": 4}))


def test_a_wrong_configuration_is_not_asked_about():
    said = []
    config = with_overrides(Config(), {"data.uri": "pipe:ls", "tracking.run_name": "x"})
    with pytest.raises(ValueError, match="1 of 1 checks failed: configuration"):
        run_preflight(config, RunData(config.data), Server(""), said.append)
    assert len(said) == 1
    assert said[0].startswith("FAIL configuration: ")
    assert "pipe" in said[0]


def test_the_command_takes_presets_of_either_kind(shards, capsys):
    assert main(["generate_b", f"--data.uri={shards}"]) == 1
    assert f"error: {shards} holds images: encode them first" in capsys.readouterr().err
    assert main(["fine_tune", f"--data.uri={shards}"]) == 1
    assert "error: start.model='': name an autoencoder" in capsys.readouterr().err


def test_a_dead_cluster_is_refused_at_once(monkeypatch):
    address = f"127.0.0.1:{pick_free(1)[0]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"RAY_ADDRESS={address}: .*start the cluster"):
        join_cluster(Config())
    assert time.monotonic() - started < 5
