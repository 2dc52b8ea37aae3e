"""Laws, speed and memory of the model and its training on one GPU.

    python -m benchmarks.gpu                    # benchmarks/results/gpu-CARD.json
    python -m benchmarks.gpu --check            # compare with that file instead
    python -m benchmarks.gpu --smoke            # tiny sizes, to try the code; needs no GPU

Needs torch, numpy, safetensors and fsspec; other packages are stood in for where they are missing.
Every row is written when it ends; one that fails says why, and one that lacks memory is repeated at
half the batch. Sections that --budget leaves no time for are named in the file.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import stand_ins

STOOD_IN = stand_ins.install()

import torch  # noqa: E402

from benchmarks.gpu import ceilings, exactness, ratios, sampler, steps, training  # noqa: E402
from benchmarks.gpu.rows import Rows  # noqa: E402

RESULTS = Path(__file__).parents[1] / "results"
SECTIONS: dict[str, Callable[[Rows, int], None]] = {
    "ceilings": lambda rows, _: ceilings.measure(rows),
    "exactness": lambda rows, _: exactness.measure(rows),
    "steps": steps.measure,
    "unet": steps.measure_unet,
    "quickstart": lambda rows, _: steps.measure_quickstart(rows),
    "sampler": sampler.measure,
    "training": training.measure,
    "more_steps": steps.measure_more,
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="JSON file (by default named after the card)")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds (450)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections (all, in this order)")
    parser.add_argument("--batch", type=int, default=64, help="images per step at 256 px (64)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the code")
    parser.add_argument(
        "--check",
        nargs="?",
        type=Path,
        const=Path(),
        help="exit with status 1 if a ratio is over a tenth below that in this file (by default"
        " the card's in benchmarks/results); nothing there is overwritten",
    )
    return parser.parse_args(arguments)


def describe_machine(on_gpu: bool) -> dict[str, Any]:
    """Return card, driver, versions, clocks and commit."""

    def ask(*command: str) -> str:
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return found.stdout.strip()

    query = "driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    machine: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "stood_in": STOOD_IN,
        "commit": ask("git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if on_gpu:
        machine["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        machine[query] = ask("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return machine


def print_table(results: dict[str, Any]) -> None:
    """Print the steps, and every ratio."""
    print(
        "\n| step | batch | images/s | ms | utilisation (as dense) | peak GiB | kernels | waits |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in [
        row
        for name in ("steps", "more_steps", "unet", "quickstart")
        for row in results.get(name, [])
    ]:
        failed = row.get("error") or row.get("out_of_memory")
        shown = [row.get(key, "") for key in ("images_per_s", "ms")]
        used = [
            f"{row[key]:.1%}"
            for key in ("utilisation", "utilisation_counted_as_dense")
            if key in row
        ]
        used = f"{used[0]} ({used[1]})" if used else ""
        rest = [row.get(key, "") for key in ("peak_gib", "kernels", "host_waits")]
        cells = [row["name"], row.get("batch", ""), *shown, used, *rest]
        print("| " + " | ".join(map(str, cells)) + " |" + (f" {failed}" if failed else ""))
    print("\n| ratio | |\n|---|---|")
    for label, ratio in results["ratios"].items():
        print(f"| {label} | {ratio} |")


def main() -> None:
    """Measure; write and print the results."""
    arguments = parse(sys.argv[1:])
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.smoke:
        sys.exit("no GPU: --smoke tries the code on the CPU")
    if not on_gpu:
        torch.set_num_threads(1)
    machine = describe_machine(on_gpu)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["card"].lower().removeprefix("nvidia ")).strip("-")
    committed = RESULTS / f"gpu-{slug}.json"
    sections, before = arguments.only or list(SECTIONS), {}
    if arguments.check is not None:
        baseline = committed if arguments.check == Path() else arguments.check
        try:
            earlier = json.loads(baseline.read_text())
        except FileNotFoundError:
            sys.exit(f"{baseline}: no such file to compare with; a run without --check writes one")
        before = ratios.compute({name: earlier.get(name, []) for name in sections})
    aside = arguments.smoke or arguments.check is not None
    path = arguments.output or (Path(f"gpu-{slug}.json") if aside else committed)
    rows = Rows(
        device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        path=path,
        budget_seconds=arguments.budget,
        smoke=arguments.smoke,
        results={"machine": machine},
    )
    rows.say(json.dumps(machine))
    batch = min(arguments.batch, 8) if arguments.smoke else arguments.batch
    for name in sections:
        if rows.left <= 0:
            rows.results.setdefault("left_out", []).append(name)
            continue
        try:
            SECTIONS[name](rows, batch)
        except Exception as error:  # outside of a row: the model cannot be built, for example
            rows.results.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
            rows.say(f"{name} failed: {error!r}")
    rows.results["ratios"] = ratios.compute(rows.results)
    rows.write()
    print_table(rows.results)
    print(f"\n{path}; left out: {rows.results.get('left_out', [])}")
    falls = ratios.list_falls(rows.results["ratios"], before)
    if falls:
        sys.exit("over a tenth lower than before:\n" + "\n".join(falls))


if __name__ == "__main__":
    main()
