"""Rows of results: each is written to the file when it ends, and an error stays in its row."""

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from efae.training.micro_batches import OutOfMemory


@dataclass
class Rows:
    """The results so far, by section.

    Attributes:
        device: Device to measure.
        path: JSON file, written anew after every row.
        budget_seconds: Time after which no section or row begins.
        smoke: Whether sizes are tiny, to try the code.
        results: Everything that is written.
    """

    device: torch.device
    path: Path
    budget_seconds: float
    smoke: bool
    results: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget_seconds - (time.monotonic() - self.began)

    def add(self, section: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Add what `measure` returns, or its error, as a row."""
        row: dict[str, Any] = {"name": name}
        if self.left <= 0:
            self.results.setdefault("left_out", []).append(f"{section}: {name}")
            return row
        began = time.monotonic()
        try:
            row |= measure()
        except (torch.OutOfMemoryError, OutOfMemory) as error:
            row["out_of_memory"] = str(error).splitlines()[0][:200]
        except Exception as error:  # a row that fails must not end the others
            row["error"] = f"{type(error).__name__}: {str(error)[:400]}"
            row["trace"] = traceback.format_exc()[-2000:]
        row["seconds"] = round(time.monotonic() - began, 1)
        self.results.setdefault(section, []).append(row)
        self.write()
        shown = {k: v for k, v in row.items() if k not in ("name", "trace", "top_kernels")}
        self.say(f"{section}: {name}: {json.dumps(shown, default=float)}")
        free(self.device)
        return row

    def add_halving(
        self, section: str, name: str, batch: int, measure: Callable[[int], dict[str, Any]]
    ) -> dict[str, Any]:
        """Add a row at this batch size, or at half of it, and so on, until it fits into memory."""
        while True:
            row = self.add(section, name, lambda batch=batch: {"batch": batch} | measure(batch))
            if "out_of_memory" not in row or batch == 1:
                return row
            batch //= 2

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def write(self) -> None:
        """Write the file."""
        self.results["seconds"] = round(time.monotonic() - self.began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1, default=float) + "\n")


def free(device: torch.device) -> None:
    """Drop compiled code and cached memory, so that a row does not depend on those before it."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
