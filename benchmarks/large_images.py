"""A large photograph in tiles: the memory they save, and how far they are from the whole image.

    python -m benchmarks.photographs --output FOLDER --side 64
    python -m benchmarks.large_images --photographs FOLDER

Trains the preset on small crops for a short CPU time. Then one photograph that is held out is
encoded, acted on by every element and decoded, whole and in tiles, in one sampler step on one
thread. Memory is the peak above the loaded model and its input, each in a process of its own. Needs
Linux. Writes benchmarks/results/large_images-WIDTHxHEIGHT.json and prints a table.
"""

import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ablate import RESULTS
from benchmarks.compare_sizes import choose_data, show, train_for
from benchmarks.photographs.packages import fetch_packages, find_packages, unpack
from benchmarks.photographs.pictures import find_photographs, split
from efae.evaluation.measures import psnr, to_float
from efae.model.autoencoder import Autoencoder
from efae.presets import PRESETS

SIDE = 64
"""Side of the crops that the model is trained on, in pixels."""
LEVELS = 127.5
"""Levels of 255 in a unit of the range [-1, 1]."""


@dataclass
class Arguments:
    """Options of the benchmark."""

    photographs: Path
    """Folder of shard sets, SIDE/train and SIDE/held_out, as benchmarks.photographs makes them."""
    packages: Path | None = None
    """Folder of .deb files, as for benchmarks.photographs; by default they are fetched."""
    preset: str = "photographs_64"
    """Experiment."""
    cpu_seconds: float = 60.0
    """Training budget."""
    size: tuple[int, int] = (1536, 2048)
    """Height and width that the photograph is scaled and cropped to."""
    tiles: tuple[int, ...] = (512, 256)
    """Sides of tiles, in pixels."""


def read_photograph(packages: Path | None, size: tuple[int, int]) -> tuple[str, Tensor]:
    """Return the name and the pixels, uint8 (1, 3, h, w), of the largest held-out photograph.

    Raises:
        ValueError: It is smaller than `size`, or the packages cannot be read.
    """
    height, width = size
    with tempfile.TemporaryDirectory() as folder:
        archives = find_packages(packages) if packages else fetch_packages(Path(folder))
        unpacked = unpack(archives, Path(folder) / "unpacked")
        _, held_out = split(find_photographs(unpacked)[0])
        largest = max(held_out, key=lambda each: (each.shorter, each.name))
        if largest.size[0] < height or largest.size[1] < width:
            raise ValueError(
                f"--size {height} {width}: the largest held-out photograph is {show(largest.size)}"
            )
        pixels = ImageOps.fit(largest.read(), (width, height), Image.Resampling.LANCZOS)
    return largest.name, torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]


def measure_memory(folder: Path, action: str, tile: int | None) -> tuple[float, float]:
    """Return the peak of memory in MiB, above that of model and input, and the CPU seconds.

    Args:
        folder: Folder with the model and its inputs.
        action: Method of the model, "encode" or "decode".
        tile: Side of a tile, in pixels; None: the whole image.
    """
    torch.set_num_threads(1)
    model = Autoencoder.from_pretrained(folder / "model")
    given = load_file(folder / "inputs.safetensors")["image" if action == "encode" else "latent"]

    def run(given: Tensor, tile: int | None) -> None:
        if action == "encode":
            model.encode(given, tile=tile)
        else:
            model.decode(given, 1, seed=0, tile=tile)

    run(given[..., :64, :64], None)  # loads libraries
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, started = _read_memory("VmRSS"), time.process_time()
    run(given, tile)
    return _read_memory("VmHWM") - before, time.process_time() - started


def _read_memory(name: str) -> float:
    """Return a line of this process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


@torch.no_grad()
def compare(
    model: Autoencoder, image: Tensor, tiles: Sequence[int]
) -> tuple[float, dict[int, dict[str, Any]]]:
    """Return the PSNR of the whole photograph, and the largest differences in tiles from it.

    Those of latents are at unit scale, by element: encode(g x) in tiles from act(g, encode(x)). So
    are those of images, in levels of 255: decode(act(g, encode(x)), g noise) in tiles from
    g decode(encode(x), noise).
    """
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    latent = model.encode(image)
    whole = model.decode(latent, 1, noise)
    rows: dict[int, dict[str, Any]] = {}
    for tile in tiles:
        encoded = model.encode(image, tile=tile)
        row: dict[str, Any] = {"latent_difference": {}, "image_difference": {}}
        for g in model.group:
            own = encoded
            if g != model.group.identity:
                own = model.encode(g.act_on_image(image), tile=tile)
            acted = model.act(g, latent)
            row["latent_difference"][g.name] = float((own - acted).abs().max())
            decoded = model.decode(model.act(g, encoded), 1, g.act_on_image(noise), tile=tile)
            difference = (decoded - g.act_on_image(whole)).abs().max()
            row["image_difference"][g.name] = float(difference) * LEVELS
        rows[tile] = row
    return float(psnr(whole.clamp(-1, 1), image)), rows


def print_table(results: dict[str, Any]) -> None:
    """Print memory and differences, in Markdown."""
    print("| tile | encode | decode | largest difference of latents | of images, levels of 255 |")
    print("|---|---|---|---|---|")
    for row in results["rows"]:
        worst = [
            f"{max(row[name].values()):.1e}" if name in row else ""
            for name in ("latent_difference", "image_difference")
        ]
        memory = [f"{row[action]['peak_mib']:.0f} MiB" for action in ("encode", "decode")]
        print(f"| {row['tile'] or 'none'} | {' | '.join(memory + worst)} |")


def main() -> None:
    """Train, measure, write the results and print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    name, pixels = read_photograph(arguments.packages, arguments.size)
    experiment = choose_data(PRESETS[arguments.preset][1], arguments.photographs, (SIDE, SIDE))
    model, facts = train_for(experiment, arguments.cpu_seconds)
    model.requires_grad_(False)
    image = to_float(pixels)
    quality, differences = compare(model, image, arguments.tiles)
    rows: list[dict[str, Any]] = []
    # A new process for each, whose allocator has no freed memory to use again.
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        model.save_pretrained(folder / "model")
        save_file(
            {"image": image, "latent": model.encode(image).contiguous()},
            folder / "inputs.safetensors",
        )
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool:
            for tile in (None, *arguments.tiles):
                row: dict[str, Any] = {"tile": tile}
                for action in ("encode", "decode"):
                    peak, seconds = pool.submit(measure_memory, folder, action, tile).result()
                    row[action] = {"peak_mib": peak, "cpu_seconds": seconds}
                rows.append(row | (differences[tile] if tile else {}))
    commit = ["git", "rev-parse", "--short", "HEAD"]
    results = {
        "photograph": name,
        "size": arguments.size,
        "preset": arguments.preset,
        "training": facts,
        "psnr": quality,
        "hardware": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": subprocess.run(
            commit, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    height, width = arguments.size
    path = RESULTS / f"large_images-{width}x{height}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{name}: {quality:.2f} dB")
    print_table(results)


if __name__ == "__main__":
    main()
