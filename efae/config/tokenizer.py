"""Settings of a run that trains a tokenizer, and how the sections depend on each other."""

from dataclasses import field
from math import gcd
from typing import Literal

from pydantic.dataclasses import dataclass

from data_pipelines.loading.options import ReadOptions
from efae.config.model import ModelConfig, RepresentationConfig, StartConfig
from efae.config.objective import FlowConfig, LossConfig
from efae.config.rules import STRICT, require
from efae.config.run import OptimizerConfig, RayConfig, TrackingConfig, TrainingConfig


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
            " trained on act(g, latent); set start.action=spatial, or use level regularized or"
            " objective",
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
        f, loss = 1 if self._follows_start else self.model.downsampling, self.loss
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
