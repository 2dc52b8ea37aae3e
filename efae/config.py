"""All settings of a run in one frozen, typed tree.

Ray Tune and the tests change it through `config_forms.with_overrides`, the command line through
``tyro``. The resolved tree is stored as JSON with every run, checkpoint and model version.
Units are in the names (``_seconds``, ``_bytes``); sizes are in pixels unless stated otherwise.
"""

from dataclasses import field
from math import gcd
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from data_pipelines.loading.options import ReadOptions
from efae.names import LONGEST_BYTES, find_fault

RECOMPILE_LIMIT = 256
"""Programs per process. Blocks share their code and differ by network, grid and batch: there are
more than the eight that torch allows by default."""
STRICT = ConfigDict(extra="forbid", hide_input_in_errors=True)
STEPS_BEFORE_PROFILE = 12
"""Steps before the profiled ones: compilation, allocators that settle, and the profiler's start."""


@dataclass(frozen=True, config=STRICT)
class DataConfig(ReadOptions):
    """Where the images are, and how they are read."""

    uri: str = "s3://efae-data/openmoji-32/train"
    """Shard set to train on (a folder with index.json, made by data_pipelines.build_shards)."""
    held_out_uri: str = "s3://efae-data/openmoji-32/held_out"
    """Shard set for validation and evaluation; never trained on."""
    resolution: int | tuple[int, int] = 32
    """Side of square images, or height and width, in pixels. Larger images are scaled until their
    shorter side fits, then cropped. With buckets, that of validation and evaluation."""
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


@dataclass(frozen=True, config=STRICT)
class RepresentationConfig:
    """How a group element acts on the latent's channels."""

    group: Literal["D4", "C4", "flips", "mirror", "trivial"] = "D4"
    """Flips and quarter turns in the group: all eight (D4), turns (C4), {e, h, v, r^2} (flips),
    {e, h} (mirror), none (trivial)."""
    dim: int = 32
    """Latent channels."""
    rotation_dims: int | None = None
    """Channels that rotate in planes under quarter turns (irrep E, two channels per plane); even.
    None: about half, if the group has quarter turns, leaving at least one invariant channel per
    colour."""
    chirality_split: float | None = None
    """Share of the other channels that change sign under some element (A2, B1, B2), in [0, 1].
    None: about half, leaving at least one invariant channel per colour."""
    multiplicities: tuple[int, int, int, int, int] | None = None
    """Copies of (A1, A2, B1, B2, E), instead of the two settings above; must add up to dim."""
    learned_basis: bool = False
    """Act by Q rho(g) Q^T with a learned orthogonal Q; not available at level exact, which absorbs
    any Q."""


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Encoder and decoder."""

    level: Literal["none", "objective", "regularized", "exact"] = "exact"
    """Equivariance: exact = by construction; objective = dense layers, trained on (gx | gz) pairs;
    regularized = objective plus a pair term on the encoder; none = dense layers, no group."""
    kind: Literal["transformer", "unet", "diffusers"] = "transformer"
    """Networks: transformer = attention between all tokens, with learned positions; unet =
    convolutions at every grid from the patches' to the latent's, for images of any size; diffusers
    = those of start.model, whose decoder needs no noise."""
    start: Literal["random", "closed_form"] = "random"
    """Weights before training: closed_form = linear paths from pixels to latent and back are set to
    the best equivariant linear map of the training images, which the networks then correct."""
    hidden_size: int = 128
    """Width of the decoder's tokens, of a unet's at the latent's grid; a multiple of
    8 * num_heads."""
    depth: int = 4
    """Blocks of the decoder, of a unet's at the latent's grid."""
    fine_hidden_size: int = 64
    """Width of a unet's tokens at the patches' grid, of encoder and decoder; grids in between are
    as wide as a geometric sequence asks."""
    fine_depth: int = 1
    """Blocks of a unet's encoder, and of its decoder on the way down, at each grid finer than the
    latent's; on the way up there are twice as many."""
    attention_depth: int = 0
    """Transformer blocks among the depth blocks at the latent's grid of a unet's decoder."""
    num_heads: int = 4
    """Attention heads."""
    patch_size: int = 4
    """Side of a decoder token, in pixels; divides downsampling."""
    mlp_ratio: int = 3
    """Hidden width of a block's MLP, in units of hidden_size."""
    modulation: Literal["block", "shared"] = "block"
    """adaLN of the decoder: a matrix per block, half of the weights of a wide decoder, or one for
    all blocks with an offset per block."""
    encoder_hidden_size: int = 128
    """Width of the encoder's tokens; a multiple of 8 * num_heads."""
    encoder_depth: int = 1
    """Encoder blocks at each grid, from the patches' to the latent's; of a unet's encoder, at the
    latent's grid."""
    downsampling: int = 8
    """Side of a latent cell, in pixels; equal to the resolution for a 1x1 (vector) latent."""
    bottleneck: Literal["rms", "running", "kl", "posterior"] = "rms"
    """Bound on the latent: rms = a fixed root mean square per example; running = division by one
    running root mean square of all examples; kl = a Gaussian posterior with a learned standard
    deviation per irrep copy, weighted by loss.kl_weight; posterior = the posterior of the encoder
    of start.model, with the same weight."""
    latent_noise: float = 0.05
    """Standard deviation of the Gaussian noise added to the latent in training (bottleneck rms and
    running)."""

    def __post_init__(self):
        require_positive(
            "model",
            self,
            *("hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio"),
            *("encoder_hidden_size", "encoder_depth", "downsampling"),
            *("fine_hidden_size", "fine_depth"),
        )
        require(
            0 <= self.attention_depth <= self.depth,
            f"model.attention_depth={self.attention_depth}: must be between 0 and"
            f" model.depth={self.depth}",
        )
        require(
            self.fine_hidden_size % 8 == 0,
            f"model.fine_hidden_size={self.fine_hidden_size}: must be a multiple of 8",
        )
        require(
            not (self.has_linear_start and self.bottleneck == "rms"),
            "model.start=closed_form with model.bottleneck=rms: no linear decoder undoes a scale of"
            " each example's own; set model.bottleneck=running",
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

    @property
    def has_linear_start(self) -> bool:
        """Whether the networks correct linear paths that are set before training."""
        return self.start == "closed_form"

    @property
    def most_compiled_shapes(self) -> int:
        """Number of shapes of batches for which the blocks can be compiled in one process.

        There is a program for each shape and kind of block: one in encoder and decoder at every
        grid, and attention. A quarter of the compiler's limit is counted, because the parts of a
        batch may have two sizes, and a teacher, validation and evaluation need programs, too.
        """
        kinds = 2 * (self.downsampling // self.patch_size).bit_length() + 1
        return RECOMPILE_LIMIT // 4 // kinds


@dataclass(frozen=True, config=STRICT)
class StartConfig:
    """Model whose weights a run begins with."""

    model: str = ""
    """URI of one of our models, as `efae.load` takes it: its averaged weights, on any data, with a
    new optimizer; a unet may have another data.resolution. Or "diffusers:PATH", a folder with an
    AutoencoderKL, AutoencoderTiny or AutoencoderDC, local or remote. With model.kind=diffusers its
    decoder is fine-tuned, too; with another kind, a flow decoder learns p(image | latent) for its
    encoder. Empty trains from scratch."""
    action: Literal["spatial", "fitted", "split"] = "spatial"
    """Action on the channels of an autoencoder of diffusers, unless representation.multiplicities
    names one: spatial = none, g moves cells only (EQ-VAE); fitted = the one that its latents are
    nearest to, in a basis found on training images; split = that of representation.rotation_dims
    and chirality_split."""
    train: Literal["both", "encoder", "decoder"] = "both"
    """Networks to train; the other is frozen."""
    symmetrize: bool = False
    """Average the pretrained networks over the group, E(x) = mean of rho(g)^-1 E(gx), which makes
    them exactly equivariant and as many times slower as the group has elements."""
    anchor_weight: float = 0.0
    """Weight of |E(x) - E0(x)|^2 over the latent's power, E0 being the encoder before fine-tuning:
    keeps latents usable for diffusion models that were trained on it."""
    architecture: str = ""
    """Configuration of its networks, as JSON; read from the folder when a run starts."""

    def __post_init__(self):
        require(self.model != "diffusers:", f"start.model={self.model!r}: must read diffusers:PATH")
        require(self.anchor_weight >= 0, f"start.anchor_weight={self.anchor_weight}: must be >= 0")
        require(
            not self.model or self.is_diffusers or self.action == "spatial",
            f"start.action={self.action} with start.model={self.model!r}: only an autoencoder of"
            " diffusers has no action of its own; leave it at spatial",
        )

    @property
    def is_diffusers(self) -> bool:
        """Whether the model is an autoencoder of diffusers."""
        return self.model.startswith("diffusers:")


@dataclass(frozen=True, config=STRICT)
class FlowConfig:
    """Rectified flow: x_t = (1 - t) * image + t * noise; t = 1 is noise."""

    prediction: Literal["image", "velocity"] = "image"
    """Quantity that the network predicts; the loss is always on the velocity."""
    time_law: Literal["logit_normal", "uniform", "mixture"] = "mixture"
    """Distribution of t in training; mixture = logit-normal plus a uniform share, so that every t
    is drawn often enough."""
    time_mean: float = 0.0
    """Mean of logit(t); positive values put more weight on noisy images."""
    time_std: float = 1.0
    """Standard deviation of logit(t)."""
    time_uniform: float = 0.1
    """Uniform share of the mixture, in (0, 1)."""
    stratified: bool = True
    """Draw one t from each of equally probable slices of its distribution in every batch."""
    condition_drop: float = 0.0
    """Share of training examples whose latent, or label if a generator is trained, is replaced by a
    learned null condition; guidance needs it."""
    sampler: Literal["euler", "midpoint", "heun"] = "euler"
    """Default solver of the decoding ODE."""
    sampler_steps: int | None = None
    """Default number of solver steps. None: 4, or 1 for a distilled model."""
    sampler_power: float = 1.0
    """Spacing of the steps: above 1, more of them near the image; below 1, near the noise."""
    sampler_shift: float = 1.0
    """Shift of the steps: above 1, more of them near the noise (SD3 uses 3); below 1, near the
    image."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 is no guidance, others need condition_drop > 0."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Range of t in which guidance is applied."""
    distill_from: str = ""
    """URI of a trained model, as `efae.load` takes it, to distil into a decoder of one step, with
    the same encoder; empty trains from images alone."""
    distill_steps: int = 4
    """Sampler steps of that teacher."""

    def __post_init__(self):
        require_positive(
            "flow", self, "distill_steps", "sampler_power", "sampler_shift", "time_std"
        )
        require(
            self.sampler_steps is None or self.sampler_steps > 0,
            f"flow.sampler_steps={self.sampler_steps}: must be positive",
        )
        require(
            0 < self.time_uniform < 1, f"flow.time_uniform={self.time_uniform}: must be in (0, 1)"
        )
        require(
            0 <= self.condition_drop < 1,
            f"flow.condition_drop={self.condition_drop}: must be in [0, 1)",
        )
        require(
            not (self.distill_from and self.condition_drop),
            f"flow.condition_drop={self.condition_drop} with flow.distill_from: the teacher's"
            " samples are guided, if at all, and its student cannot be; set flow.condition_drop=0",
        )
        require(
            self.guidance_scale == 1 or self.condition_drop > 0,
            f"flow.guidance_scale={self.guidance_scale}: guidance needs a null condition,"
            " which flow.condition_drop=0 never trains; set it to 0.1, or the scale to 1",
        )
        low, high = self.guidance_interval
        require(
            0 <= low < high <= 1,
            f"flow.guidance_interval={self.guidance_interval}: must be 0 <= low < high <= 1",
        )

    @property
    def default_steps(self) -> int:
        """Number of solver steps that `decode` takes unless it is given one."""
        if self.sampler_steps is not None:
            return self.sampler_steps
        return 1 if self.distill_from else 4


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """Terms of the loss beside the flow's velocity error."""

    reconstruction: Literal["l2", "l1"] = "l2"
    """Error of a decoder without flow (model.kind=diffusers): squared or absolute."""
    pair_weight: float = 0.1
    """Weight of |E(gx) - rho(g) E(x)|^2 over the latent's mean power, at level regularized."""
    kl_weight: float = 1e-4
    """Weight of the posterior's KL divergence from N(0, 1) per pixel value (bottlenecks kl and
    posterior)."""
    scaling_probability: float = 0.0
    """Share of steps that shrink images and latent grids together (EQ-VAE)."""
    rotation_probability: float = 0.0
    """Share of examples whose image and latent are rotated by an arbitrary angle; their loss covers
    only the inscribed disk."""
    perceptual: str = ""
    """Function "package.module:name" that maps (predicted image, image), each (b, c, h, w) in
    [-1, 1], to a loss (b,), for instance LPIPS. It gets the one-step prediction of the image."""
    lpips_weights: str = ""
    """File of torchvision's AlexNet weights, alexnet-owt-7be5be79.pth, on every worker: LPIPS is
    the perceptual loss."""
    perceptual_weight: float = 0.1
    """Weight of the perceptual loss."""

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
        require(
            not (self.perceptual and self.lpips_weights),
            f"loss.perceptual={self.perceptual!r} and loss.lpips_weights={self.lpips_weights!r}:"
            " choose one perceptual loss",
        )


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 6e-3
    """Peak learning rate."""
    final_learning_rate_fraction: float = 0.01
    """Learning rate of the last step, as a fraction of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.99
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped to."""
    ema_decay: float = 0.999
    """Decay of the weights' moving average per step; starts lower (see training/ema.py)."""

    def __post_init__(self):
        require_positive("optimizer", self, "learning_rate", "max_grad_norm")
        for name in ("beta1", "beta2", "ema_decay", "final_learning_rate_fraction"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value}: must be in [0, 1)")


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """Length, batch, precision and intervals of a run."""

    steps: int = 4000
    """Optimizer updates."""
    global_batch_size: int = 128
    """Images per step over all workers, whatever their number."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    """fp32; tf32 = fp32 with short products on NVIDIA GPUs; autocast to bf16, or to fp16 with a
    gradient scaler. Weights stay in fp32."""
    micro_batch_size: int = 0
    """Maximum number of images per forward pass of a worker, to save memory; gradients are
    accumulated, so the result stays the same up to rounding. 0 = all images of the worker. A run
    that is out of memory restarts at half the size."""
    activation_memory: float = 1.0
    """Share of the activations that are kept for the backward pass; the others are computed
    again."""
    compile: Literal["auto", "none", "blocks", "step"] = "auto"
    """Compile each block, or the loss with its backward pass as one graph (step; for small models:
    with CUDA graphs if there is one worker and micro_batch_size is 0); auto = blocks on GPUs, none
    on CPUs or where shapes are many. Draws, clipping, optimizer and moving average stay eager.
    Validation and the final evaluation compile the blocks unless it is none."""
    seed: int = 0
    """Seed of all random draws, each a function of (seed, step, rank)."""
    log_interval: int = 25
    """Steps between two points of the training curves."""
    evaluation_interval: int = 1000
    """Steps between two validations on held-out images; the last step is validated too."""
    validation_images: int = 64
    """Maximum number of held-out images per validation."""
    evaluation_precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the model in validation and in the final evaluation; below fp32, the gap that
    they measure is that of rounding."""
    profile_steps: int = 0
    """Number of steps to profile on rank 0, after the first 12: MLflow stores a trace and, on a
    GPU, a memory snapshot as artifacts in the folder profile."""
    checkpoint_interval: int = 250
    """Steps between two checkpoints."""
    held_out_images: int = 512
    """Maximum number of held-out images in the final evaluation."""

    def __post_init__(self):
        require_positive(
            "training",
            self,
            *("steps", "global_batch_size", "log_interval", "evaluation_interval"),
            *("validation_images", "checkpoint_interval", "held_out_images"),
        )
        for name in ("seed", "micro_batch_size", "profile_steps"):
            value = getattr(self, name)
            require(value >= 0, f"training.{name}={value}: must be >= 0")
        require(
            0 <= self.activation_memory <= 1,
            f"training.activation_memory={self.activation_memory}: must be in [0, 1]",
        )


@dataclass(frozen=True, config=STRICT)
class RayConfig:
    """Resources of the run on the Ray cluster, and its recovery from failures."""

    num_workers: int | tuple[int, int] = 2
    """Training processes, one GPU each with use_gpu. Two numbers, minimum and maximum, make the run
    elastic: it continues with fewer workers when nodes are lost and with more when nodes join, at
    the same global batch size. With one number it waits for replacements."""
    use_gpu: bool = False
    """Train on GPUs."""
    cpus_per_worker: int = 1
    """CPUs reserved for each worker."""
    storage_uri: str = "s3://efae-runs/ray"
    """Folder for checkpoints; every node must reach it."""
    max_failures: int = 3
    """Worker failures that a run survives, not counting preemptions with notice. Also the number of
    failed worker starts in a row that it survives."""
    rollbacks: int = 0
    """Number of times that a run whose loss is not finite rolls back to its newest checkpoint, each
    time at half the learning rate, before it stops."""
    checkpoints_to_keep: int = 2
    """Number of newest checkpoints to keep in storage."""
    best_checkpoint_by: Literal["", "psnr", "loss"] = ""
    """Keep the best checkpoint too, by PSNR of the last validation or by training loss."""
    autoscaling: bool = False
    """Request the nodes that the minimum number of workers needs from the autoscaler, and wait
    placement_timeout_seconds for them, instead of refusing a cluster that is too small."""
    placement_timeout_seconds: int = 20
    """Time to wait for the nodes of a group of workers before counting the nodes again; use 300 if
    an autoscaler starts machines. The run ends after max_failures + 1 such waits in a row."""
    resize_interval_seconds: int = 60
    """Interval at which an elastic run checks for new nodes; growing repeats the steps since the
    newest checkpoint."""
    collective_timeout_seconds: int = 600
    """Time after which a worker that waits for the others fails; all workers then restart."""

    def __post_init__(self):
        require_positive(
            "ray",
            self,
            *("cpus_per_worker", "checkpoints_to_keep", "placement_timeout_seconds"),
            *("resize_interval_seconds", "collective_timeout_seconds"),
        )
        require(
            0 < self.fewest_workers <= self.most_workers,
            f"ray.num_workers={self.num_workers}: must be a positive number, or two, least first",
        )
        for name in ("max_failures", "rollbacks"):
            require(getattr(self, name) >= 0, f"ray.{name}={getattr(self, name)}: must be >= 0")

    @property
    def fewest_workers(self) -> int:
        """Minimum number of workers with which the run continues."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Number of workers when no node is missing."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


@dataclass(frozen=True, config=STRICT)
class TrackingConfig:
    """Names in MLflow; the server's address is MLFLOW_TRACKING_URI in the environment."""

    experiment: str = "efae"
    """MLflow experiment."""
    run_name: str = ""
    """Name of the run; by default made from the preset and the time. The same name resumes the
    run."""
    registered_model: str = "efae"
    """Name of the registered model."""
    portable: bool = True
    """Export the registered model also for use without this package, as an MLflow pyfunc flavour
    and as torch.export programs. Takes 15 seconds for the quick start's model, 40 for a unet, while
    the model is evaluated. No effect with model.kind=diffusers, whose folder needs no export."""
    page: bool = False
    """Write the page that flips latents in a browser beside the report, in the folder page. Takes a
    minute and 17 MB; needs npm on the machine of the driver, and the extra onnx."""
    report_folder: str = ""
    """Folder or URI for a copy of the report, in a subfolder named after the run; MLflow always
    stores one."""
    commit: str = ""
    """Commit of the code, recorded with the run."""
    sample_log: str = ""
    """Local folder where each training process logs the keys that each step consumed, for audits;
    empty disables the log."""

    def __post_init__(self):
        if self.run_name:
            require_name("tracking.run_name", self.run_name, "/\\")
        # MLflow refuses / and :, and in models:/NAME@ALIAS the other characters are syntax.
        require_name("tracking.registered_model", self.registered_model, "/\\:@?#%")
        require_name("tracking.experiment", self.experiment)


@dataclass(frozen=True, config=STRICT)
class Config:
    """Configuration of one experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    start: StartConfig = field(default_factory=StartConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resume: str = "auto"
    """auto resumes the run of this name if it exists; never refuses if it exists; the URI of a
    checkpoint starts a new run from its weights, optimizer state, step and position in the data; a
    unet's may have another data.resolution, for instance 128 px first and then 256."""
    output: str = ""
    """Folder or URI for a copy of the registered model; the registry always stores it."""

    def __post_init__(self):
        require(
            self.resume in ("auto", "never") or "/" in self.resume,
            f"resume={self.resume!r}: use auto, never or the URI of a checkpoint",
        )
        f = 1 if self._follows_start else self.model.downsampling
        require(
            all(side % f == 0 for side in self.data.image_size),
            f"data.resolution={self.data.resolution}: not divisible into latent cells; use a"
            f" multiple of model.downsampling={self.model.downsampling}",
        )
        self._check_buckets()
        require(
            self.training.global_batch_size >= self.ray.most_workers,
            f"training.global_batch_size={self.training.global_batch_size}: fewer than the"
            f" {self.ray.most_workers} workers of ray.num_workers",
        )
        require(
            not self.representation.learned_basis
            or self.model.level in ("objective", "regularized"),
            f"representation.learned_basis=True at model.level={self.model.level}: a basis"
            " can be learned only where the decoder is trained on act(g, latent), and level exact"
            " absorbs any basis into its first and last maps; use level objective or regularized,"
            " or leave it off",
        )
        require(
            not (self.model.has_linear_start and self.flow.prediction == "velocity"),
            "model.start=closed_form with flow.prediction=velocity: a linear map of the latent"
            " predicts the image; set flow.prediction=image",
        )
        self._check_scaling_and_turns()
        self._check_pretrained()
        require(
            not (self.flow.distill_from and self.training.compile == "step"),
            "training.compile=step with flow.distill_from: the teacher's sampler cannot be compiled"
            " as part of the step; use blocks",
        )
        require(
            self.loss.scaling_probability == 0 or self.training.compile in ("auto", "none"),
            f"training.compile={self.training.compile}: every size that"
            f" loss.scaling_probability={self.loss.scaling_probability} draws would be compiled"
            " anew; use none",
        )

    @property
    def _follows_start(self) -> bool:
        """Whether sizes of the model are still to be read from the one that it starts from."""
        return self.start.is_diffusers and not self.start.architecture

    def _check_pretrained(self) -> None:
        model, start = self.model, self.start
        # Presets leave the model open; `adopt_pretrained` refuses to start without it.
        given = start.is_diffusers or model.kind == "diffusers"
        require(
            given == (model.bottleneck == "posterior"),
            f"model.bottleneck={model.bottleneck} with start.model={start.model!r}: a"
            " pretrained encoder needs bottleneck posterior, and no other encoder has a posterior",
        )
        require(
            not (model.kind == "diffusers" and model.level == "exact") or start.symmetrize,
            "model.level=exact with model.kind=diffusers: a pretrained network is exactly"
            " equivariant only as an average over the group; set start.symmetrize=True, or"
            " model.level=regularized",
        )
        require(
            model.kind == "diffusers"
            or start.train == "both"
            or (bool(start.model) and not (given and start.train == "encoder")),
            f"start.train={start.train} with model.kind={model.kind} and"
            f" start.model={start.model!r}: the other network would keep its random weights; set"
            " both, or decoder for the encoder of a start.model",
        )
        require(
            given or not start.symmetrize,
            "start.symmetrize=True without an autoencoder of diffusers as start.model: use"
            " model.level=exact",
        )
        require(
            start.action != "fitted"
            or model.level in ("objective", "regularized")
            or self.representation.multiplicities is not None,
            f"start.action=fitted at model.level={model.level}: its basis needs a decoder that is"
            " trained on act(g, latent); use level regularized or objective, or another action",
        )
        require(
            model.kind == "diffusers" or not start.anchor_weight,
            f"start.anchor_weight={start.anchor_weight} with model.kind={model.kind}: only"
            " fine-tuning (model.kind=diffusers) has an anchor; to keep the latents as they are,"
            " set start.train=decoder",
        )
        require(
            not (model.kind == "diffusers" and self.flow.distill_from),
            "flow.distill_from with model.kind=diffusers: its decoder has one step already",
        )
        require(
            given or not (start.model and self.flow.distill_from),
            f"start.model={start.model!r} with flow.distill_from: a student starts from its"
            " teacher; leave one of them empty",
        )
        require(
            not (given and model.has_linear_start),
            f"model.start=closed_form with start.model={start.model!r}: the weights are given; set"
            " random",
        )
        require(
            not (given and self.loss.rotation_probability),
            f"loss.rotation_probability={self.loss.rotation_probability} with start.model="
            f"{start.model!r}: set 0; a pretrained encoder is fine-tuned on flips and quarter turns"
            " alone",
        )

    def _check_buckets(self) -> None:
        f = 1 if self._follows_start else self.model.downsampling
        group = self.representation.group
        for height, width in self.data.buckets:
            where = f"data.buckets={self.data.buckets}: {height} x {width}"
            require(
                height % f == 0 and width % f == 0,
                f"{where} is not divisible into latent cells; use multiples of"
                f" model.downsampling={f}",
            )
            require(
                height == width
                or group not in ("D4", "C4")
                or self.model.level not in ("objective", "regularized"),
                f"{where} is not square, but a batch at model.level={self.model.level} mixes"
                f" quarter turns of representation.group={group} with other elements; use level"
                " exact, square buckets, or group flips or mirror",
            )
        shapes, most = len(self.data.buckets), self.model.most_compiled_shapes
        require(
            shapes < 2 or self.training.compile != "step",
            "training.compile=step: the whole step would be compiled anew for every shape of"
            " data.buckets; use blocks",
        )
        require(
            shapes <= most or self.training.compile != "blocks",
            f"training.compile=blocks: the blocks of this model can be compiled for {most} shapes,"
            f" but data.buckets has {shapes}; use fewer, or none",
        )

    def _check_scaling_and_turns(self) -> None:
        f, loss = self.model.downsampling, self.loss
        size = self.data.image_size
        require(
            loss.scaling_probability == 0 or max(size) > f,
            f"loss.scaling_probability={loss.scaling_probability}: a 1 x 1 latent cannot be"
            " scaled; lower model.downsampling, or set 0",
        )
        shapes = [
            (f"data.buckets={self.data.buckets}: {h} x {w}", h, w) for h, w in self.data.buckets
        ]
        resolution = (f"data.resolution={self.data.resolution}", *size)
        for where, height, width in shapes or [resolution]:
            require(
                loss.scaling_probability == 0 or gcd(height // f, width // f) > 1,
                f"{where} is a latent of {height // f} x {width // f} cells, which cannot be scaled"
                f" (loss.scaling_probability={loss.scaling_probability}): choose sides in"
                " cells with a common factor, or set 0",
            )
        for where, height, width in [resolution, *shapes]:
            require(
                loss.rotation_probability == 0 or height == width,
                f"{where} is not square, and only squares turn by any angle"
                f" (loss.rotation_probability={loss.rotation_probability}): use square images, or"
                " set 0",
            )

    @property
    def freezes_latent(self) -> bool:
        """Whether the encoder, and the scale of its latents, stay those of another model."""
        frozen = bool(self.start.model) and self.start.train == "decoder"
        return frozen or bool(self.flow.distill_from)

    @property
    def keeps_latents(self) -> bool:
        """Whether latents stay those that diffusion models of the pretrained one were trained on.

        They then keep its factors: shift and scale are not measured anew.
        """
        start = self.start
        return start.is_diffusers and (start.train == "decoder" or start.anchor_weight > 0)

    def choose_compilation(self, device_type: str) -> Literal["none", "blocks", "step"]:
        """Return training.compile with "auto" resolved: blocks on "cuda" if shapes are few."""
        chosen = self.training.compile
        if chosen == "auto":
            few = len(self.data.buckets) <= self.model.most_compiled_shapes
            few = few and self.loss.scaling_probability == 0
            return "blocks" if device_type == "cuda" and few else "none"
        return chosen


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        # A ValueError that pydantic shows unchanged, without its own boilerplate.
        raise PydanticCustomError("configuration", "{message}", {"message": message})


def require_positive(section: str, config: Any, *names: str) -> None:
    """Raise a ValueError unless all these settings are above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value}: must be positive")


def require_name(where: str, name: str, syntax: str = "", longest: int = LONGEST_BYTES) -> None:
    """Raise a ValueError for a name that some system cannot store; see `names.find_fault`."""
    fault = find_fault(name, syntax, longest)
    shown = name if len(name) <= longest else f"{name[:40]}…"
    require(not fault, f"{where}={shown!r}: {fault}; choose another name")
