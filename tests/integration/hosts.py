"""Several hosts on one machine: network namespaces on one bridge, and a Ray cluster on them.

Needs root and `ip` (iproute2). Each host has one interface, ``eth0``, one address and its own
loopback; the machine itself is on the bridge too, as somebody outside the cluster.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster import processes
from cluster.processes import ProcessRecord
from cluster.services import client_environment
from cluster.serving import find_service, start, wait_until_ready
from cluster.state import StackState

_OBJECT_STORE_BYTES = 80 * 2**20  # Ray asks for 75 MiB at least
_NODE_SECONDS = 60.0
_HEAD_ENVIRONMENT = {
    # A host that does not answer for three seconds is lost; Ray's own defaults take half a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def find_obstacle() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no ip on PATH: install iproute2"
    name = f"efae-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return made.stderr.strip()
    _run("ip", "netns", "del", name)
    return ""


class Network:
    """`count` hosts, numbered from 0; a context that leaves no namespace or interface behind."""

    def __init__(self, count: int):
        self.count = count
        self._name = f"ef{secrets.token_hex(3)}"  # an interface's name has 15 characters at most
        self._subnet = f"10.{secrets.randbelow(55) + 200}.{secrets.randbelow(256)}"

    def __enter__(self) -> "Network":
        try:
            _run("ip", "link", "add", self._name, "type", "bridge")
            _run("ip", "addr", "add", f"{self.outside}/24", "dev", self._name)
            _run("ip", "link", "set", self._name, "up")
            for host in range(self.count):
                self._add(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for host in range(self.count):
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", self._namespace(host))  # its interface goes with it
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "link", "del", self._name)

    def _add(self, host: int) -> None:
        namespace, port = self._namespace(host), self._port(host)
        _run("ip", "netns", "add", namespace)
        peer = ("peer", "name", "eth0", "netns", namespace)
        _run("ip", "link", "add", port, "type", "veth", *peer)
        _run("ip", "link", "set", port, "master", self._name, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self.address(host)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            _run("ip", "-netns", namespace, *command)

    def address(self, host: int) -> str:
        """The host's address."""
        return f"{self._subnet}.{host + 1}"

    @property
    def outside(self) -> str:
        """The address of the machine that the hosts are on."""
        return f"{self._subnet}.254"

    def run_on(self, host: int, command: Sequence[str]) -> list[str]:
        """The command that runs `command` on a host."""
        return ["ip", "netns", "exec", self._namespace(host), *command]

    def cut(self, host: int) -> None:
        """Nothing reaches the host or leaves it; nobody is told."""
        _run("ip", "link", "set", self._port(host), "down")

    def mend(self, host: int) -> None:
        """Undoes `cut`."""
        _run("ip", "link", "set", self._port(host), "up")

    def _namespace(self, host: int) -> str:
        return f"{self._name}-{host}"

    def _port(self, host: int) -> str:
        """The bridge's end of the host's cable."""
        return f"{self._name}p{host}"


class HostCluster:
    """A context that leaves no process behind.

    Args:
        network: of at least one host; the first has the servers and no CPUs for work.
        folder: for data, logs and sockets; its path is short because Unix sockets lie in it.
        cpus: of each other host.
    """

    def __init__(self, network: Network, folder: Path, cpus: int = 1):
        self.network = network
        self.state = StackState(folder, host=network.address(0))
        self._cpus = cpus
        self._nodes: dict[int, ProcessRecord] = {}
        self._ended: list[ProcessRecord] = []

    def __enter__(self) -> "HostCluster":
        try:
            self._serve()
            for host in range(1, self.network.count):
                self.start_node(host)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        servers = reversed(self.state.processes.values())
        for record in [*self._nodes.values(), *self._ended, *servers]:
            processes.stop(record, grace_seconds=5)

    @property
    def environment(self) -> dict[str, str]:
        """A client's, outside the cluster: the dashboard's address and the token are all of Ray."""
        client = client_environment(self.state)
        return client | {"RAY_ADDRESS": client["RAY_API_SERVER_ADDRESS"]}

    def log(self, name: str) -> Path:
        """Where a server or ``node-1`` and so on writes."""
        return self.state.folder / "logs" / f"{name}.log"

    def disk(self, host: int) -> Path:
        """The host's own folder for temporary files, shards and models."""
        return self.state.folder / f"disk-{host}"

    def start_node(self, host: int) -> None:
        """Starts the host's Ray node without waiting for it; the one before must have ended."""
        ray = find_service("ray")
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--block"),
            f"--address={self.state.host}:{self.state.ports['ray.gcs']}",
            f"--node-ip-address={self.network.address(host)}",
            f"--num-cpus={self._cpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            # The hosts share a disk, and the names of sockets must not meet.
            f"--temp-dir={self.state.folder / f'node-{host}'}",
            *("--disable-usage-stats", "--log-color=false"),
        ]
        disk = self.disk(host)
        disk.mkdir(exist_ok=True)
        environment = ray.environment(self.state) | {
            # Every host has the name of this machine, which is an address of none of them.
            "GLOO_SOCKET_IFNAME": "eth0",
            "HOME": str(disk),
            "TMPDIR": str(disk),
        }
        record = processes.start(
            self.network.run_on(host, command), environment, self.log(f"node-{host}")
        )
        self._nodes[host] = record

    def bring_back(self, host: int, seconds: float = 30.0) -> None:
        """Mends the host's cable and starts its node anew, as an operator or autoscaler does.

        The node that was cut off learns that it was given up and ends; if it does not within
        `seconds`, it is ended.
        """
        self.network.mend(host)
        old = self._nodes.pop(host)
        self._ended.append(old)
        deadline = time.monotonic() + seconds
        while processes.is_running(old) and time.monotonic() < deadline:
            time.sleep(0.2)
        processes.stop(old, grace_seconds=5)
        self.start_node(host)

    def _serve(self) -> None:
        place = partial(self.network.run_on, 0)
        for name in ("s3", "mlflow"):
            start(self.state, name, place=place)
        start(self.state, "ray", ["--num-cpus=0"], _HEAD_ENVIRONMENT, place)
        wait_until_ready(self.state, "s3", "mlflow", "ray")

    def _wait_for_nodes(self) -> None:
        logs = [self.log(f"node-{host}") for host in self._nodes]
        deadline = time.monotonic() + _NODE_SECONDS
        while not all("Ray runtime started" in log.read_text() for log in logs):
            if time.monotonic() > deadline:
                said = "\n".join(log.read_text()[-1000:] for log in logs)
                raise RuntimeError(f"a node did not join the cluster:\n{said}")
            time.sleep(0.1)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)
