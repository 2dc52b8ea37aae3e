"""The bytes themselves: a real S3 server, hosts behind slow links, and what the counters say.

The links are slower than the machine, so that seconds depend on bytes as they do where the network
is what one waits for. Every host is a network namespace with one loader and a cache of its own.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.hosts.network import Network
from benchmarks.sizing.host import GLOBAL_BATCH_SIZE, make_state
from benchmarks.sizing.model import BYTES_PER_PARAMETER
from benchmarks.sizing.simulate import simulate
from cluster import processes
from cluster.serving import find_service, start, wait_until_ready
from cluster.state import StackState
from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards

LINK_BYTES_PER_SECOND = 3e6
SERVER, FIRST = 0, 1
URI, CHECKPOINT = "s3://efae-data/noise", "s3://efae-runs/sizing/step-00000001"
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """One thing that hosts did: what was to be expected, and what was."""

    what: str
    hosts: int
    predicted_bytes: int
    """Over all hosts."""
    bytes: int
    predicted_seconds: float
    """Of the host that takes longest."""
    seconds: float

    @property
    def byte_ratio(self) -> float | None:
        """Measured over predicted; None where nothing should move."""
        return self.bytes / self.predicted_bytes if self.predicted_bytes else None

    @property
    def second_ratio(self) -> float | None:
        """The same of the time."""
        return self.seconds / self.predicted_seconds if self.predicted_seconds else None


def measure(folder: Path, images: int) -> list[Row]:
    """Two epochs on 1, 2 and 3 hosts, and a checkpoint written by one and read by all.

    Args:
        folder: of the server's data and the hosts' caches; its path is short.
        images: in the set, of some 200 kB.
    """
    with Network(4) as network, _served(network, folder / "server") as environment:
        os.environ.update(environment)
        _make_images(folder / "images", images)
        build_shards(f"folder:{folder / 'images'}", URI, resolution=256)
        rows: list[Row] = []
        for count in (1, 2, 3):
            with _hosts(network, folder, count) as hosts:
                if count == 1:
                    rows.append(_write_checkpoint(network, hosts[0]))
                rows += _read_epochs(network, hosts)
                rows.append(_read_checkpoint(network, hosts))
        return rows


def _read_epochs(network: Network, hosts: Sequence["_Host"]) -> Iterator[Row]:
    chunks = ShardDataset.open(URI).chunks
    expected = simulate(chunks, len(hosts), 2**30, 2, global_batch_size=GLOBAL_BATCH_SIZE)
    for epoch in range(2):
        received, seconds = _do(network, hosts, "epoch")
        each = expected[:, epoch]
        slowest = float(each.max()) / LINK_BYTES_PER_SECOND
        name = f"epoch {epoch + 1}"
        yield Row(name, len(hosts), int(each.sum()), received, slowest, seconds)


def _write_checkpoint(network: Network, host: "_Host") -> Row:
    before = network.count_sent(host.number)
    _, seconds = _do(network, [host], "write")
    sent, expected = network.count_sent(host.number) - before, _checkpoint_bytes()
    return Row("checkpoint written", 1, expected, sent, expected / LINK_BYTES_PER_SECOND, seconds)


def _read_checkpoint(network: Network, hosts: Sequence["_Host"]) -> Row:
    received, seconds = _do(network, hosts, "read")
    expected, count = _checkpoint_bytes(), len(hosts)
    least = expected / LINK_BYTES_PER_SECOND
    return Row("checkpoint read by all", count, count * expected, received, least, seconds)


def _checkpoint_bytes() -> int:
    model = make_state().model
    return BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in model.parameters())


class _Host:
    """A process on a host that obeys."""

    def __init__(self, network: Network, number: int, count: int, folder: Path):
        self.number = number
        rank = str(number - FIRST)
        arguments = [URI, CHECKPOINT, rank, str(count), str(folder / f"cache-{count}-{rank}")]
        python = [sys.executable, "-m", "benchmarks.sizing.host", *arguments]
        self.process = subprocess.Popen(
            network.run_on(number, python),
            cwd=_ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def order(self, command: str) -> None:
        """Sends a command without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def seconds(self) -> float:
        """Waits until the last command is done: how long it took."""
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of host {self.number} ended: {self.process.wait()}")
        return float(json.loads(answer)["seconds"])


def _do(network: Network, hosts: Sequence[_Host], command: str) -> tuple[int, float]:
    """All hosts at once: bytes that they received together, seconds of the slowest."""
    before = [network.count_received(host.number) for host in hosts]
    for host in hosts:
        host.order(command)
    seconds = max(host.seconds() for host in hosts)
    after = [network.count_received(host.number) for host in hosts]
    return sum(after) - sum(before), seconds


@contextlib.contextmanager
def _hosts(network: Network, folder: Path, count: int) -> Iterator[list[_Host]]:
    """Hosts whose processes have opened the set, behind links that are slow from now on."""
    hosts: list[_Host] = []
    try:
        for number in range(FIRST, FIRST + count):
            network.limit(number, LINK_BYTES_PER_SECOND)
            network.limit_sent(number, LINK_BYTES_PER_SECOND)
            hosts.append(_Host(network, number, count, folder))
        _do(network, hosts, "open")
        yield hosts
    finally:
        for host in hosts:
            host.process.kill()
            host.process.communicate()


@contextlib.contextmanager
def _served(network: Network, folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a client, while the local stack's S3 server runs on the first host."""
    state = StackState(folder, host=network.address(SERVER))
    start(state, "s3", place=partial(network.run_on, SERVER))
    try:
        wait_until_ready(state, "s3")
        environment = find_service("s3").environment(state)
        names = ("AWS_", "NO_PROXY", "no_proxy")
        yield {name: value for name, value in environment.items() if name.startswith(names)}
    finally:
        processes.stop(state.processes["s3"])


def _make_images(folder: Path, count: int) -> None:
    """Noise, which PNG makes no smaller, and which takes little time to decode."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (256, 256, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png", compress_level=0)


def describe(rows: Sequence[Row]) -> list[dict[str, object]]:
    """JSON objects, ratios with them."""
    return [
        asdict(row) | {"byte_ratio": row.byte_ratio, "second_ratio": row.second_ratio}
        for row in rows
    ]
