"""The command; see the package for what it does."""

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
    """What to compare, and where to keep it."""

    folder: Path = Path(".local/downstream")
    """Where images, models, latents, the record of every run and the pictures are kept."""
    results: Path = RESULTS
    """Where downstream-fashion_mnist.json goes."""
    poses: tuple[Pose, ...] = ("upright", "any")
    """Data sets."""
    arms: tuple[str, ...] = ()
    """Arms; all when empty."""
    seeds: int = 3
    """Seeds of every run."""
    processes: int = 2
    """Processes of one thread."""


def list_jobs(arguments: Arguments) -> list[Job]:
    """Seed by seed, so that a comparison that is cut off has whole seeds."""
    unknown = set(arguments.arms) - set(ARMS)
    if unknown:
        raise ValueError(f"--arms {sorted(unknown)}: there are {', '.join(ARMS)}")
    shared = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    settings, names = Settings(**shared), arguments.arms or tuple(ARMS)
    return [
        Job(
            settings,
            arguments.folder,
            pose,
            seed,
            # Where there is no upright, no view is worth more than another.
            tuple(name for name in names if pose == "upright" or ARMS[name].acted != "half"),
        )
        for seed in range(arguments.seeds)
        for pose in arguments.poses
    ]


def collect(jobs: list[Job], features: dict[str, Any]) -> dict[str, Any]:
    """All records of the jobs that there are."""
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
    """Run what is missing, write the results, print the tables."""
    arguments = tyro.cli(Arguments, description=package.__doc__)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
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
