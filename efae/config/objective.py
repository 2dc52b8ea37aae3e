"""Settings of what is learned: the flow, and the other terms of the loss."""

from typing import Literal

from pydantic.dataclasses import dataclass

from efae.config.rules import STRICT, require, require_positive


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
