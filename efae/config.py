"""Every knob of a run on one page: a frozen, typed tree.

The command line (``tyro``), Ray Tune and the tests all change it the same way, through
`config_forms.with_overrides`; the resolved tree travels as JSON with every run, checkpoint and
model version.
Units are in the names (``_seconds``, ``_bytes``); sizes are pixels unless said otherwise.
"""

from dataclasses import field
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from data_pipelines.loading.options import ReadOptions
from efae.names import LONGEST_BYTES, find_fault

_STRICT = ConfigDict(extra="forbid", hide_input_in_errors=True)


@dataclass(frozen=True, config=_STRICT)
class DataConfig(ReadOptions):
    """Where the images are, and how they are read."""

    uri: str = "s3://efae-data/openmoji-32/train"
    """Shard set to train on (a folder with index.json, made by data_pipelines.build_shards)."""
    held_out_uri: str = "s3://efae-data/openmoji-32/held_out"
    """Shard set to measure on; never trained on."""
    resolution: int | tuple[int, int] = 32
    """Side of square images, or their height and width; pixels. Larger ones are scaled until their
    shorter side fits, and cropped."""
    channels: Literal[1, 3] = 3
    """Colour channels: 1 (grey) or 3 (RGB)."""
    cache_dir: str | None = None

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as fault:
            require(False, f"data.{fault}")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        size = super().image_size
        assert size is not None
        return size


@dataclass(frozen=True, config=_STRICT)
class RepresentationConfig:
    """How a group element acts on the latent's channels (DESIGN: five multiplicities)."""

    group: Literal["D4", "C4", "flips", "mirror", "trivial"] = "D4"
    """Flips and quarter turns that act: all eight (D4), turns (C4), {e, h, v, r^2} (flips),
    {e, h} (mirror), none (trivial)."""
    dim: int = 32
    """Latent channels."""
    rotation_dims: int | None = None
    """Channels that turn as planes under quarter turns (irrep E, two channels a plane): even. None:
    about half, where the group turns, and as many invariant channels left as there are colours."""
    chirality_split: float | None = None
    """Share of the other channels that change sign under some element (A2, B1, B2); in [0, 1].
    None: about half, with the same care."""
    multiplicities: tuple[int, int, int, int, int] | None = None
    """Copies of (A1, A2, B1, B2, E), instead of the two knobs above; dim must match."""
    learned_basis: bool = False
    """Act by Q rho(g) Q^T with a learned orthogonal Q; not at level exact, which absorbs any Q."""


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """Encoder and decoder."""

    level: Literal["none", "objective", "regularized", "exact"] = "exact"
    """Equivariance: exact by construction; objective = dense layers, trained on (gx | gz) pairs;
    regularized = objective and a pair term on the encoder; none = dense layers, no group."""
    hidden_size: int = 128
    """Width of the decoder's tokens; a multiple of 8 * num_heads."""
    depth: int = 4
    """Transformer blocks of the decoder."""
    num_heads: int = 4
    """Attention heads of encoder and decoder."""
    patch_size: int = 4
    """Side of a decoder token, pixels; divides downsampling."""
    mlp_ratio: int = 3
    """Hidden width of a block's MLP over hidden_size."""
    encoder_hidden_size: int = 128
    """Width of the encoder's tokens; a multiple of 8 * num_heads."""
    encoder_depth: int = 1
    """Encoder blocks at each grid size, from the patch grid down to the latent grid."""
    downsampling: int = 8
    """Pixels per latent cell; equal to the resolution for a 1x1 (vector) latent."""
    bottleneck: Literal["rms", "kl"] = "rms"
    """What bounds the latent: one root mean square per example, or a Gaussian posterior with a
    learned spread per irrep copy and loss.kl_weight."""
    latent_noise: float = 0.05
    """Standard deviation of Gaussian noise on the latent in training (bottleneck rms)."""

    def __post_init__(self):
        require_positive(
            "model",
            self,
            *("hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio"),
            *("encoder_hidden_size", "encoder_depth", "downsampling"),
        )
        for name in ("hidden_size", "encoder_hidden_size"):
            require(
                getattr(self, name) % (8 * self.num_heads) == 0,
                f"model.{name}={getattr(self, name)}: must be a multiple of"
                f" 8 * model.num_heads = {8 * self.num_heads}",
            )
        ratio, rest = divmod(self.downsampling, self.patch_size)
        require(
            rest == 0 and ratio & (ratio - 1) == 0 and ratio > 0,
            f"model.downsampling={self.downsampling}: must be model.patch_size"
            f" ({self.patch_size}) times a power of two",
        )
        require(self.latent_noise >= 0, f"model.latent_noise={self.latent_noise}: must be >= 0")


@dataclass(frozen=True, config=_STRICT)
class FlowConfig:
    """Rectified flow: x_t = (1 - t) * image + t * noise; t = 1 is noise."""

    prediction: Literal["image", "velocity"] = "image"
    """What the network's output means; the loss is always on the velocity."""
    time_law: Literal["logit_normal", "uniform", "mixture"] = "mixture"
    """Law of t in training; mixture = logit-normal with a uniform share, so that no t starves."""
    time_mean: float = 0.0
    """Mean of logit(t); positive values put more weight on noisy images."""
    time_std: float = 1.0
    """Standard deviation of logit(t)."""
    time_uniform: float = 0.1
    """Uniform share of the mixture, in (0, 1)."""
    stratified: bool = True
    """One t per equal slice of the law in every batch, instead of independent draws."""
    condition_drop: float = 0.0
    """Share of training examples that see a learned null condition instead of their latent; needed
    for guidance."""
    sampler: Literal["euler", "midpoint", "heun"] = "euler"
    """Solver of the decoding ODE, unless the caller says otherwise."""
    sampler_steps: int = 4
    """Its steps."""
    sampler_power: float = 1.0
    """Above 1 for more of the steps near the image, below 1 near the noise."""
    sampler_shift: float = 1.0
    """Above 1 for more of the steps near the noise (SD3 uses 3), below 1 near the image."""
    guidance_scale: float = 1.0
    """Classifier-free guidance when decoding: 1 is none; others need condition_drop > 0."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The t where guidance acts."""

    def __post_init__(self):
        require_positive(
            "flow", self, "sampler_steps", "sampler_power", "sampler_shift", "time_std"
        )
        require(
            0 < self.time_uniform < 1, f"flow.time_uniform={self.time_uniform}: must be in (0, 1)"
        )
        require(
            0 <= self.condition_drop < 1,
            f"flow.condition_drop={self.condition_drop}: must be in [0, 1)",
        )
        require(
            self.guidance_scale == 1 or self.condition_drop > 0,
            f"flow.guidance_scale={self.guidance_scale}: guidance compares with a null condition,"
            " which flow.condition_drop=0 never trains; set it to 0.1, or the scale to 1",
        )
        low, high = self.guidance_interval
        require(
            0 <= low < high <= 1,
            f"flow.guidance_interval={self.guidance_interval}: must be 0 <= low < high <= 1",
        )


@dataclass(frozen=True, config=_STRICT)
class LossConfig:
    """What the loss adds to the flow's velocity error."""

    pair_weight: float = 0.1
    """Weight of |E(gx) - rho(g) E(x)|^2 / Var E(x) at level regularized."""
    kl_weight: float = 1e-4
    """Weight of the posterior's KL divergence from N(0, 1) per pixel value (bottleneck kl)."""
    scaling_probability: float = 0.0
    """Share of steps whose images and latent grids are shrunk together (EQ-VAE)."""
    rotation_probability: float = 0.0
    """Share of examples turned by any angle, image and latent; the loss counts the disk."""
    perceptual: str = ""
    """A function "package.module:name" of (predicted image, image), each (b, c, h, w) in [-1, 1],
    to a loss (b,), for instance LPIPS; on the one-step prediction of the image."""
    perceptual_weight: float = 0.1
    """Its weight."""

    def __post_init__(self):
        for name in ("pair_weight", "kl_weight", "perceptual_weight"):
            require(getattr(self, name) >= 0, f"loss.{name}={getattr(self, name)}: must be >= 0")
        for name in ("scaling_probability", "rotation_probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"loss.{name}={value}: must be in [0, 1]")
        require(
            not self.perceptual or ":" in self.perceptual,
            f"loss.perceptual={self.perceptual!r}: must read package.module:function",
        )


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 6e-3
    """Peak learning rate."""
    final_learning_rate_fraction: float = 0.01
    """Learning rate at the last step over the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.99
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    ema_decay: float = 0.999
    """Decay of the weights' moving average per step; starts lower, see training/ema.py."""

    def __post_init__(self):
        require_positive("optimizer", self, "learning_rate", "max_grad_norm")
        for name in ("beta1", "beta2", "ema_decay", "final_learning_rate_fraction"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value}: must be in [0, 1)")


@dataclass(frozen=True, config=_STRICT)
class TrainingConfig:
    """Length, batch, precision and intervals of a run."""

    steps: int = 4000
    """Optimizer updates."""
    global_batch_size: int = 128
    """Images per step over all workers, at any number of them."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """fp32, or autocast to bf16 or to fp16 with a gradient scaler; weights stay fp32."""
    seed: int = 0
    """Every random draw is a function of (seed, step, rank)."""
    log_interval: int = 25
    """Steps between two points of the training curves."""
    evaluation_interval: int = 1000
    """Steps between two validations on held-out images; the last step validates too."""
    validation_images: int = 64
    """Held-out images of a validation, at most."""
    checkpoint_interval: int = 250
    """Steps between two checkpoints."""
    held_out_images: int = 512
    """Held-out images of the final evaluation, at most."""

    def __post_init__(self):
        require_positive(
            "training",
            self,
            *("steps", "global_batch_size", "log_interval", "evaluation_interval"),
            *("validation_images", "checkpoint_interval", "held_out_images"),
        )
        require(self.seed >= 0, f"training.seed={self.seed}: must be >= 0")


@dataclass(frozen=True, config=_STRICT)
class RayConfig:
    """What the run asks of the Ray cluster, and what it does when parts of it are lost."""

    num_workers: int | tuple[int, int] = 2
    """Training processes, one GPU each where use_gpu. Two numbers, fewest and most, make the run
    elastic: it goes on with fewer when nodes are lost and with more when nodes come, at the same
    global batch; one number waits for replacements."""
    use_gpu: bool = False
    """Train on GPUs."""
    cpus_per_worker: int = 1
    """CPUs reserved for each worker."""
    storage_uri: str = "s3://efae-runs/ray"
    """Where checkpoints go; every node must reach it."""
    max_failures: int = 3
    """Losses of workers that a run survives; nodes that the cluster takes back with notice do not
    count. Also the starts of workers that may fail in a row."""
    rollbacks: int = 0
    """Times that a run whose loss is no longer a number goes back to its newest checkpoint, each
    time at half the learning rate, instead of stopping."""
    checkpoints_to_keep: int = 2
    """Newest checkpoints kept in storage."""
    best_checkpoint_by: Literal["", "psnr", "loss"] = ""
    """Keep the best one too, by held-out PSNR at the last look or by training loss."""
    autoscaling: bool = False
    """Nodes come when they are asked for: ask for those that the fewest workers need, and wait
    placement_timeout_seconds for them, instead of refusing a cluster that is too small now."""
    placement_timeout_seconds: int = 20
    """How long to wait for the nodes of a group of workers before counting them anew; 300 where an
    autoscaler has to start machines. After max_failures + 1 such waits in a row the run ends."""
    resize_interval_seconds: int = 60
    """How often an elastic run looks for more nodes; growing repeats the steps since the newest
    checkpoint."""
    collective_timeout_seconds: int = 600
    """A worker that waits longer than this for the others fails, and all start again."""

    def __post_init__(self):
        require_positive(
            "ray",
            self,
            *("cpus_per_worker", "checkpoints_to_keep", "placement_timeout_seconds"),
            *("resize_interval_seconds", "collective_timeout_seconds"),
        )
        require(
            0 < self.fewest_workers <= self.most_workers,
            f"ray.num_workers={self.num_workers}: must be a positive number, or two, fewest first",
        )
        for name in ("max_failures", "rollbacks"):
            require(getattr(self, name) >= 0, f"ray.{name}={getattr(self, name)}: must be >= 0")

    @property
    def fewest_workers(self) -> int:
        """The least that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers when no node is missing."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


@dataclass(frozen=True, config=_STRICT)
class TrackingConfig:
    """Names in MLflow; the server's address is MLFLOW_TRACKING_URI in the environment."""

    experiment: str = "efae"
    """MLflow experiment."""
    run_name: str = ""
    """Name of the run; empty makes one from the preset and the time. The same name resumes."""
    registered_model: str = "efae"
    """Name of the registered model."""
    portable: bool = True
    """Export the registered model too for people without this package: a pyfunc flavour of MLflow
    and programs of torch.export. Takes some ten seconds."""
    report_folder: str = ""
    """Folder or URI that gets a copy of the report, below the run's name; MLflow always has one."""
    commit: str = ""
    """Commit of the code, recorded with the run."""
    sample_log: str = ""
    """Local folder where each training process notes the keys that every step consumed, for audits;
    empty notes nothing."""

    def __post_init__(self):
        if self.run_name:
            require_name("tracking.run_name", self.run_name, "/\\")
        # MLflow refuses / and :, and in models:/NAME@ALIAS the others would be syntax.
        require_name("tracking.registered_model", self.registered_model, "/\\:@?#%")
        require_name("tracking.experiment", self.experiment)


@dataclass(frozen=True, config=_STRICT)
class Config:
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resume: str = "auto"
    """auto goes on with the run of this name, if there is one; never refuses if there is one; the
    URI of a checkpoint begins a new run from its weights, optimizer, step and place in the data."""

    def __post_init__(self):
        require(
            self.resume in ("auto", "never") or "/" in self.resume,
            f"resume={self.resume!r}: use auto, never or the URI of a checkpoint",
        )
        require(
            all(side % self.model.downsampling == 0 for side in self.data.image_size),
            f"data.resolution={self.data.resolution}: the latent grid does not divide it; use a"
            f" multiple of model.downsampling={self.model.downsampling}",
        )
        require(
            self.training.global_batch_size >= self.ray.most_workers,
            f"training.global_batch_size={self.training.global_batch_size}: fewer than the"
            f" {self.ray.most_workers} workers of ray.num_workers",
        )
        require(
            not self.representation.learned_basis
            or self.model.level in ("objective", "regularized"),
            f"representation.learned_basis=True at model.level={self.model.level}: a basis is"
            " learned where the decoder is trained on act(g, latent), and level exact absorbs any"
            " into its first and last maps; use level objective or regularized, or leave it off",
        )
        require(
            self.loss.scaling_probability == 0
            or max(self.data.image_size) > self.model.downsampling,
            f"loss.scaling_probability={self.loss.scaling_probability}: a latent of 1 x 1 cannot be"
            " scaled; lower model.downsampling, or set 0",
        )


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        # A ValueError that pydantic shows as it is, without its own boilerplate.
        raise PydanticCustomError("configuration", "{message}", {"message": message})


def require_positive(section: str, config: Any, *names: str) -> None:
    """The same for knobs that must be above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value}: must be positive")


def require_name(where: str, name: str, syntax: str = "", longest: int = LONGEST_BYTES) -> None:
    """The same for a name that cannot work somewhere on its way; see `names.find_fault`."""
    fault = find_fault(name, syntax, longest)
    shown = name if len(name) <= longest else f"{name[:40]}…"
    require(not fault, f"{where}={shown!r}: {fault}; choose another name")
