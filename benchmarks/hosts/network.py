"""Hosts on one machine: network namespaces on one bridge, which can be cut off, slowed and metered.

Needs root and `ip` and `tc` (iproute2). Each host has one interface, ``eth0``, one address and its
own loopback; the machine itself is on the bridge too, as somebody outside the cluster.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def find_obstacle() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"no {' and no '.join(missing)} on PATH: install iproute2"
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

    def limit(self, host: int, bytes_per_second: float) -> None:
        """Slows what the host receives; the last call counts."""
        _run("tc", "qdisc", "replace", "dev", self._port(host), *_bucket(bytes_per_second))

    def limit_sent(self, host: int, bytes_per_second: float) -> None:
        """Slows what the host sends; the last call counts."""
        tc = ("tc", "-netns", self._namespace(host))
        _run(*tc, "qdisc", "replace", "dev", "eth0", *_bucket(bytes_per_second))

    def count_received(self, host: int) -> int:
        """Bytes that the host received since it was made, with all headers."""
        # What the bridge's end has sent is what came in at the host's.
        counter = Path(f"/sys/class/net/{self._port(host)}/statistics/tx_bytes")
        return int(counter.read_text())

    def count_sent(self, host: int) -> int:
        """The same of what the host sent."""
        counter = Path(f"/sys/class/net/{self._port(host)}/statistics/rx_bytes")
        return int(counter.read_text())

    def _namespace(self, host: int) -> str:
        return f"{self._name}-{host}"

    def _port(self, host: int) -> str:
        """The bridge's end of the host's cable."""
        return f"{self._name}p{host}"


def _bucket(bytes_per_second: float) -> tuple[str, ...]:
    rate = f"{8 * bytes_per_second:.0f}bit"
    # A short queue drops what many connections send at once, and they wait for seconds.
    return ("root", "tbf", "rate", rate, "burst", "128kb", "latency", "1500ms")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)
