"""The sizing tables of docs/operating.md."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.sizing import model
from benchmarks.sizing.model import IMAGENET, LARGE, SIZES, Job

_ROWS: list[tuple[str, Callable[[Job], float], Callable[[float], str]]] = []


def make_tables() -> str:
    """Markdown of both tables."""
    return "\n\n".join(f"{_describe(job)}\n\n{_make_table(job)}" for job in (IMAGENET, LARGE))


def make_measured(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the measurement, from the rows of results/sizing.json."""
    lines = [["", "hosts", "predicted", "measured", "ratio", "predicted", "measured", "ratio"]]
    lines += [["---"] * len(lines[0])]
    for row in rows:
        lines.append([row["what"], str(row["hosts"])])
        for name, unit, show in (("byte", "bytes", _bytes), ("second", "seconds", _seconds)):
            ratio = row[f"{name}_ratio"]
            lines[-1] += [show(row[f"predicted_{unit}"]), show(row[unit])]
            lines[-1].append("" if ratio is None else f"{ratio:.2f}")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _make_table(job: Job) -> str:
    jobs = [replace(job, gpus=gpus) for gpus in SIZES]
    lines = [["GPUs", *map(str, SIZES)], ["---"] * (len(SIZES) + 1)]
    lines += [[title, *(show(measure(job)) for job in jobs)] for title, measure, show in _ROWS]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _describe(job: Job) -> str:
    return (
        f"{job.images / 1e6:.1f} million images of {job.image_bytes / 1e3:.0f} kB,"
        f" {_bytes(job.set_bytes)} in all, `data.cache_bytes` {_bytes(job.cache_bytes)}:"
    )


def _bytes(value: float) -> str:
    """Three digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.3g} {units[0]}"


def _rate(value: float) -> str:
    return f"{_bytes(value)}/s"


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 6000 else f"{value / 3600:.3g} h"


def _plain(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


_ROWS += [
    ("hosts", lambda job: job.hosts, _plain),
    ("an epoch", lambda job: job.epoch_seconds, _seconds),
    ("S3 reads, first epoch", model.cold_rate, _rate),
    ("of that to each host", lambda job: model.cold_rate(job) / job.hosts, _rate),
    ("S3 reads, second epoch", lambda job: model.later_rate(job, 1), _rate),
    ("S3 reads, tenth epoch", lambda job: model.later_rate(job, 9), _rate),
    ("S3 reads, hundredth epoch", lambda job: model.later_rate(job, 99), _rate),
    ("requests for shards a second, first epoch", model.request_rate, _plain),
    ("to each host while it reads, at least", model.least_read_rate, _rate),
    ("cache of a host, in the long run", model.cache_disk, _bytes),
    ("cache of a host, at least", model.least_cache, _bytes),
    ("a checkpoint", model.checkpoint_bytes, _bytes),
    ("its upload from rank 0, at least", model.least_upload_rate, _rate),
    ("its upload at 100 MB/s", lambda job: model.upload_seconds(job, 1e8), _seconds),
    ("memory for it on rank 0's host", model.checkpoint_memory, _bytes),
    ("checkpoints in S3", model.checkpoint_storage, _bytes),
    ("all workers read at a start", model.start_bytes, _bytes),
    ("all workers read at a resume", model.resume_bytes, _bytes),
    ("memory for the index on a host", model.index_memory, _bytes),
    ("to each host at a resume, at least", model.least_resume_rate, _rate),
    ("requests to MLflow a second", model.tracking_rate, _plain),
    ("memory of the head", model.head_memory, _bytes),
]
