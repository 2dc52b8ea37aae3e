"""Measure a model on a shard set and write its report card.

    python jobs/evaluate.py --model models:/efae@champion --data s3://efae-data/openmoji-32/held_out

Addresses come from the environment (`source .local/env` for the local stack).
"""

import dataclasses
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Arguments:
    """What to measure on what."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint or a model folder, local or remote."""
    data: str
    """Shard set that the model was not trained on."""
    output: Path = Path("report")
    """Folder for report.html, summary.json and the figures."""
    images: int = 512
    """Images to measure, at most."""
    device: str = "cpu"
    """cpu or cuda."""


def main(arguments: list[str]) -> int:
    """Exit status 0 only if the report was written."""
    chosen = tyro.cli(Arguments, description=__doc__, args=arguments, prog="jobs/evaluate.py")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from tqdm import tqdm

    import efae
    from efae.artifacts.checkpoint import CheckpointError
    from efae.artifacts.report import write_report
    from efae.preflight import check_images
    from efae.training.evaluation import evaluate
    from efae.training.held_out import read_held_out

    started = time.monotonic()
    try:
        model = efae.load(chosen.model, device=chosen.device)
        data = dataclasses.replace(model.config.data, held_out_uri=chosen.data)
        check_images(model.config, chosen.data)
        images = read_held_out(data, chosen.images)
        evaluation = evaluate(
            model,
            images,
            progress=lambda items, what: tqdm(items, what, disable=not sys.stderr.isatty()),
        )
        report = write_report(
            chosen.output,
            numbers=evaluation.numbers(),
            pictures=evaluation.pictures,
            config=model.config,
            facts={
                "model_uri": chosen.model,
                "data": chosen.data,
                "device": chosen.device,
                "precision": "fp32",
                "wall_seconds": time.monotonic() - started,
            },
        )
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summary = json.loads((chosen.output / "summary.json").read_text())
    print(
        f"{chosen.model}: {summary['psnr']:.2f} dB PSNR on {len(images)} images, worst gap"
        f" {summary['worst_gap_db']:.1e} dB\nlook at {report}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
