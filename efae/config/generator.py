"""Settings of a generator: a flow model of latents, trained on a set that jobs/encode.py made.

Everything that is not particular to it (optimizer, training, Ray, tracking, flow) has the settings,
and the names, of `efae.config`.
"""

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from data_pipelines.loading.options import CacheOptions
from efae.config.objective import FlowConfig
from efae.config.rules import STRICT, require, require_positive
from efae.config.run import OptimizerConfig, RayConfig, TrackingConfig, TrainingConfig
from efae.config.tokenizer import Config


@dataclass(frozen=True, config=STRICT)
class LatentsConfig(CacheOptions):
    """Where the latents are, and what the generator learns of them."""

    uri: str = "s3://efae-data/openmoji-32-latents"
    """Latent set to train on, made by jobs/encode.py."""
    held_out_uri: str = ""
    """Latent set for validation, encoded by the same model; never trained on. Empty draws samples
    at every validation, and measures no loss."""
    classes: int = 0
    """Number of classes. The label of a latent is its member cls, a number from 0 to classes - 1; 0
    trains without labels."""
    views: float = 0.0
    """Share of training examples on which an element of the group acts, drawn for each; the network
    is told which, and samples are drawn at the identity."""
    format: str = ""
    """Format of the latents, as JSON; read from their set when a run starts."""
    tokenizer: str = ""
    """URI of the tokenizer, if it is no longer where the latents were made; its digest must be the
    one that the latents name."""
    cache_dir: str | None = None

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as fault:
            require(False, f"data.{fault}")
        require(self.classes >= 0, f"data.classes={self.classes}: must be >= 0")
        require(0 <= self.views <= 1, f"data.views={self.views}: must be in [0, 1]")


@dataclass(frozen=True, config=STRICT)
class NetworkConfig:
    """Transformer that predicts the velocity."""

    equivariant: bool = False
    """Layers that commute with the group of the latents (octic), so that a sample and its views are
    equally likely, without data.views; an eighth of the weights at equal width."""
    hidden_size: int = 256
    """Width of the tokens; a multiple of num_heads, of 8 * num_heads if equivariant."""
    depth: int = 6
    """Blocks."""
    dense_blocks: int = 0
    """Number of the last blocks that do not commute with the group although the others do, so that
    samples of upright images can be upright."""
    num_heads: int = 4
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden width of a block's MLP, in units of hidden_size, if it had two matrices; its three
    (SwiGLU) are as wide as gives the same number of weights."""
    patch_size: int = 1
    """Side of a token, in latent cells."""

    @property
    def is_exact(self) -> bool:
        """Whether the whole network commutes with the group."""
        return self.equivariant and not self.dense_blocks

    def __post_init__(self):
        require_positive(
            "generator", self, "hidden_size", "depth", "num_heads", "mlp_ratio", "patch_size"
        )
        part = 8 * self.num_heads if self.equivariant else self.num_heads
        require(
            self.hidden_size % part == 0 and self.hidden_size % 2 == 0,
            f"generator.hidden_size={self.hidden_size}: must be even, and a multiple of {part}",
        )
        require(
            0 <= self.dense_blocks <= (self.depth if self.equivariant else 0),
            f"generator.dense_blocks={self.dense_blocks}: must be from 0 to generator.depth, and 0"
            " unless generator.equivariant",
        )


@dataclass(frozen=True, config=STRICT)
class GeneratorConfig:
    """Configuration of one run that trains a generator."""

    data: LatentsConfig = field(default_factory=LatentsConfig)
    generator: NetworkConfig = field(default_factory=NetworkConfig)
    flow: FlowConfig = field(
        default_factory=lambda: FlowConfig(
            prediction="velocity",
            time_law="logit_normal",
            condition_drop=0.1,
            sampler="heun",
            sampler_steps=25,
        )
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    tracking: TrackingConfig = field(
        default_factory=lambda: TrackingConfig(registered_model="efae-generator")
    )
    resume: str = "auto"
    """auto resumes the run of this name if it exists; never refuses if it exists; the URI of a
    checkpoint starts a new run from its weights, optimizer state, step and position in the data."""
    output: str = ""
    """Folder or URI for a copy of the registered generator; the registry always stores it."""

    def __post_init__(self):
        require(
            self.resume in ("auto", "never") or "/" in self.resume,
            f"resume={self.resume!r}: use auto, never or the URI of a checkpoint",
        )
        require(
            self.training.global_batch_size >= self.ray.most_workers,
            f"training.global_batch_size={self.training.global_batch_size}: fewer than the"
            f" {self.ray.most_workers} workers of ray.num_workers",
        )
        require(
            not self.flow.distill_from,
            f"flow.distill_from={self.flow.distill_from!r}: generators are not distilled; leave it"
            " empty",
        )
        require(
            not (self.generator.is_exact and self.data.views),
            f"data.views={self.data.views} with generator.equivariant: all views of a latent have"
            " the same loss already; set data.views=0",
        )
        require(
            self.data.classes > 0 or self.flow.guidance_scale == 1,
            f"flow.guidance_scale={self.flow.guidance_scale} with data.classes=0: there is no"
            " condition to guide by; set the scale to 1",
        )
        require(
            self.ray.best_checkpoint_by != "psnr",
            "ray.best_checkpoint_by=psnr: a generator reconstructs nothing; use loss",
        )

    def choose_compilation(self, device_type: str) -> Literal["none", "blocks", "step"]:
        """Return training.compile with "auto" resolved: blocks on "cuda", none elsewhere."""
        chosen = self.training.compile
        if chosen == "auto":
            return "blocks" if device_type == "cuda" else "none"
        return chosen


AnyConfig = Config | GeneratorConfig
"""Configuration of a run, whatever it trains."""
