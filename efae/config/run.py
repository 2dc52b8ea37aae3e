"""Settings of a run, whatever it trains: optimizer, length, machines, and names in MLflow."""

from typing import Literal

from pydantic.dataclasses import dataclass

from efae.config.rules import STRICT, require, require_name, require_positive

STEPS_BEFORE_PROFILE = 12
"""Steps before the profiled ones: compilation, allocators that settle, and the profiler's start."""


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
    """Name of the run; by default the preset, the time and random digits. The same name resumes the
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
