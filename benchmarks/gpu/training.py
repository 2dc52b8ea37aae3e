"""The training loop itself, on made images, and the copy of its state to the host."""

import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch

from benchmarks.gpu.models import imagenet, make_pixels, quickstart
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.timing import wait_for
from efae.config import Config
from efae.config.forms import with_overrides
from efae.training.loop import train
from efae.training.observer import Observer
from efae.training.process import Process


class _MadeImages:
    """As much of a data set and its loader as `train` uses."""

    wait_seconds = 0.0
    bad_samples: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Config, device: torch.device):
        count = config.training.global_batch_size
        keys = [str(i) for i in range(count)]
        self._made = [
            SimpleNamespace(image=make_pixels(count, config, device), key=keys) for _ in range(3)
        ]

    def loader(self, **_: Any) -> "_MadeImages":
        return self

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self._made

    def state_dict(self) -> dict[str, Any]:
        return {}


class _Speed(Observer):
    """Keeps the speed of the last interval; those before it compile and warm up."""

    images_per_second = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.images_per_second = metrics["images_per_second"]


def measure(rows: Rows, batch: int) -> None:
    """Add `efae.training.loop.train` itself, and how long its state's copy to the host takes."""
    tiny = rows.smoke
    for name, config, size, steps in (
        ("quickstart", quickstart(tiny), 4 if tiny else 512, 4 if tiny else 80),
        ("imagenet_256", imagenet(tiny), batch, 4 if tiny else 16),
    ):
        config = with_overrides(
            config,
            {
                "training.steps": steps,
                "training.log_interval": steps // 2,
                "training.precision": "bf16",
                "ray.num_workers": 1,
                "ray.use_gpu": False,
            },
        )

        def run(batch: int, config: Config = config) -> dict[str, Any]:
            config = with_overrides(config, {"training.global_batch_size": batch})
            observer = _Speed()
            dataset = cast(Any, _MadeImages(config, rows.device))
            state = train(config, dataset, Process(rows.device), observer=observer)
            wait_for(rows.device)
            began = time.perf_counter()
            host, _ = state.snapshot()
            copied = time.perf_counter() - began
            tensors = [tensor for part in host.values() for tensor in part.values()]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return {
                "images_per_s": round(observer.images_per_second, 1),
                "snapshot_ms": round(copied * 1e3, 1),
                "snapshot_mib": round(size / 2**20, 1),
            }

        rows.add_halving("training", name, size, run)
