"""What jobs/encode.py may be asked for. Imports nothing heavy: a mistyped option fails at once."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Request:
    """What to encode, and where to."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME@sha256:DIGEST, or a checkpoint or
    model folder, local or remote."""
    data: str
    """Shard set of images."""
    output: str
    """Where the shards of latents go: a path, s3://bucket/folder or gs://..."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of the stored numbers, which have unit scale."""
    certificate_data: str | None = None
    """Held-out shard set to measure on how exactly the model commutes with its group; by default
    held_out beside --data if there is one, else --data itself."""
    certificate_images: int = 256
    """Of these, at most."""
    batch_size: int = 64
    """Images at a time; another one changes latents by rounding."""
    compared: int = 64
    """Stored latents to compare with fresh ones at the end, at least."""
    actors: int = 0
    """Processes that encode; 0: as many as the cluster has room for now."""
    cpus_per_actor: int = 1
    """CPUs that each takes."""
    use_gpu: bool = False
    """A GPU for each."""
    cache_dir: str | None = None
    """Folder of the nodes' shard caches; by default one in the temporary folder."""

    def __post_init__(self):
        for name, least in (
            ("certificate_images", 1),
            ("batch_size", 1),
            ("compared", 1),
            ("actors", 0),
            ("cpus_per_actor", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
