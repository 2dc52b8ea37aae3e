"""What a host of the measurement does: reads an epoch, writes or reads a checkpoint, when told to.

Each line of input is a command; the answer is a line of JSON, {"seconds": how long it took}.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from data_pipelines import ShardDataset
from efae.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from efae.config import Config
from efae.presets import QUICKSTART
from efae.training.state import TrainState

GLOBAL_BATCH_SIZE = 64
CONFIG = replace(QUICKSTART, model=replace(QUICKSTART.model, hidden_size=384))


def make_state(config: Config = CONFIG) -> TrainState:
    """A state after one step, so that the optimizer has its moments."""
    state = TrainState.create(config, torch.device("cpu"))
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.step = 1
    return state


class Host:
    """One loading process with a cache of its own."""

    def __init__(self, uri: str, checkpoint_uri: str, rank: int, world_size: int, cache: Path):
        dataset = ShardDataset.open(uri)
        self._loader = dataset.loader(
            GLOBAL_BATCH_SIZE, rank, world_size, cache_dir=cache, cache_bytes=2**30
        )
        self._checkpoint_uri = checkpoint_uri
        self._state = make_state()

    def epoch(self) -> None:
        """One pass over this rank's share, in the next epoch's order."""
        for _ in self._loader:
            pass

    def write(self) -> None:
        """Writes the checkpoint."""
        tensors, metadata = self._state.snapshot()
        write_checkpoint(self._checkpoint_uri, **tensors, metadata=metadata, config=CONFIG)

    def read(self) -> None:
        """Reads the checkpoint, and makes it the state."""
        self._state.restore(read_checkpoint(self._checkpoint_uri))


def main() -> None:
    """Obeys until the input ends."""
    torch.set_num_threads(1)
    uri, checkpoint_uri, rank, world_size, cache = sys.argv[1:]
    host = Host(uri, checkpoint_uri, int(rank), int(world_size), Path(cache))
    commands: dict[str, Callable[[], None]] = {
        "epoch": host.epoch,
        "write": host.write,
        "read": host.read,
        "open": lambda: None,
    }
    for line in sys.stdin:
        started = time.perf_counter()
        commands[line.strip()]()
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
