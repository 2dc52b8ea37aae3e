"""Outcome of a finished run, read from MLflow."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efae.tracking.server import Server


def read_outcome(server: Server, run_name: str) -> dict[str, Any]:
    """Read the outcome of a finished run.

    Returns:
        "runs" (their number) of that name, "status", "started" (seconds since the epoch), "models"
        (their number), "digest" of the registered weights, "summary", and "curves" as (step, value)
        pairs by metric.

    Raises:
        ValueError: MLflow has no run of that name.
    """
    client = server.client()
    experiment = client.get_experiment_by_name("efae")
    runs = client.search_runs(
        [experiment.experiment_id] if experiment else [], f"attributes.run_name = '{run_name}'"
    )
    if not runs:
        raise ValueError(f"MLflow has no run {run_name!r}")
    run = runs[0]
    versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
    summary = client.download_artifacts(run.info.run_id, "report/summary.json")
    return {
        "runs": len(runs),
        "status": run.info.status,
        "started": run.info.start_time / 1000,
        "models": len(versions),
        "digest": versions[0].tags["digest"] if versions else "",
        "summary": json.loads(Path(summary).read_text()),
        "curves": {
            name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        },
    }


def compare(whole: Mapping[str, Any], killed: Mapping[str, Any]) -> dict[str, Any]:
    """Compare what the killed run and the uninterrupted one left in MLflow.

    Args:
        whole: Outcome of the uninterrupted run.
        killed: Outcome of the killed run.

    Returns:
        "weights_equal", "loss_curve_equal" (bit for bit), "mlflow_runs", "mlflow_status",
        "registered_models", "duplicate_points" of all metrics, and "missing_points" of all but the
        system metrics, whose number of points varies.
    """
    duplicates, missing = 0, 0
    for points in killed["curves"].values():
        duplicates += len(points) - len({step for step, _ in points})
    for name, points in whole["curves"].items():
        if not name.startswith("system/"):
            have = {step for step, _ in killed["curves"].get(name, [])}
            missing += len({step for step, _ in points} - have)
    return {
        "weights_equal": bool(whole["digest"]) and whole["digest"] == killed["digest"],
        "loss_curve_equal": sorted(whole["curves"]["loss"]) == sorted(killed["curves"]["loss"]),
        "mlflow_runs": killed["runs"],
        "mlflow_status": killed["status"],
        "registered_models": killed["models"],
        "duplicate_points": duplicates,
        "missing_points": missing,
    }
