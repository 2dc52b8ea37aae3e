"""Random kills during a run: the cost of each, and the proof that the run loses nothing.

    python -m benchmarks.chaos --kills 20 --seed 0
    python -m benchmarks.chaos --kills 6 --kinds worker raylet --steps 800

Starts its own S3, MLflow and Ray cluster (a head without CPUs and nodes of one CPU) and trains a
small model twice, once without and once with kills. Each run is submitted with `ray job submit`,
and submitted again under its name whenever a kill ends its driver. The only signal sent is SIGKILL.
Prints a table and writes it as JSON.
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
    """Options of the command."""

    kills: int = 20
    """Number of kills in one run."""
    seed: int = 0
    """Seed of kinds, moments and targets."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of process to kill, equally often: worker, raylet, driver, controller, head."""
    steps: int = 1600
    """Steps of each run."""
    nodes: int = 2
    """Number of worker nodes, of one CPU and one worker each."""
    output: Path = Path(__file__).parents[1] / "results" / "chaos.json"
    """File for the results."""


def describe_machine() -> dict[str, object]:
    """Return hardware, versions, date and commit."""
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
    """Run both runs and compare them; return 0 only if nothing was lost."""
    arguments = tyro.cli(Arguments, description=__doc__, prog="benchmarks.chaos")
    for kind in arguments.kinds:
        if kind not in TARGETS:
            print(f"--kinds {kind}: use some of {', '.join(TARGETS)}", file=sys.stderr)
            return 2
    plan = plan_kills(
        arguments.kills, arguments.kinds, arguments.steps, CHECKPOINT_INTERVAL, arguments.seed
    )
    os.environ["EFAE_RAY_HEAD_CPUS"] = "0"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM, too, stops all servers
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
