"""A Ray cluster like those of users, on this host: a head without CPUs and nodes of one CPU each.

Every node is a separate `ray start --block`, so that it can fail alone. Only processes that descend
from those started here are ever found, killed or stopped.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster import ports, processes
from cluster.processes import ProcessRecord
from cluster.serving import find_service, start, wait_until_ready
from cluster.state import StackState

_OBJECT_STORE_BYTES = 80 * 2**20  # Ray requires at least 75 MiB
_NODE_SECONDS = 60.0

# Kinds of process to kill: whether it runs on the head, and the test of its command line.
TARGETS: dict[str, tuple[bool, Callable[[list[str]], bool]]] = {
    "worker": (False, lambda command: "RayTrainWorker" in " ".join(command)),
    "raylet": (False, lambda command: Path(command[0]).name == "raylet"),
    "driver": (True, lambda command: command[1:2] == ["jobs/train.py"]),
    "controller": (True, lambda command: "TrainController" in " ".join(command)),
    "head": (True, lambda command: True),
}


class Cluster:
    """Head and nodes; a context manager that leaves no process behind.

    Args:
        state: State of a stack whose S3 and MLflow run; EFAE_RAY_HEAD_CPUS sets the head's CPUs.
        size: Number of worker nodes.
    """

    def __init__(self, state: StackState, size: int):
        self.state = state
        self.size = size
        self.nodes: list[ProcessRecord] = []
        self._gone: list[ProcessRecord] = []
        self._count = 0

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the head and all nodes; return once they have joined."""
        start(self.state, "ray")
        wait_until_ready(self.state, "ray")
        logs = [self.start_node() for _ in range(self.size)]
        deadline = time.monotonic() + _NODE_SECONDS
        while not all("Ray runtime started" in log.read_text() for log in logs):
            if time.monotonic() > deadline:
                tails = "\n".join(log.read_text()[-1000:] for log in logs)
                raise RuntimeError(f"a node did not join the cluster:\n{tails}")
            time.sleep(0.1)

    def start_node(self) -> Path:
        """Start one more node without waiting for it; return its log."""
        ray = find_service("ray")
        self._count += 1
        log = self.state.folder / "logs" / f"node-{self._count}.log"
        # With its own loopback address, Ray takes the node for another host. In lower case, Ray
        # would replace "localhost" with the external address, where nothing listens.
        command = [
            str(Path(sys.executable).with_name("ray")),
            *("start", "--block", f"--address=LOCALHOST:{self.state.ports['ray.gcs']}"),
            *(f"--node-ip-address=127.0.0.{1 + self._count}", "--num-cpus=1"),
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--dashboard-agent-listen-port={ports.pick_free(1)[0]}",
            # Nodes that start together in one folder choose equal names for their sockets.
            f"--temp-dir={self.state.socket_folder / f'node-{self._count}'}",
            *("--min-worker-port=0", "--max-worker-port=0"),
            *("--disable-usage-stats", "--log-color=false"),
        ]
        # The stack's own setting, 0, keeps the head on loopback and lets no node join.
        environment = ray.environment(self.state) | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        self.nodes.append(processes.start(command, environment, log))
        return log

    def stop(self) -> None:
        """Stop everything that was started here."""
        head = self.state.processes.pop("ray", None)
        for record in [*self.nodes, *self._gone, *([head] if head else [])]:
            processes.stop(record, grace_seconds=5)
        self.nodes, self._gone = [], []

    def find(self, kind: str) -> list[psutil.Process]:
        """Return the live processes of a kind of `TARGETS`, which may be none."""
        on_head, is_target = TARGETS[kind]
        leaders = [self.state.processes["ray"]] if on_head else self.nodes
        found: list[psutil.Process] = []
        for leader in filter(processes.is_running, leaders):
            for process in psutil.Process(leader.pid).children(recursive=True):
                try:
                    command = process.cmdline()
                except psutil.Error:
                    continue
                if command and is_target(command):
                    found.append(process)
        return found

    def kill(self, kind: str, process: psutil.Process) -> float:
        """Send SIGKILL, then act like a cluster manager: start a new node, or a new cluster.

        Args:
            kind: Kind of process, a key of `TARGETS`.
            process: Process of that kind, from `find`; for "head", all of the head's are killed.

        Returns:
            Time of the kill, in seconds since the epoch.

        Raises:
            psutil.NoSuchProcess: The process has already ended; nothing was done.
        """
        others = self.find("head") if kind == "head" else []
        node = next((node for node in self.nodes if _descends(process, node)), None)
        now = time.time()
        process.send_signal(signal.SIGKILL)
        for other in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.send_signal(signal.SIGKILL)
        if kind == "head":
            self.stop()  # nodes cannot join another head
            self.start()
        if kind == "raylet" and node:
            self.nodes.remove(node)
            self._gone.append(node)
            self.start_node()
        return now


def _descends(process: psutil.Process, record: ProcessRecord) -> bool:
    return record.pid in {parent.pid for parent in process.parents()}
