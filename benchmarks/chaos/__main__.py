"""Random kills through a run: what each costs, and that nothing is lost.

    python -m benchmarks.chaos --kills 20 --seed 0
    python -m benchmarks.chaos --kills 6 --kinds worker raylet --steps 800

Starts S3, MLflow and a Ray cluster of its own (a head without CPUs and nodes of one CPU), trains a
small model once undisturbed and once under fire, each submitted with `ray job submit`, and submits
it again under its name whenever a kill took the driver. SIGKILL is all that is sent. Prints a table
and writes it as JSON.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.chaos.cluster import TARGETS, Cluster
from benchmarks.chaos.fire import KINDS, ROOT, plan_kills
from benchmarks.chaos.suite import (
    CHECKPOINT_INTERVAL,
    find_losses,
    format_report,
    run_suite,
    summarize,
)
from cluster import processes
from cluster.services import client_environment
from cluster.serving import start, wait_until_ready
from cluster.state import StackState


@dataclass
class Arguments:
    """How much to kill."""

    kills: int = 20
    """Kills in one run."""
    seed: int = 0
    """Of kinds, moments and targets."""
    kinds: tuple[str, ...] = KINDS
    """Of worker, raylet, driver, controller and head, each equally often."""
    steps: int = 1600
    """Length of the run."""
    nodes: int = 2
    """Worker nodes of one CPU, and workers."""
    output: Path = Path(__file__).parents[1] / "results" / "chaos.json"
    """Where the figures go."""


def describe_machine() -> dict[str, object]:
    """Hardware, versions, date and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores for the whole cluster",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("ray", "torch", "mlflow")},
    }


def main() -> int:
    """Exit status 0 only if nothing was lost."""
    arguments = tyro.cli(Arguments, description=__doc__, prog="benchmarks.chaos")
    for kind in arguments.kinds:
        if kind not in TARGETS:
            print(f"--kinds {kind}: use {', '.join(TARGETS)}", file=sys.stderr)
            return 2
    plan = plan_kills(
        arguments.kills, arguments.kinds, arguments.steps, CHECKPOINT_INTERVAL, arguments.seed
    )
    os.environ["EFAE_RAY_HEAD_CPUS"] = "0"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also then, leave nothing running
    with tempfile.TemporaryDirectory(prefix="efae-", ignore_cleanup_errors=True) as folder:
        state = StackState(Path(folder))
        try:
            for name in ("s3", "mlflow"):
                start(state, name)
            wait_until_ready(state, "s3", "mlflow")
            with Cluster(state, arguments.nodes) as cluster:
                os.environ.update(client_environment(state))
                found = run_suite(cluster, arguments.steps, plan, Path(folder), "chaos")
        finally:
            for record in state.processes.values():
                processes.stop(record)
    print("\n".join(format_report(found)), flush=True)
    result = {**describe_machine(), "seed": arguments.seed, "table": summarize(found["kills"])}
    arguments.output.write_text(json.dumps({**result, **found}, indent=1) + "\n")
    for loss in (losses := find_losses(found)):
        print(f"LOST: {loss}", file=sys.stderr)
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
