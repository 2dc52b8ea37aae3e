"""Settings of the model: its latent, its networks, and the weights that it starts from."""

from typing import Literal

from pydantic.dataclasses import dataclass

from efae.config.rules import STRICT, require, require_positive

RECOMPILE_LIMIT = 256
"""Programs per process. Blocks share their code and differ by network, grid and batch: there are
more than the eight that torch allows by default."""


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
    the best equivariant linear map of the training images. The networks then correct both."""
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
            not (self.anchor_weight and self.train == "decoder"),
            f"start.anchor_weight={self.anchor_weight} with start.train=decoder: a frozen encoder"
            " does not move; set 0",
        )
        require(
            not self.model or self.is_diffusers or self.action == "spatial",
            f"start.action={self.action} with start.model={self.model!r}: only an autoencoder of"
            " diffusers has no action of its own; leave it at spatial",
        )

    @property
    def is_diffusers(self) -> bool:
        """Whether the model is an autoencoder of diffusers."""
        return self.model.startswith("diffusers:")
