"""Options of jobs/encode.py. Imports nothing heavy, so that a mistyped option fails at once."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Request:
    """Model, images and output of one encoding."""

    model: str
    """URI of the model: models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME@sha256:DIGEST, or a
    checkpoint or model folder, local or remote; or diffusers:PATH, a folder with an autoencoder of
    diffusers, whose latents are stored as its pipelines use them, without views."""
    data: str
    """URI of the shard set of images."""
    output: str
    """Folder for the shards of latents: a path, s3://bucket/folder or gs://..."""
    resolution: int | tuple[int, int] | None = None
    """Side of square images, or height and width, in pixels: a multiple of the side of the model's
    cells. Larger images are scaled until their shorter side fits, and cropped; smaller ones of a
    set of mixed sizes are enlarged. By default the model's data.resolution, at which it was
    trained."""
    buckets: tuple[tuple[int, int], ...] = ()
    """Heights and widths instead of one resolution, as data.buckets in training: every image goes
    to the bucket of the nearest ratio, and each bucket becomes a latent set of its own, in the
    folder HEIGHTxWIDTH below --output."""
    tile: int | None = None
    """Side, in pixels, of the overlapping squares of an image that are encoded one at a time, to
    bound memory. Latents are the same to rounding with model.kind unet, and an approximation with
    transformer."""
    symmetrize: bool = False
    """Average the encoder over its group, E(x) = mean of rho(g)^-1 E(gx), so that one copy serves
    all views of a model that is not exactly equivariant; as many times slower as the group has
    elements."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Data type of the stored numbers, whose scale is near 1."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the encoder's arithmetic; the certificate is measured at it. On GPUs, bf16 is
    several times as fast."""
    compile: Literal["auto", "none", "blocks"] = "auto"
    """Compile the blocks of the encoder; auto = on GPUs. Every shape takes seconds at first;
    choose a --batch-size that is a power of two."""
    certificate_data: str | None = None
    """Held-out shard set on which to measure how exactly the model commutes with its group; by
    default held_out beside --data if it exists, else --data itself."""
    certificate_images: int = 256
    """Maximum number of images for the certificate."""
    batch_size: int = 64
    """Images per batch; another size changes latents by rounding."""
    compared: int = 64
    """Minimum number of stored latents to compare with fresh ones at the end."""
    actors: int = 0
    """Number of encoding processes; 0 for as many as the cluster has free resources for."""
    cpus_per_actor: int = 1
    """CPUs per process."""
    use_gpu: bool = False
    """Reserve one GPU per process."""
    cache_dir: str | None = None
    """Folder for the shard cache of each node; by default in the temporary folder."""

    def __post_init__(self):
        for side in self.image_size or ():
            if side < 1:
                raise ValueError(f"--resolution {side}: must be positive")
        for number, (height, width) in enumerate(self.buckets):
            where = f"--buckets: {height} x {width}"
            if min(height, width) < 1:
                raise ValueError(f"{where}: must be positive")
            if (height, width) in self.buckets[:number]:
                raise ValueError(f"{where} is there twice")
        if self.buckets and self.resolution is not None:
            raise ValueError("--buckets and --resolution: give one of them")
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

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that images are encoded at; None: those of the model's training."""
        if isinstance(self.resolution, int):
            return self.resolution, self.resolution
        return self.resolution
