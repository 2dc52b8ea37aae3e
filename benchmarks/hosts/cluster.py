"""A cluster of several hosts: S3, MLflow and Ray's head on the first, a Ray node on each other."""

import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.hosts.network import Network
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
