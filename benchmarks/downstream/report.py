"""Tables of the results and pictures of the samples."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.downstream.runs import Job

_LABEL, _GAP = 250, 2  # pixels


def print_tables(results: dict[str, Any]) -> None:
    """Print, in Markdown, floors, then arms by data size: mean and deviation over seeds."""
    checks = results["features"]
    damaged = ", ".join(f"{k} {v:.1f}" for k, v in checks["fid_of_damaged_images"].items())
    print(
        f"features: label {checks['label_accuracy']:.1%} of held-out images, view"
        f" {checks['view_accuracy']:.1%}; FID of held-out images: {damaged}\n"
    )
    print("| images | tokenizer | PSNR dB | FID held out | reconstructed | remembered subset |")
    print("|---|---|---|---|---|---|")
    for (pose, name), rows in _group(results["floors"], "pose", "tokenizer"):
        remembered = ", ".join(
            f"{size}: {_summarize((row['remembered'][size]['fid'] for row in rows), 2)}"
            for size in rows[0]["remembered"]
        )
        print(
            f"| {pose} | {name} | {_summarize((row['psnr'] for row in rows), 2)}"
            f" | {_summarize((row['held_out']['fid'] for row in rows), 2)}"
            f" | {_summarize((row['reconstructed']['fid'] for row in rows), 2)} | {remembered} |"
        )
    print()
    print(
        "| images | size | arm | FID | nearest ratio | very near | upright | held-out loss"
        " | train loss | bytes stored | images encoded |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (pose, size, arm), rows in _group(results["runs"], "pose", "size", "arm"):
        cells = [
            _summarize((row[name] for row in rows), digits)
            for name, digits in (
                ("fid", 2),
                ("nearest_ratio", 3),
                ("very_near_share", 3),
                ("upright_share", 3),
                ("loss_held_out", 4),
                ("loss_train", 4),
            )
        ]
        print(
            f"| {pose} | {size} | {arm} | {' | '.join(cells)} | {rows[0]['bytes_stored']:,}"
            f" | {rows[0]['images_encoded']:,} |"
        )


def draw_samples(jobs: list[Job], folder: Path) -> list[Path]:
    """Draw samples-POSE-SIZE.png for each data set and size, with a row for each arm.

    The rows show the first seed.
    """
    font = ImageFont.load_default(13)
    written: list[Path] = []
    for job in (job for job in jobs if job.seed == 0):
        for size in job.settings.sizes:
            rows: list[tuple[str, Image.Image]] = []
            for arm in job.arms:
                path = job.record_path(arm, size).with_suffix(".png")
                if path.exists():
                    with Image.open(path) as picture:
                        rows.append((arm, picture.copy()))
            if not rows:
                continue
            width, height = rows[0][1].size
            sheet = Image.new("L", (_LABEL + width, len(rows) * (height + _GAP)), 255)
            pen = ImageDraw.Draw(sheet)
            for number, (arm, picture) in enumerate(rows):
                top = number * (height + _GAP)
                sheet.paste(picture, (_LABEL, top))
                pen.text((4, top + height // 2), arm, 0, font, anchor="lm")
            written.append(folder / f"samples-{job.pose}-{size}.png")
            sheet.save(written[-1])
    return written


def _group(
    records: list[dict[str, Any]], *names: str
) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Group records by the values of these names, in the order of each group's first record."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return list(found.items())


def _summarize(values: Iterable[float], digits: int) -> str:
    """Format the mean and standard deviation."""
    listed = list(values)
    text = f"{statistics.fmean(listed):.{digits}f}"
    return f"{text} ± {statistics.stdev(listed):.{digits}f}" if len(listed) > 1 else text
