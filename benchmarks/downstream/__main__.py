"""The command `python -m benchmarks.downstream`; the package describes it."""

import json
import multiprocessing
import os
import platform
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import tyro

import benchmarks.downstream as package
from benchmarks.downstream.arms import ARMS
from benchmarks.downstream.report import draw_samples, print_tables
from benchmarks.downstream.runs import Job, prepare, run_job, say
from benchmarks.downstream.settings import Pose, Settings, claim_folder

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Arguments(Settings):
    """Options of the command."""

    folder: Path = Path(".local/downstream")
    """Folder for images, models, latents, records of the runs and pictures."""
    results: Path = RESULTS
    """Folder for downstream-fashion_mnist.json."""
    poses: tuple[Pose, ...] = ("upright", "any")
    """Data sets to compare on."""
    arms: tuple[str, ...] = ()
    """Arms to compare; all when empty."""
    seeds: int = 3
    """Number of seeds of every run."""
    processes: int = 2
    """Number of processes, of one thread each."""


def list_jobs(arguments: Arguments) -> list[Job]:
    """List the jobs seed by seed, so that an interrupted comparison has whole seeds."""
    unknown = set(arguments.arms) - set(ARMS)
    if unknown:
        raise ValueError(f"--arms {sorted(unknown)}: use some of {', '.join(ARMS)}")
    shared = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    settings, names = Settings(**shared), arguments.arms or tuple(ARMS)
    return [
        Job(
            settings,
            arguments.folder,
            pose,
            seed,
            # In "any", no view is preferred, so the arm that keeps half of a batch upright is out.
            tuple(name for name in names if pose == "upright" or ARMS[name].acted != "half"),
        )
        for seed in range(arguments.seeds)
        for pose in arguments.poses
    ]


def collect(jobs: list[Job], features: dict[str, Any]) -> dict[str, Any]:
    """Collect all existing records of the jobs."""
    settings = asdict(jobs[0].settings)
    del settings["images"]
    records = [
        path
        for job in jobs
        for size in job.settings.sizes
        for path in (job.record_path(arm, size) for arm in job.arms)
        if path.exists()
    ]
    floors = [path for job in jobs for path in sorted(job.place.glob("floor-*.json"))]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "settings": settings,
        "hardware": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "features": features,
        "floors": [json.loads(path.read_text()) for path in floors],
        "runs": [json.loads(path.read_text()) for path in records],
    }


def main() -> None:
    """Run the missing jobs, write the results and print the tables."""
    arguments = tyro.cli(Arguments, description=package.__doc__)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes of the pool
    jobs = list_jobs(arguments)
    claim_folder(arguments.folder, jobs[0].settings)
    features = prepare(jobs[0].settings, arguments.folder, arguments.poses, say)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context) as pool:
        for future in [pool.submit(run_job, job, say) for job in jobs]:
            future.result()
    results = collect(jobs, features)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / "downstream-fashion_mnist.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw_samples(jobs, arguments.folder)
    print_tables(results)


if __name__ == "__main__":
    main()
