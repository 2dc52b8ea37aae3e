"""The same run twice, once without and once with kills, and their comparison."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.audit import audit, measure_recoveries, read_attempts
from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.fire import Kill, Run
from benchmarks.chaos.outcome import compare, read_outcome
from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from efae.tracking.server import Server

SHARDS = "s3://efae-data/chaos"
GLOBAL_BATCH_SIZE = 32
CHECKPOINT_INTERVAL = 40
SMALL_MODEL = (
    *("--data.channels=1", "--data.decode-threads=1"),
    *("--representation.dim=12", "--representation.rotation-dims=4"),
    *("--model.hidden-size=64", "--model.num-heads=2", "--model.depth=2"),
    "--model.encoder-hidden-size=64",
)
"""Options of jobs/train.py for a model so small that the platform dominates."""


def list_options(steps: int, workers: int, max_failures: int) -> list[str]:
    """Return the arguments of jobs/train.py."""
    return [
        "quickstart",
        f"--data.uri={SHARDS}/train",
        f"--data.held-out-uri={SHARDS}/held_out",
        *SMALL_MODEL,
        "--tracking.no-portable",
        f"--training.steps={steps}",
        f"--training.global-batch-size={GLOBAL_BATCH_SIZE}",
        "--training.log-interval=10",
        f"--training.checkpoint-interval={CHECKPOINT_INTERVAL}",
        f"--training.evaluation-interval={steps}",
        "--training.held-out-images=16",
        f"--ray.num-workers={workers}",
        f"--ray.max-failures={max_failures}",
    ]


def run_suite(
    cluster: Cluster, steps: int, plan: Sequence[Kill], folder: Path, name: str
) -> dict[str, Any]:
    """Train twice and compare the runs.

    Args:
        cluster: Running cluster; this process's environment names its S3 and MLflow.
        steps: Steps of each run.
        plan: Kills of the second run.
        folder: Folder for the local files of the runs.
        name: Prefix of both runs' names.

    Returns:
        JSON values: the results of `audit` and `compare`, a row per kill, and the times.

    Raises:
        RuntimeError: A run did not finish; see `Run.execute`.
    """
    build_shards("mnist", SHARDS, resolution=32, samples_per_shard=500, held_out=64)
    keys = ShardDataset.open(f"{SHARDS}/train").keys
    options = list_options(steps, cluster.size, max_failures=3 * len(plan) + 3)
    outcomes: list[dict[str, Any]] = []
    runs: list[Run] = []
    for suffix, kills in (("whole", ()), ("killed", plan)):
        with Run(cluster, f"{name}-{suffix}", options, folder) as run:
            run.execute(kills)
        runs.append(run)
        outcomes.append(read_outcome(Server.from_environment(), run.name))
    first, *others = read_attempts(runs[0].sample_log)
    assert not others, "the run without kills restarted"
    attempts = read_attempts(runs[1].sample_log)
    return {
        "steps": steps,
        "checkpoint_interval": CHECKPOINT_INTERVAL,
        "steps_per_second": steps / (first.ended - first.started),
        "cold_start_seconds": first.started - runs[0].submissions[0],
        "worker_group_cold_start_seconds": first.started - outcomes[0]["started"],
        "attempts": len(attempts),
        "submissions": len(runs[1].submissions),
        "recoveries_in_summary": outcomes[1]["summary"]["recoveries"],
        "kills": measure_recoveries(attempts, runs[1].killed),
        "samples": {
            "whole": audit([first], keys, steps, GLOBAL_BATCH_SIZE),
            "killed": audit(attempts, keys, steps, GLOBAL_BATCH_SIZE),
        },
        **compare(*outcomes),
        "checkpoints": {
            run.name: {
                key: outcome["summary"].get(key)
                for key in ("checkpoints", "checkpoint_stall_seconds", "wall_seconds")
            }
            for run, outcome in zip(runs, outcomes, strict=True)
        },
    }


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per kind of kill: number and cost."""
    summary: list[dict[str, Any]] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        seconds = [row["recovery_seconds"] for row in mine if row["recovery_seconds"] is not None]
        lost = [row["lost_steps"] for row in mine if row["lost_steps"] is not None]
        summary.append(
            {
                "kind": kind,
                "kills": len(mine),
                "measured": len(seconds),
                "median_recovery_seconds": statistics.median(seconds) if seconds else None,
                "max_recovery_seconds": max(seconds, default=None),
                "max_lost_steps": max(lost, default=None),
            }
        )
    return summary


def find_losses(found: Mapping[str, Any]) -> list[str]:
    """Return what the killed run lost, a phrase each; empty if it lost nothing."""
    audited = {k: n for k, n in found["samples"]["killed"].items() if k != "steps_done_again"}
    wrong = [f"{count} {name.replace('_', ' ')}" for name, count in audited.items() if count]
    wrong += [
        f"{key} is {found[key]}, not {expected}"
        for key, expected in (
            ("weights_equal", True),
            ("loss_curve_equal", True),
            ("mlflow_runs", 1),
            ("mlflow_status", "FINISHED"),
            ("registered_models", 1),
            ("duplicate_points", 0),
            ("missing_points", 0),
        )
        if found[key] != expected
    ]
    return wrong


def format_report(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown report."""
    cold = found["worker_group_cold_start_seconds"]
    yield "| killed | kills | median recovery (longest) | in cold starts | most steps lost |"
    yield "|---|---|---|---|---|"
    for row in summarize(found["kills"]):
        median, longest = row["median_recovery_seconds"], row["max_recovery_seconds"]
        seconds = "-" if median is None else f"{median:.1f} s ({longest:.1f} s)"
        ratio = "-" if median is None else f"{median / cold:.2f} ({longest / cold:.2f})"
        lost = "-" if row["max_lost_steps"] is None else row["max_lost_steps"]
        yield f"| {row['kind']} | {row['kills']} | {seconds} | {ratio} | {lost} |"
    yield ""
    yield (
        f"{found['steps']} steps at {found['steps_per_second']:.0f} per second, a checkpoint every"
        f" {found['checkpoint_interval']}; cold start of a worker group {cold:.1f} s, from"
        f" submission {found['cold_start_seconds']:.1f} s"
    )
    yield (
        f"submissions: {found['submissions']}, worker groups: {found['attempts']}, repeated steps:"
        f" {found['samples']['killed']['steps_done_again']}"
    )
    yield f"samples of the killed run: {json.dumps(found['samples']['killed'])}"
    yield f"weights equal: {found['weights_equal']}, loss curve equal: {found['loss_curve_equal']}"
    yield (
        f"MLflow: {found['mlflow_runs']} run, {found['mlflow_status']}, {found['duplicate_points']}"
        f" duplicate and {found['missing_points']} missing points"
    )
