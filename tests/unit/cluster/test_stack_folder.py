import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from cluster import processes
from cluster.local_stack import _assign_ports
from cluster.ports import pick_free
from cluster.services import SERVICES
from cluster.state import StackState, load
from efae.preflight.cluster_checks import reach_cluster

LONGEST_IN_RAY = "/ray/session_2026-11-28_23-12-33_123456_4194304/sockets/dash_MetricsHead"


def test_sockets_of_a_stack_lie_where_their_paths_are_short_and_plain(monkeypatch):
    assert StackState(Path("/tmp/efae-x")).socket_folder == Path("/tmp/efae-x")
    long, odd = Path("/home") / ("x" * 200), Path("/tmp/a st\u00fcck")
    for temporary in ("/tmp", "/tmp/" + "y" * 70, "/tmp/\u00fc"):
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        found = [StackState(folder).socket_folder for folder in (long, odd)]
        assert len(set(found)) == 2
        for folder in found:
            assert folder.parent == Path("/tmp")
            assert len(os.fsencode(f"{folder}{LONGEST_IN_RAY}")) <= 107


def test_a_temporary_folder_that_no_socket_fits_into_is_refused(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "y" * 71)
    with pytest.raises(ValueError, match=r"^TMPDIR=/tmp/y+: too long .* of at most 75 bytes"):
        _ = StackState(Path("/tmp/efae-x")).socket_folder


@pytest.mark.parametrize(("name", "longest"), [("RAY_TMPDIR", 35), ("TMPDIR", 75)])
def test_a_cluster_is_not_begun_where_its_sockets_do_not_fit(monkeypatch, name, longest):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(name, "/" + "y" * longest)
    begun = []
    with pytest.raises(ValueError, match=rf"^{name}=/y+: too long .* of at most {longest} bytes"):
        reach_cluster(lambda: begun.append(name))
    assert begun == []


def test_a_cluster_that_begins_here_has_its_sockets_in_a_short_folder(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "")
    for temporary, expected in (("/scratch", ""), ("/" + "y" * 74, "/tmp")):
        monkeypatch.setenv("TMPDIR", temporary)
        reach_cluster(lambda: None)
        assert os.environ["RAY_TMPDIR"] == expected


def test_no_two_servers_of_a_stack_share_a_port(monkeypatch):
    """Not even where an earlier release wrote one port down twice."""
    for service, port in zip(SERVICES, pick_free(len(SERVICES)), strict=True):
        monkeypatch.setenv(service.variable, str(port))
    state = StackState(Path("/tmp/efae-x"))
    for _ in range(2):
        _assign_ports(state, SERVICES)
        first = dict(state.ports)
        assert len(set(first.values())) == len(first)
        _assign_ports(state, SERVICES)
        assert state.ports == first
        state.ports["ray.gcs"] = state.ports["s3.master.port"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a start is known by the clock alone")
def test_a_stack_is_found_again_after_the_clock_was_set(tmp_path):
    state = StackState(tmp_path)
    record = processes.start(["sleep", "60"], dict(os.environ), tmp_path / "log")
    try:
        state.processes = {
            "stepped": record._replace(started=record.started - 3600),
            "old": record._replace(mark=""),
            "recycled": record._replace(mark=f"{record.mark}0"),
            "old and recycled": record._replace(started=record.started - 3600, mark=""),
        }
        state.save()
        stored = json.loads((tmp_path / "stack.json").read_text())
        for name in ("old", "old and recycled"):  # as earlier versions wrote them
            stored["processes"][name].pop()
        (tmp_path / "stack.json").write_text(json.dumps(stored))
        found = load(tmp_path).processes
        running = [name for name, known in found.items() if processes.is_running(known)]
        assert running == ["stepped", "old"]
    finally:
        processes.stop(record)
    assert not processes.is_running(found["stepped"])
