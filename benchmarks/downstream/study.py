"""What both studies share: settings, images, results, and the cost of a step."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablate import RESULTS
from benchmarks.downstream.images import Pose, build_images, read_images, write_images
from benchmarks.downstream.judge import Judge
from data_pipelines import ShardDataset
from data_pipelines.loading.dataset import ImageSet
from efae.config import AnyConfig
from efae.config.forms import with_overrides
from efae.training.loop import train
from efae.training.observer import Observer
from efae.training.process import Process

CPU = torch.device("cpu")
Say = Callable[[str], None]
FIRST_HALF = 30_000
"""Number of training images for generators; tokenizers train on the others."""
TIMED_STEPS, TIMED_ROUNDS = 16, 3


@dataclass(frozen=True)
class Settings:
    """Settings of a study."""

    images: Path
    """Folder with the idx files of Fashion-MNIST."""
    folder: Path = Path(".local/downstream")
    """Folder for shards, models and latents."""
    results: Path = RESULTS
    """Folder for downstream-STUDY.json."""
    seeds: int = 3
    """Seeds of every run of `symmetry`: of its images and of its generator."""
    sizes: tuple[int, ...] = (500, 2000, 10_000)
    """Numbers of images to train generators on; `prediction` takes the largest."""
    upright_size: int = 2000
    """The one of these that upright images are compared at."""
    generator_seconds: float = 36.0
    """CPU seconds of training of each generator, on an idle core."""
    tokenizer_seconds: float = 36.0
    """CPU seconds of training of each tokenizer, on an idle core."""
    samples: int = 1500
    """Number of samples of each generator."""
    evaluated: int = 512
    """Number of held-out images that a tokenizer is evaluated on."""


class Study:
    """One study: its images, and its results, which are written after every run.

    Args:
        name: Name of the study, for its result file.
        settings: Settings of the study.
        say: Function that prints a line.

    Raises:
        ValueError: There are results of other settings.
    """

    def __init__(self, name: str, settings: Settings, say: Say):
        self.settings, self.folder, self.say = settings, settings.folder, say
        self._path = settings.results / f"downstream-{name}.json"
        shared = json.loads(json.dumps(asdict(settings), default=str))
        for key in ("images", "folder", "results", "seeds"):
            del shared[key]
        found = json.loads(self._path.read_text()) if self._path.exists() else {"runs": []}
        if found.get("settings", shared) != shared:
            raise ValueError(
                f"{self._path} holds runs with the settings {found['settings']}: repeat them, or"
                " choose another --results"
            )
        self.results: dict[str, Any] = found | {
            "settings": shared,
            "hardware": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
            "torch": torch.__version__,
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip(),
        }
        build_images(settings.images, self.folder / "images")
        self.judge = cache(self._build_judge)

    def has(self, **run: Any) -> bool:
        """Return whether a run with these values is among the results."""
        return any(row.items() >= run.items() for row in self.results["runs"])

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the results of a run."""
        self.results["runs"].append(dict(row))
        self.save()

    def save(self) -> None:
        """Write the results."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.results, indent=1) + "\n")

    def tokenizer_images(self, pose: Pose) -> Path:
        """Return the shards that tokenizers are trained on: the second half of the images."""
        return self._write(pose, "tokenizer_images", slice(FIRST_HALF, None), False)

    def generator_images(self, pose: Pose, seed: int, views: bool = False) -> Path:
        """Return the shards of a seed's images, of which a generator sees the first ones.

        Raises:
            ValueError: The first half of the images does not suffice for so many seeds.
        """
        most = max(self.settings.sizes)
        if (seed + 1) * most > FIRST_HALF:
            raise ValueError(
                f"seed {seed} with {most} images: {FIRST_HALF} are there for all; use fewer --seeds"
            )
        images = slice(seed * most, (seed + 1) * most)
        return self._write(pose, f"images-{seed}{'-views' if views else ''}", images, views)

    def _write(self, pose: Pose, name: str, chosen: slice, views: bool) -> Path:
        folder = self.folder / pose / name
        if not folder.exists():
            images, labels = read_images(self.folder / "images" / "train", pose)
            each = min(self.settings.sizes)
            write_images(folder, images[chosen], labels[chosen], each, views)
        return folder

    def held_out(self, pose: Pose) -> ImageSet:
        """Return the held-out images."""
        folder = self.folder / pose / "held_out"
        if not folder.exists():
            write_images(folder, *read_images(self.folder / "images" / "test", pose), 1000)
        found = ShardDataset.open(str(folder))
        assert isinstance(found, ImageSet)
        return found

    def _build_judge(self, pose: Pose) -> Judge:
        return Judge(self.held_out(pose), self.settings.samples, self.say)

    def count_steps(
        self, runs: Mapping[str, tuple[AnyConfig, ShardDataset]], seconds: float
    ) -> dict[str, int]:
        """Return the steps that each kind of run can take in so many CPU seconds.

        Costs are measured once, in alternation, and kept with the results: later runs of a kind
        take as many steps, however busy the machine is.
        """
        costs: dict[str, float] = self.results.setdefault("seconds_per_step", {})
        missing = [name for name in runs if name not in costs]
        for name in missing * TIMED_ROUNDS:
            config, dataset = runs[name]
            watch = _Stopwatch()
            config = with_overrides(config, {"training.steps": TIMED_STEPS})
            train(config, dataset, Process(CPU), observer=watch)
            costs[name] = min(costs.get(name, float("inf")), watch.seconds_per_step())
        self.save()
        return {name: max(1, round(seconds / costs[name])) for name in runs}


class _Stopwatch(Observer):
    """Takes the CPU time at the end of every step."""

    def __init__(self):
        super().__init__()
        self._ends: list[float] = []

    def end_step(self) -> None:
        self._ends.append(time.process_time())

    def seconds_per_step(self) -> float:
        """Return the median; the loader reads ahead in some steps."""
        pairs = zip(self._ends, self._ends[1:], strict=False)
        return statistics.median(later - earlier for earlier, later in pairs)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def show(values: list[float], form: str = ".1f") -> str:
    """Return the mean, with the standard deviation if there are several values."""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"
