"""What a training run asks of its surroundings: pure functions of its size.

Each formula follows from what the code does, which its docstring names. `simulate` runs the code's
own plan to check the ones about shards, and `measure` moves the bytes.
"""

from dataclasses import dataclass, replace
from math import ceil, log

from data_pipelines.loading.epoch_plan import MOST_LANES, WINDOW_CHUNKS
from data_pipelines.shards.chunks import LARGEST_BYTES

BYTES_PER_PARAMETER = 16
"""Of a checkpoint: weights, their average and AdamW's two moments, 4 bytes each."""
INDEX_BYTES_PER_SAMPLE = 60
"""Of ``index.json``, for an image and a label: three numbers each, and a key of nine characters."""
INDEX_MEMORY_PER_SAMPLE = 460
"""Of a process that has read it, at most: 455 for 300,000 samples with image and label."""
PREFETCH_BYTES = 512 * 2**20
"""What a loader fetches ahead of its decoders, at most (`ShardDataset.loader`)."""
FILE_SECONDS = 94
"""One attempt at one file of a checkpoint takes at most this long (`storage.read_bytes`)."""
RANGE_SECONDS, FETCH_THREADS = 30, 16
"""The same of one request for chunks, and how many a loader has under way."""
SEND_SECONDS, SYSTEM_SECONDS = 2, 10
"""The tracker sends what waits this often, and samples the machine this often."""
HEAD_BYTES = 4 * 2**30
"""Of a head with one job: Ray's servers, the driver, Ray Train's controller, the evaluation."""
HEAD_BYTES_PER_WORKER = 32 * 2**20
"""Assumed, not measured: what the head keeps of each worker, its log and its metrics."""


@dataclass(frozen=True)
class Job:
    """A run and the cluster that it is on."""

    gpus: int
    """Workers, one each."""
    images: int
    """In the set."""
    image_bytes: float
    """Of a sample in its shard, with tar headers and labels."""
    parameters: int
    """That are trained."""
    gpus_per_host: int = 8
    images_per_second: float = 500.0
    """Of one GPU."""
    cache_bytes: int = 200 * 2**30
    """`data.cache_bytes`, of a host."""
    checkpoint_seconds: float = 600.0
    """Between two checkpoints."""
    log_seconds: float = 30.0
    """Between two points of the curves."""
    lanes: int = MOST_LANES
    """Of the plan: 128 where that divides the global batch."""

    @property
    def hosts(self) -> int:
        """With a cache each."""
        return ceil(self.gpus / self.gpus_per_host)

    @property
    def set_bytes(self) -> float:
        """All shards."""
        return self.images * self.image_bytes

    @property
    def chunk_bytes(self) -> float:
        """What is fetched at once, of a set that is not a small one (`cut_chunks`)."""
        return min(LARGEST_BYTES, self.set_bytes / 512)

    @property
    def read_rate(self) -> float:
        """Bytes of images that all workers use in a second."""
        return self.gpus * self.images_per_second * self.image_bytes

    @property
    def epoch_seconds(self) -> float:
        """Of training, where nothing waits."""
        return self.images / (self.gpus * self.images_per_second)


def missing_share(hosts: int, cache_share: float, epoch: int) -> float:
    """The share of an epoch's bytes that is not in the cache of the host that needs it.

    Which host needs a chunk is drawn anew in every epoch: one of `hosts`, at random. So a host that
    holds a share h of the set finds h of what it needs, and after an epoch in which nothing went it
    holds 1 - (1 - h)(1 - 1/hosts) of the set: before epoch e it is 1 - (1 - 1/hosts)^e.

    Once the cache is full, at a share k of the set, it drops the oldest chunks. At the point u of
    an epoch, in [0, 1], u/hosts of the set has been needed since the epoch began, will not be
    needed again in it, and takes that much of the cache: (1 - k) / (1 - u/hosts) of what is needed
    now is missing, and everything once u/hosts reaches k.

    Args:
        hosts: with a cache each.
        cache_share: of the set that one cache holds, 0 to 1.
        epoch: 0 is the first, in which everything is missing.
    """
    absent = (1 - 1 / hosts) ** epoch  # from a host, as the epoch begins, in an endless cache
    if epoch == 0:
        return 1.0
    if absent < 1 - cache_share:
        absent = 1 - cache_share
    # Until `full` the cache grows; until `useful` it holds anything that this epoch still needs.
    full = hosts * (1 - (1 - cache_share) / absent) if cache_share < 1 else 1.0
    full = min(max(full, 0.0), 1.0)
    useful = min(hosts * cache_share, 1.0)
    share = absent * min(full, useful)
    if useful > full and cache_share < 1:
        share += (1 - cache_share) * hosts * log((1 - full / hosts) / (1 - useful / hosts))
    return share + max(1.0 - useful, 0.0)


def border_share(hosts: int, lanes: int, chunks: int) -> float:
    """The most that hosts read twice in an epoch, as a share of the set.

    Two neighbouring hosts share the window that the border between their lanes cuts, and a whole
    lane where the hosts do not divide the lanes.
    """
    shared_lanes = (hosts - 1) / lanes if lanes % hosts else 0.0
    return min(shared_lanes + WINDOW_CHUNKS * (hosts - 1) / chunks, 1.0)


def cache_share(job: Job) -> float:
    """Of the set that a host's cache holds on average: a full one makes room for a sixteenth."""
    share = job.cache_bytes / job.set_bytes
    return 1.0 if share >= 1 else share * 31 / 32


def cold_rate(job: Job) -> float:
    """Bytes a second from storage in the first epoch, so that no GPU waits."""
    return job.read_rate * (1 + border_share(job.hosts, job.lanes, chunk_count(job)))


def later_rate(job: Job, epoch: int) -> float:
    """The same in a later epoch."""
    return cold_rate(job) * missing_share(job.hosts, cache_share(job), epoch)


def chunk_count(job: Job) -> int:
    """Chunks of the set."""
    return max(int(job.set_bytes / job.chunk_bytes), 1)


def request_rate(job: Job) -> float:
    """Requests for shards a second in the first epoch."""
    return cold_rate(job) / job.chunk_bytes


def least_read_rate(job: Job) -> float:
    """Bytes a second to a host below which requests for chunks take too long, and are repeated.

    Those of a loader share what it gets, and each is for up to `LARGEST_BYTES`.
    """
    ranks = min(job.gpus_per_host, job.gpus)
    return ranks * FETCH_THREADS * LARGEST_BYTES / RANGE_SECONDS


def least_cache(job: Job) -> float:
    """Bytes of a cache below which chunks are fetched more than once in an epoch.

    A host is in the midst of a window of each of its lanes, and of the one behind it, and its
    loaders are ahead of their decoders.
    """
    lanes = job.lanes / job.hosts
    ahead = min(PREFETCH_BYTES, job.cache_bytes / 4, job.set_bytes)
    ranks = min(job.gpus_per_host, job.gpus)
    return 2 * WINDOW_CHUNKS * lanes * job.chunk_bytes + ranks * ahead


def cache_disk(job: Job) -> float:
    """Bytes of disk that the cache of a host takes in the end: of the set, or its bound."""
    return min(job.set_bytes, job.cache_bytes)


def checkpoint_bytes(job: Job) -> int:
    """Of one checkpoint; rank 0 writes it."""
    return BYTES_PER_PARAMETER * job.parameters


def checkpoint_memory(job: Job) -> int:
    """Bytes that rank 0 holds beside the model while it writes: the copy and the packed files."""
    return 2 * checkpoint_bytes(job)


def checkpoint_storage(job: Job, kept: int = 2) -> int:
    """Bytes in storage: those kept and the one under way."""
    return (kept + 1) * checkpoint_bytes(job)


def upload_seconds(job: Job, bytes_per_second: float) -> float:
    """How long one checkpoint is under way."""
    return checkpoint_bytes(job) / bytes_per_second


def least_upload_rate(job: Job) -> float:
    """Bytes a second at which a checkpoint ends as the next begins."""
    return checkpoint_bytes(job) / job.checkpoint_seconds


def standing_share(job: Job, bytes_per_second: float) -> float:
    """The share of time that training waits for uploads: each waits for the one before."""
    seconds = upload_seconds(job, bytes_per_second)
    return max(0.0, 1 - job.checkpoint_seconds / seconds)


def resume_bytes(job: Job) -> int:
    """What all workers read before the first step of a resumed run: checkpoint and index, each."""
    return job.gpus * checkpoint_bytes(job) + start_bytes(job)


def start_bytes(job: Job) -> int:
    """What all workers read before the first step of a new run: the index, each."""
    return job.gpus * INDEX_BYTES_PER_SAMPLE * job.images


def index_memory(job: Job) -> int:
    """Bytes that the workers of a host hold for the index, each for itself."""
    return min(job.gpus_per_host, job.gpus) * INDEX_MEMORY_PER_SAMPLE * job.images


def least_resume_rate(job: Job) -> float:
    """Bytes a second to one host at which its workers get the largest file in one attempt.

    That is the optimizer's, half of a checkpoint; each worker of a host reads it for itself.
    """
    ranks = min(job.gpus_per_host, job.gpus)
    return ranks * checkpoint_bytes(job) / 2 / FILE_SECONDS


def tracking_rate(job: Job) -> float:
    """Requests to MLflow a second, at any number of workers: rank 0 alone sends, in batches."""
    return min(1 / SEND_SECONDS, 1 / job.log_seconds + 1 / SYSTEM_SECONDS)


def head_memory(job: Job) -> int:
    """Bytes of memory of Ray's head; the part that grows is assumed."""
    return HEAD_BYTES + HEAD_BYTES_PER_WORKER * job.gpus


IMAGENET = Job(gpus=8, images=1_281_167, image_bytes=30_000, parameters=72_509_060)
"""The preset imagenet_256: 256 px JPEG."""
LARGE = replace(IMAGENET, images=10_000_000, image_bytes=100_000)
"""A terabyte of larger images, five times the cache."""
SIZES = (1, 8, 64, 512)
