"""Requirements of a run by its size: the tables of docs/sizing.md.

    python -m benchmarks.sizing
    python -m benchmarks.sizing --fine-tuning --batch 16

Each formula follows from the code. For your own run, make another `Job`. With --fine-tuning,
training steps of the preset fine_tune with SDXL's architecture are measured instead, on a GPU if
there is one.
"""

import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import ceil, log
from multiprocessing import get_context
from typing import Any

import tyro

from data_pipelines.loading.epoch_plan import MOST_LANES, WINDOW_CHUNKS
from data_pipelines.shards.chunks import LARGEST_BYTES

BYTES_PER_PARAMETER = 16  # in a checkpoint: weights, their average, AdamW's two moments
INDEX_BYTES, INDEX_MEMORY = 60, 460  # per sample with image and label: on disk, in memory
PREFETCH_BYTES = 512 * 2**20  # largest prefetch ahead of a loader's decoders
FETCH_THREADS, FETCH_SECONDS = 16, 30  # concurrent requests for chunks, and their timeout
FILE_SECONDS = 94  # timeout of one file of a checkpoint
SEND_SECONDS, SYSTEM_SECONDS = 2, 10  # intervals of the tracker's requests and system metrics
HEAD_BYTES, HEAD_BYTES_PER_WORKER = 4 * 2**30, 32 * 2**20  # the second is an assumption

SDXL: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
}
"""Architecture of SDXL's autoencoder."""


@dataclass(frozen=True)
class Job:
    """A run and its cluster; `image_bytes` includes tar headers and labels."""

    gpus: int
    images: int
    image_bytes: float
    parameters: int
    gpus_per_host: int = 8
    images_per_second: float = 500.0  # per GPU
    cache_bytes: int = 200 * 2**30  # data.cache_bytes
    checkpoint_seconds: float = 600.0
    log_seconds: float = 30.0

    @property
    def hosts(self) -> int:
        return ceil(self.gpus / self.gpus_per_host)

    @property
    def ranks(self) -> int:
        """Workers of one host."""
        return min(self.gpus, self.gpus_per_host)

    @property
    def set_bytes(self) -> float:
        return self.images * self.image_bytes

    @property
    def chunk_bytes(self) -> float:
        return min(LARGEST_BYTES, self.set_bytes / 512)


def missing_share(hosts: int, cache_share: float, epoch: int) -> float:
    """Return the share of an epoch's bytes that is not in the cache of the host that needs it.

    Every epoch assigns the chunks to hosts anew, so in an unlimited cache a chunk is missing with
    probability (1 - 1/hosts)^epoch. A full cache, which holds a share k of the set, evicts the
    oldest chunks. At the point u of an epoch (0 to 1), the u/hosts of the set that were read since
    its start are no longer useful: (1 - k) / (1 - u/hosts) of the chunks needed now are missing,
    and all of them once u/hosts reaches k.

    Args:
        hosts: Number of hosts, each with a cache.
        cache_share: Share of the set that one cache holds, 0 to 1.
        epoch: Number of the epoch; in the first, 0, everything is missing.
    """
    if epoch == 0:
        return 1.0
    absent = max((1 - 1 / hosts) ** epoch, 1 - cache_share)
    if cache_share == 1:
        return absent
    # The cache grows until `full`, and holds chunks that this epoch still needs until `useful`.
    full = min(max(hosts * (1 - (1 - cache_share) / absent), 0.0), 1.0)
    useful = min(hosts * cache_share, 1.0)
    share = absent * min(full, useful) + 1 - useful
    if useful > full:
        share += (1 - cache_share) * hosts * log((1 - full / hosts) / (1 - useful / hosts))
    return share


def read_rate(job: Job, epoch: int = 0) -> float:
    """Return the bytes per second that all hosts must read from storage so that no GPU waits."""
    # Neighbouring hosts share the window at the border between their lanes, and a whole lane
    # where the hosts do not divide the lanes.
    shared = (job.hosts - 1) / MOST_LANES if MOST_LANES % job.hosts else 0.0
    chunks = max(int(job.set_bytes / job.chunk_bytes), 1)
    twice = min(shared + WINDOW_CHUNKS * (job.hosts - 1) / chunks, 1.0)
    held = job.cache_bytes / job.set_bytes
    # A full cache evicts a sixteenth at a time, so on average it lacks half of that.
    missing = missing_share(job.hosts, 1.0 if held >= 1 else held * 31 / 32, epoch)
    return job.gpus * job.images_per_second * job.image_bytes * (1 + twice) * missing


def least_cache(job: Job) -> float:
    """Return the cache size in bytes below which an epoch fetches chunks more than once."""
    # A host reads in one window of each of its lanes and the next one; its loaders prefetch.
    ahead = min(PREFETCH_BYTES, job.cache_bytes / 4, job.set_bytes)
    return 2 * WINDOW_CHUNKS * MOST_LANES / job.hosts * job.chunk_bytes + job.ranks * ahead


def show_bytes(value: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.3g} {units[0]}"


def show_rate(value: float) -> str:
    return f"{show_bytes(value)}/s"


def show_seconds(value: float) -> str:
    if value < 100:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 6000 else f"{value / 3600:.3g} h"


def show_number(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def list_rows(job: Job) -> dict[str, str]:
    """Return one column of the table: value by title."""
    checkpoint, index = BYTES_PER_PARAMETER * job.parameters, job.gpus * INDEX_BYTES * job.images
    requests = min(1 / SEND_SECONDS, 1 / job.log_seconds + 1 / SYSTEM_SECONDS)
    head = HEAD_BYTES + HEAD_BYTES_PER_WORKER * job.gpus
    # Below these rates, requests time out and are retried; half of a checkpoint is one file.
    reading = job.ranks * FETCH_THREADS * LARGEST_BYTES / FETCH_SECONDS
    resuming = job.ranks * checkpoint / 2 / FILE_SECONDS
    return {
        "GPUs": str(job.gpus),
        "hosts": show_number(job.hosts),
        "an epoch": show_seconds(job.images / (job.gpus * job.images_per_second)),
        "S3 reads, first epoch": show_rate(read_rate(job)),
        "of that to each host": show_rate(read_rate(job) / job.hosts),
        "S3 reads, second epoch": show_rate(read_rate(job, 1)),
        "S3 reads, tenth epoch": show_rate(read_rate(job, 9)),
        "S3 reads, hundredth epoch": show_rate(read_rate(job, 99)),
        "requests for shards a second, first epoch": show_number(read_rate(job) / job.chunk_bytes),
        "to each host while it reads, at least": show_rate(reading),
        "cache of a host, in the long run": show_bytes(min(job.set_bytes, job.cache_bytes)),
        "cache of a host, at least": show_bytes(least_cache(job)),
        "a checkpoint": show_bytes(checkpoint),
        "its upload from rank 0, at least": show_rate(checkpoint / job.checkpoint_seconds),
        "its upload at 100 MB/s": show_seconds(checkpoint / 1e8),
        "memory for it on rank 0's host": show_bytes(2 * checkpoint),  # the copy, the packed files
        "checkpoints in S3": show_bytes(3 * checkpoint),  # two kept, one under way
        "all workers read at a start": show_bytes(index),
        "all workers read at a resume": show_bytes(index + job.gpus * checkpoint),
        "memory for the index on a host": show_bytes(job.ranks * INDEX_MEMORY * job.images),
        "to each host at a resume, at least": show_rate(resuming),
        "requests to MLflow a second": show_number(requests),
        "memory of the head": show_bytes(head),
    }


def make_table(job: Job) -> str:
    """Return the Markdown for the job's set on 1, 8, 64 and 512 GPUs."""
    columns = [list_rows(replace(job, gpus=gpus)) for gpus in (1, 8, 64, 512)]
    lines = [[title, *(column[title] for column in columns)] for title in columns[0]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# The preset imagenet_256 on 256 px JPEG, and on a terabyte of larger images.
IMAGENET = Job(gpus=8, images=1_281_167, image_bytes=30_000, parameters=72_509_060)
LARGE = replace(IMAGENET, images=10_000_000, image_bytes=100_000)


@dataclass(frozen=True)
class Arguments:
    """Options."""

    fine_tuning: bool = False
    """Measure steps of fine-tuning instead of printing the tables."""
    batch: int = 1
    """Images per step."""
    resolution: int = 256
    """Side of the images, in pixels."""


def measure_fine_tuning(
    architecture: dict[str, Any], batch: int, resolution: int, activation_memory: float
) -> dict[str, Any]:
    """Take steps of fine-tuning with random weights, on a GPU if there is one.

    Args:
        architecture: Configuration of the autoencoder of diffusers.
        batch: Images per step.
        resolution: Side of the images, in pixels.
        activation_memory: Setting training.activation_memory.

    Returns:
        Device, precision, images per second, and the peak of the memory in GiB: on a GPU that of
        the tensors, else that of this process.
    """
    import torch

    from benchmarks.gpu.models import TrainingStep
    from efae.config.forms import with_overrides
    from efae.model.networks.diffusers_vae import describe
    from efae.presets import FINE_TUNE

    on_gpu = torch.cuda.is_available()
    device, precision = torch.device("cuda" if on_gpu else "cpu"), "bf16" if on_gpu else "fp32"
    _, channels, cell = describe(architecture)
    settings: dict[str, Any] = {
        "data.resolution": resolution,
        "start.model": "diffusers:random",
        "start.architecture": json.dumps(architecture),
        "representation.dim": channels,
        "representation.multiplicities": (channels, 0, 0, 0, 0),
        "model.downsampling": cell,
        "model.patch_size": cell,
        "training.global_batch_size": batch,
        "training.precision": precision,
        "training.activation_memory": activation_memory,
    }
    step = TrainingStep(with_overrides(FINE_TUNE, settings), device)
    step()  # the optimizer makes its moments
    if on_gpu:
        torch.cuda.synchronize()
    began, count = time.monotonic(), 5 if on_gpu else 1
    for _ in range(count):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "precision": precision,
        "images_per_second": count * batch / seconds,
        "peak_gib": peak / 2**30,
    }


def main() -> None:
    """Print the tables, or measure."""
    chosen = tyro.cli(Arguments, description=__doc__)
    if not chosen.fine_tuning:
        print(make_table(IMAGENET), make_table(LARGE), sep="\n\n")
        return
    for share in (0.0, 1.0):  # each in a process of its own, whose peak is its own
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            run = process.submit(measure_fine_tuning, SDXL, chosen.batch, chosen.resolution, share)
            row = run.result()
        print(
            f"SDXL's architecture, {chosen.batch} x {chosen.resolution} px,"
            f" training.activation_memory={share:g}, {row['precision']} on {row['device']}:"
            f" {row['images_per_second']:.3g} images/s, {row['peak_gib']:.1f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
