"""Samples per second of our loader and its alternatives, from the same S3.

    python -m benchmarks.compare_loaders --images jpeg256 png32 --rounds 3
    python -m benchmarks.compare_loaders --images jpeg256 --only ours webdataset --ranks 1

Starts its own S3 server, writes the images to it as WebDataset tars, MDS and litdata, and reads one
epoch with each pipeline in a separate process. A round runs every pipeline once. The times include
the first batch but not the set-up or the server. Cold is the first epoch, from S3; warm is a later
one, from the pipeline's own cache. Prints medians and their ratio to the best webdataset pipeline
without our decoder, and writes benchmarks/results/loaders-IMAGES.json after each round.

This project does not install the other loaders; missing ones are reported and skipped.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.loaders import FORMATS, PACKAGES, PIPELINES, Task
from benchmarks.loaders.image_sets import IMAGE_SETS, write_tars
from benchmarks.loaders.s3_server import serve_s3
from cluster.ports import LOOPBACK, pick_free

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
STOCK = ("webdataset, rgb8", "webdataset, pil", "webdataset, torchrgb8")
STOCK += ("webdataset, rgb8, 1 worker", "webdataset, rgb8, 2 workers")
STEP_SECONDS = 0.1
TIMEOUT_SECONDS = 900


@dataclass
class Arguments:
    """Options of the comparison."""

    images: tuple[str, ...] = ("jpeg256", "png32")
    """Image sets: jpeg256, png32."""
    rounds: int = 3
    """Measurements of each pipeline."""
    only: tuple[str, ...] = ()
    """Names of pipelines, or prefixes of names; all installed pipelines when empty."""
    ranks: tuple[int, ...] = (1, 2)
    """Numbers of processes that share an epoch on one machine."""
    photos: Path | None = None
    """Folder of .jpg photographs to crop for jpeg256; OpenMoji drawings by default."""
    share: float = 1.0
    """Factor on the number of images; below 1 is a trial run, which writes no results."""


@dataclass(frozen=True)
class Case:
    """One row: a pipeline, its cache cold or warm, and its number of ranks."""

    pipeline: str
    warm: bool
    ranks: int


def list_cases(arguments: Arguments, extension: str) -> list[Case]:
    """List the cases of one image set; print the pipelines that are not installed.

    Raises:
        ValueError: A name in `only` matches no pipeline.
    """
    chosen: set[str] = set()
    for only in arguments.only:
        names = {only} & PIPELINES.keys() or {n for n in PIPELINES if n.startswith(only)}
        if not names:
            raise ValueError(f"--only {only}: no such pipeline; use one of {', '.join(PIPELINES)}")
        chosen |= names
    cases: list[Case] = []
    for name, pipeline in PIPELINES.items():
        if chosen and name not in chosen:
            continue
        if pipeline.jpeg_only and extension != "jpg":
            continue
        missing = [need for need in pipeline.needs if importlib.util.find_spec(need) is None]
        if missing:
            packages = " ".join(f"'{PACKAGES[need]}'" for need in missing)
            print(f"{name}: skipped; it needs `pip install {packages}`", flush=True)
            continue
        cases += [
            Case(name, warm, ranks)
            for ranks in arguments.ranks
            if ranks in pipeline.ranks
            for warm in (False, True)
            if (pipeline.warm if warm else pipeline.cold)
        ]
    return cases


def start(
    case: Case, task: Task, environment: dict[str, str], *action: str
) -> list[subprocess.Popen[str]]:
    """Start the processes of all ranks; they open their data and wait."""
    program = (sys.executable, "-m", "benchmarks.loaders.measure")
    port = str(pick_free(1)[0])
    processes: list[subprocess.Popen[str]] = []
    for rank in range(case.ranks):
        mine = replace(task, rank=rank, world_size=case.ranks, warm=case.warm)
        distributed = {"RANK": rank, "WORLD_SIZE": case.ranks, "MASTER_PORT": port}
        distributed |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": case.ranks}
        processes.append(
            subprocess.Popen(
                [*program, case.pipeline, json.dumps(asdict(mine)), *action],
                env={
                    **environment,
                    **{name: str(value) for name, value in distributed.items()},
                    "MASTER_ADDR": LOOPBACK,
                    "OMP_NUM_THREADS": "1",
                    "LITDATA_DISABLE_VERSION_CHECK": "1",
                    "RAY_USAGE_STATS_ENABLED": "0",
                },
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def measure(
    case: Case, task: Task, environment: dict[str, str], *action: str
) -> list[dict[str, float]]:
    """Run one case; return the measurements of each rank.

    Raises:
        RuntimeError: A process failed; it has printed the cause.
    """
    with tempfile.TemporaryDirectory() as cache:
        processes = start(case, replace(task, cache=cache), environment, *action)
        try:
            for process in processes:
                assert process.stdout
                while process.stdout.readline().strip() not in ("ready", ""):
                    pass
            outputs = []
            for process in processes:
                assert process.stdin
                process.stdin.write("\n")
                process.stdin.flush()
            for process in processes:
                outputs.append(process.communicate(timeout=TIMEOUT_SECONDS)[0])
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{case} failed")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def add_ranks(found: Sequence[dict[str, float]], samples: int) -> dict[str, float]:
    """Combine the measurements of all ranks: rates, and the share of the epoch that they read."""
    images = sum(rank["images"] for rank in found)
    return {
        "samples_per_cpu_second": images / sum(rank["cpu_seconds"] for rank in found),
        "samples_per_second": images / max(rank["wall_seconds"] for rank in found),
        "share_of_epoch": images / samples,
        "opening_cpu_seconds": sum(rank["opening_cpu_seconds"] for rank in found),
    }


def summarize(rounds: dict[Case, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Return a row per case: medians, range, and ratio to the best comparable stock pipeline."""
    rows: list[dict[str, Any]] = []
    for case, found in rounds.items():
        medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
        rates = [one["samples_per_cpu_second"] for one in found]
        rows.append({**asdict(case), **medians, "lowest": min(rates), "highest": max(rates)})
    for row in rows:
        stock = [
            other["samples_per_cpu_second"]
            for other in rows
            if other["pipeline"] in STOCK
            and (other["warm"], other["ranks"]) == (row["warm"], row["ranks"])
        ]
        row["ratio"] = row["samples_per_cpu_second"] / max(stock) if stock else None
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| pipeline | cache | ranks | samples per CPU second (range) | ratio | per second |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        yield (
            f"| {row['pipeline']} | {'warm' if row['warm'] else 'cold'} | {row['ranks']}"
            f" | {row['samples_per_cpu_second']:.0f} ({row['lowest']:.0f}-{row['highest']:.0f})"
            f" | {ratio} | {row['samples_per_second']:.0f} |"
        )


def compare(
    name: str, arguments: Arguments, environment: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Write one image set and measure all cases; yield the results so far after each round."""
    chosen = IMAGE_SETS[name]
    cases = list_cases(arguments, chosen.extension)
    uri = f"s3://efae-data/{name}/tars"
    origin = write_tars(name, uri, arguments.photos, arguments.share)
    print(f"{name}: {origin}", flush=True)
    task = Task(uri, chosen.extension, chosen.side, origin["samples"], "", chosen.batch_size)
    modules = {PIPELINES[case.pipeline].module: case for case in cases}
    for module in FORMATS.keys() & modules.keys():
        for process in start(replace(modules[module], ranks=1), task, environment, "write"):
            if process.wait():
                raise RuntimeError(f"{module}: its set could not be written")
    waits = {
        f"{'warm' if warm else 'cold'}": measure(
            Case("ours", warm, 1), task, environment, "wait", str(STEP_SECONDS)
        )[0]
        for warm in (False, True)
    }
    rounds: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(1, arguments.rounds + 1):
        for case in list(rounds):
            try:
                found = measure(case, task, environment, "epoch")
            except RuntimeError as error:
                print(f"{error}: skipped", flush=True)
                del rounds[case]
                continue
            rounds[case].append(add_ranks(found, task.samples))
        print(f"{name}: round {number} of {arguments.rounds} measured", flush=True)
        rows = summarize(rounds)
        yield {
            "images": origin,
            "rounds": number,
            "rows": rows,
            "wait_under_a_training_step": waits,
        }


def describe_machine() -> dict[str, Any]:
    """Return hardware, versions, date and commit."""
    packages = ["torch", "numpy", "pillow", "simplejpeg", *PACKAGES.values()]
    found: dict[str, str] = {}
    for package in (package.split("[")[0] for package in packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "hardware": f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()}"
        " cores, shared with the server",
        "python": platform.python_version(),
        "versions": found,
    }


def main() -> None:
    """Measure; write and print the results."""
    arguments = tyro.cli(Arguments, description=__doc__)
    for name in arguments.images:
        if name not in IMAGE_SETS:
            sys.exit(f"--images {name}: use {' or '.join(IMAGE_SETS)}")
    machine = describe_machine()  # first: writing the results makes the checkout dirty
    with tempfile.TemporaryDirectory(prefix="efae-") as folder, serve_s3(Path(folder)) as variables:
        os.environ.update(variables)
        for name in arguments.images:
            found: dict[str, Any] = {}
            for found in compare(name, arguments, variables):
                if arguments.share >= 1:
                    path = RESULTS / f"loaders-{name}.json"
                    path.write_text(json.dumps(machine | found, indent=1) + "\n")
            print("\n".join(format_table(found["rows"])), flush=True)
            for cache, wait in found["wait_under_a_training_step"].items():
                print(f"data wait, {cache}: {100 * wait['wait_fraction']:.2f} % of the step time")


if __name__ == "__main__":
    main()
