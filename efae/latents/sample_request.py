"""Options of jobs/generate.py sample and compare. Imports nothing heavy, as in `request`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class SampleRequest:
    """Generator, number of images and output of one sampling."""

    model: str
    """URI of the generator: models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME@sha256:DIGEST,
    or a checkpoint or model folder, local or remote."""
    output: str
    """Folder for the shards of images: a path, s3://bucket/folder or gs://..."""
    count: int = 1000
    """Number of images; more than a finished set has are added to it."""
    seed: int = 0
    """Seed of all images; image number i is a function of (seed, i) and of the batch size."""
    labels: tuple[int, ...] = ()
    """Classes, which the images take in turn; all of them by default. Only for generators with
    classes."""
    steps: int | None = None
    """Sampler steps; by default the generator's flow.sampler_steps."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 1 is none; by default the generator's
    flow.guidance_scale."""
    guidance_interval: tuple[float, float] | None = None
    """Range of t in which guidance is applied, from 0 (image) to 1 (noise); by default the
    generator's flow.guidance_interval."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the arithmetic of generator and tokenizer."""
    compile: Literal["auto", "none", "blocks"] = "auto"
    """Compile the blocks of both networks; auto = on GPUs. Every shape takes seconds at first;
    choose a --batch-size that is a power of two."""
    tokenizer: str = ""
    """URI of the tokenizer, if it is no longer where the latents were made; it is recognised by its
    digest."""
    samples_per_shard: int = 0
    """Images per shard; one task draws one shard. 0 keeps the number of an existing set; a new set
    gets up to 32 shards of whole batches, or more of about 1000 images each."""
    batch_size: int = 64
    """Images per batch; another size changes images by rounding."""
    use_gpu: bool = False
    """Draw on GPUs, one per task."""
    on: Literal["auto", "ray", "here"] = "auto"
    """Where to draw: ray (tasks on the cluster at RAY_ADDRESS), here, or auto: ray if RAY_ADDRESS
    is set or this is a Ray job."""

    def __post_init__(self):
        for name, least in (("count", 1), ("samples_per_shard", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must be >= 0")


@dataclass(frozen=True)
class CompareRequest:
    """Samples, the real images that they are compared with, and the features to compare."""

    samples: str
    """URI of a shard set of samples."""
    reference: str
    """URI of a shard set of real images of the same shape; or a reference of guided-diffusion, a
    local .npz file of such images (arr_0), of their moments (which give no precision and recall),
    or both."""
    output: str = "report"
    """Folder for sample_quality.json: a path, s3://bucket/folder or gs://..."""
    fid_weights: Path | None = None
    """Inception weights of torch-fidelity, as for jobs/evaluate.py. Without them the features are
    those of a small classifier, trained on the labels of the reference (cls), or of an untrained
    network where it has none: such numbers rank sets of one kind of images and are comparable with
    nothing else."""
    precision_recall_images: int = 10_000
    """Maximum number of images of each set that are compared for precision and recall: equally many
    of both, drawn with a fixed seed. Time grows with the square."""
    batch_size: int = 64
    """Images per batch."""
    device: str = "cpu"
    """Torch device: cpu or cuda."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.precision_recall_images < 4:
            raise ValueError(
                f"--precision-recall-images {self.precision_recall_images}: must be at least 4"
            )
