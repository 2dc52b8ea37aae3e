"""Encode a shard set once, for training on latents.

    python jobs/encode.py --model models:/efae@champion \
        --data s3://efae-data/openmoji-32/train --output s3://efae-data/openmoji-32-latents
    ray job submit --working-dir . -- python jobs/encode.py --model ... --use-gpu

Writes WebDataset shards with one latent.npy per sample, with the keys and labels of the images, and
an index that describes them. The same command resumes an interrupted encoding. One copy serves all
flips and turns: ShardDataset.open(OUTPUT).loader(..., augment="group").
Addresses come from the environment (`source .local/env` for the local stack).
"""

import logging
import os
import sys
from typing import TYPE_CHECKING

import tyro

from data_pipelines.commands import run_command
from efae.latents.request import Request

if TYPE_CHECKING:
    from efae.latents.encode import Encoded


def main(arguments: list[str]) -> int:
    """Run the job; return 0 only if every latent set is complete."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    request = tyro.cli(Request, description=__doc__, args=arguments, prog="jobs/encode.py")
    # Importing the platform takes seconds; a mistyped option should not.
    from data_pipelines.loading.shard_cache import ShardError
    from efae.checkpoints.checkpoint import CheckpointError
    from efae.latents.encode import EncodingFailed, encode_sets

    for name in ("ray.data", "ray.data._internal"):  # they describe plans and progress
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        for encoded in encode_sets(request, say=lambda line: print(line, flush=True)):
            print_summary(encoded)
    except (ValueError, OSError, CheckpointError, ShardError, EncodingFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def print_summary(encoded: "Encoded") -> None:
    """Print the facts of the latent set, and how to use it."""
    from data_pipelines.shards.latent_format import LARGEST_DIFFERENCE

    latents = encoded.latents
    form, certificate = latents.format, latents.certificate
    size = sum(shard.bytes for shard in latents.index.shards)
    before = sum(int(shard.images().size.sum()) for shard in encoded.images.shards if shard.keys)
    views = len(certificate["by_element"])
    counts = ", ".join(f"{n} {irrep.upper()}" for irrep, n in form.multiplicities.items() if n)
    serves = (
        f"one copy serves    {views} views; storing them would take {views * size / 1e6:.1f} MB"
    )
    options = ', augment="group"'
    if views == 1:
        serves, options = "one copy serves    one view: the model has the trivial group", ""
    elif not certificate["max_abs_difference"] <= LARGEST_DIFFERENCE:
        serves = "one copy serves    one view: for all of them, encode again with --symmetrize"
        options = ""
    compared = ""
    if encoded.largest_difference is not None:
        compared = (
            f"\n  compared           {encoded.largest_difference:.1e} from fresh latents at most"
        )
    print(
        f"""
{latents.uri}: {len(latents)} latents in {len(latents.index.shards)} shards, {size / 1e6:.1f} MB\
 (images {before / 1e6:.1f} MB), {encoded.encoded} of them encoded now
  latent             {" x ".join(map(str, form.shape))} {form.dtype}, {form.group}: {counts}
  certificate        act(g, encode(x)) and encode(g x) differ by\
 {certificate["max_abs_difference"]:.1e} at most, over {views} elements and\
 {certificate["images"]} images of {certificate["data"]}{compared}
  {serves}

next:
  ShardDataset.open("{latents.uri}").loader(global_batch_size=256{options})
""",
        flush=True,
    )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
