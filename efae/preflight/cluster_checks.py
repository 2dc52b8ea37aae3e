"""Preflight: checks of the driver's machine, of the Ray cluster and of every node in it.

The checks of a node run in a Ray task that is pinned to it and uses no CPU, on all nodes at once.
Nodes do not repeat a check that failed on the driver.
"""

import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import ray
from ray._private.worker import get_dashboard_url
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_pipelines import storage
from data_pipelines.storage import Location
from efae.config import AnyConfig, Config
from efae.model.objective import find_smallest_side
from efae.preflight import node_checks
from efae.preflight.checks import Check, Outcome, merge_outcomes, run_check, run_checks
from efae.preflight.driver_checks import RunData, list_checks, measure_data
from efae.ray_trainer import connect
from efae.tracking.server import Server

NODE_SECONDS = 60.0
"""Time limit of the checks on all nodes: a cold worker imports torch from a slow disk."""
_PROBE_SECONDS = 3.0
_HEAD = "node:__internal_head__"
# The path of a socket has 107 bytes at most: Ray appends 72 to its folder, and the servers that
# Python starts for it append 32 to the one for temporary files.
_LONGEST_RAY_FOLDER = 35
_LONGEST_TMPDIR = 75


@dataclass(frozen=True)
class Node:
    """A node of the cluster; in tests, several share one machine."""

    id: str
    name: str
    resources: Mapping[str, float]


def run_preflight(
    config: AnyConfig,
    data: RunData,
    server: Server,
    say: Callable[[str], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Check all that the run needs, and connect to the cluster; print one line for each check.

    An invalid configuration ends the checks at once, since the others depend on it.

    Args:
        config: Configuration of the experiment.
        data: Facts of its shard sets.
        server: MLflow server.
        say: Function that prints one line.
        meanwhile: Function to run here while the nodes are checked.

    Returns:
        The outcomes; none is a failure.

    Raises:
        ValueError: Some checks failed; `say` printed them.
    """
    outcomes: list[Outcome] = []
    for outcome in check_all(config, data, server, meanwhile):
        outcomes.append(outcome)
        say(str(outcome))
    failed = [outcome.what for outcome in outcomes if outcome.state == "FAIL"]
    if failed:
        raise ValueError(
            f"preflight: {len(failed)} of {len(outcomes)} checks failed: {'; '.join(failed)}"
        )
    return outcomes


def check_all(
    config: AnyConfig, data: RunData, server: Server, meanwhile: Callable[[], None]
) -> Iterator[Outcome]:
    """Yield the outcomes of `run_preflight` as they arrive."""
    passed, asked_about = set[str](), set[str]()
    for what, check in list_checks(config, data, server):
        asked_about.add(what)
        yield (outcome := run_check(what, check))
        if outcome.state != "FAIL":
            passed.add(what)
        elif what == "configuration":
            return
    yield run_check("cluster", lambda: join_cluster(config))
    if not ray.is_initialized():
        return
    if not find_dashboard():
        yield Outcome("note", "auth", "not checked: this cluster has no dashboard")
    sets = {what for what in asked_about if what.endswith(("images", "latents"))}
    cache_bytes = measure_data(config, data) if sets <= passed else 0
    with write_mark(config.ray.storage_uri if "storage" in passed else None) as mark:
        asked = [
            (node, list_node_checks(node, config, server, passed, mark, cache_bytes))
            for node in list_nodes()
        ]
        yield from merge_outcomes(ask_nodes(asked, meanwhile))


def join_cluster(config: AnyConfig) -> str:
    """Connect to the cluster and return its size; see `connect`.

    Raises:
        ValueError: The cluster does not answer, refuses, or lacks CPUs or GPUs.
    """
    reach_cluster(partial(connect, config))
    nodes = list_nodes()
    total = Counter[str]()
    for node in nodes:
        total.update({name: int(node.resources.get(name, 0)) for name in ("CPU", "GPU")})
    return f"nodes: {len(nodes)}, CPUs: {total['CPU']}, GPUs: {total['GPU']}"


def reach_cluster(connect_to_it: Callable[[], None]) -> None:
    """Connect to the cluster of RAY_ADDRESS with the given function.

    Raises:
        ValueError: The cluster does not answer or refuses, or the function raises it.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        _shorten_ray_folder()
    try:
        if not ray.is_initialized():
            _probe(address)
        connect_to_it()
    except (OSError, RuntimeError, RayError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"RAY_ADDRESS={address or '(unset)'}: {reason}; start the cluster (make up) and give"
            " this client its address and token (RAY_ADDRESS, RAY_AUTH_MODE=token,"
            " RAY_AUTH_TOKEN_PATH; locally `source .local/env`)"
        ) from error


def _shorten_ray_folder() -> None:
    """Choose a short folder for the sockets of a cluster that Ray starts here.

    Raises:
        ValueError: RAY_TMPDIR or TMPDIR is too long.
    """
    limits = {"RAY_TMPDIR": _LONGEST_RAY_FOLDER, "TMPDIR": _LONGEST_TMPDIR}
    lengths = {name: len(os.fsencode(os.environ.get(name, ""))) for name in limits}
    for name, longest in limits.items():
        if lengths[name] > longest:
            raise ValueError(
                f"{name}={os.environ[name]}: too long for socket paths: set it to a folder of at"
                f" most {longest} bytes"
            )
    if not lengths["RAY_TMPDIR"] and lengths["TMPDIR"] > _LONGEST_RAY_FOLDER:
        os.environ["RAY_TMPDIR"] = "/tmp"


def _probe(address: str) -> None:
    """Raise OSError if nothing listens: Ray itself retries a dead address for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), _PROBE_SECONDS).close()


def list_nodes() -> list[Node]:
    """Return the live nodes, named by their address, and by their id too if several share it."""
    found = [entry for entry in cast(list[dict[str, Any]], ray.nodes()) if entry["Alive"]]
    shared = Counter(entry["NodeManagerAddress"] for entry in found)
    return [
        Node(
            entry["NodeID"],
            address if shared[address] == 1 else f"{address} ({entry['NodeID'][:6]})",
            entry["Resources"],
        )
        for entry in found
        for address in [entry["NodeManagerAddress"]]
    ]


def find_dashboard() -> str:
    """Return host and port of the connected cluster's dashboard; "" if it has none."""
    return cast(str | None, get_dashboard_url()) or ""


@contextmanager
def write_mark(folder: str | None) -> Generator[Location | None]:
    """Write a small object, yield its location, delete it; do nothing without a folder."""
    if folder is None:
        yield None
        return
    mark = Location.parse(folder) / f".preflight-{uuid.uuid4().hex}"
    storage.write_bytes(mark, b"efae")
    try:
        yield mark
    finally:
        storage.delete(mark)


def list_node_checks(
    node: Node,
    config: AnyConfig,
    server: Server,
    passed: Set[str],
    mark: Location | None,
    cache_bytes: int,
) -> Iterator[tuple[str, Check]]:
    """Yield (subject, check) pairs for one node.

    Args:
        node: Node that will run them.
        config: Configuration of the experiment.
        server: MLflow server.
        passed: Subjects of the driver's checks (`list_checks`) that passed.
        mark: Location of an object that the driver wrote.
        cache_bytes: Maximum size of the node's caches.
    """
    several = config.ray.num_workers != 1
    trains = node.resources.get("CPU", 0) > 0
    yield "versions", partial(node_checks.check_versions, node_checks.list_versions())
    if clock := node_checks.find_clock(config.ray.storage_uri, server):
        yield "clock", partial(node_checks.check_clock, clock)
    if trains:
        yield "disk", partial(node_checks.check_disk, config.data.cache_dir, cache_bytes)
    if trains and several:
        yield "shared memory", partial(node_checks.check_shared_memory, config.ray.use_gpu)
    for what in passed & {"images", "latents"}:
        yield what, partial(storage.check_readable, config.data.uri)
    if mark:
        yield "storage", partial(node_checks.check_mark, mark)
    if "MLflow" in passed:
        yield "MLflow", server.check
    if _HEAD in node.resources and (dashboard := find_dashboard()):
        yield "auth", partial(node_checks.check_auth, dashboard)
    if config.ray.use_gpu and (gpus := int(node.resources.get("GPU", 0))):
        precision = config.training.precision
        yield "GPUs", partial(node_checks.check_gpus, gpus, precision, several)
    on_gpu = config.ray.use_gpu
    mode = config.choose_compilation("cuda" if on_gpu else "cpu")
    has_workers = bool(node.resources.get("GPU", 0)) if on_gpu else trains
    if has_workers and (on_gpu or mode != "none"):
        yield "compiler", partial(node_checks.check_compiler, mode, on_gpu)
    if has_workers and isinstance(config, Config) and config.loss.lpips_weights:
        side = find_smallest_side(config)
        yield "LPIPS", partial(node_checks.check_lpips, config.loss.lpips_weights, side)


def ask_nodes(
    asked: Iterable[tuple[Node, Iterable[tuple[str, Check]]]], meanwhile: Callable[[], None]
) -> dict[str, list[Outcome]]:
    """Run the checks of each node on that node, on all nodes at once.

    Args:
        asked: Nodes and their checks, which must be functions of importable modules.
        meanwhile: Function to run here while they work.

    Returns:
        Outcomes by the node's name; a node that did not answer has an outcome that says so.
    """
    # One call per process: a process that used a GPU holds some of its memory until it exits.
    task = ray.remote(max_calls=1, max_retries=0, num_cpus=0)(run_checks)
    references: dict[Any, Node] = {}
    for node, checks in asked:
        pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
        references[task.options(scheduling_strategy=pinned).remote(list(checks))] = node
    meanwhile()
    ray.wait(list(references), num_returns=len(references), timeout=NODE_SECONDS)
    return {node.name: _read_answer(reference) for reference, node in references.items()}


def _read_answer(reference: Any) -> list[Outcome]:
    ready = cast(list[Any], ray.wait([reference], timeout=0)[0])
    if not ready:
        ray.cancel(reference, force=True)
        slow = f"no answer within {NODE_SECONDS:.0f} s: is the node overloaded, or lost?"
        return [Outcome("FAIL", "checks", slow)]
    try:
        return cast(list[Outcome], ray.get(reference))
    except RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        missing = next((line.strip() for line in lines if "No module named" in line), None)
        remedy = (
            "install the package on every node, or submit this command with `ray job submit"
            " --working-dir .`"
        )
        return [Outcome("FAIL", "checks", f"{missing}: {remedy}" if missing else lines[-1])]
