"""The bottleneck: bounds a latent, adds noise to it in training, and normalises it per irrep.

Everything here commutes with the group: one scale for all copies of an irrep, noise that is
isotropic on each copy, and no shift at all (a mean outside A1 would break sign flips).

The network sees the bounded latent. Users see it divided by its root mean square per irrep over the
training images, ready for training a diffusion model: this replaces the `scaling_factor` of latent
diffusion (Rombach et al. 2022, arXiv:2112.10752). Latents that stay those of a pretrained
autoencoder are instead mapped by its own factors, so that its diffusion models understand them.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from efae.model.networks.diffusers_vae import Factors, like
from efae.symmetry.learned_basis import Basis
from efae.symmetry.representation import Representation

_MOMENTUM = 0.02  # the running power averages about fifty steps
_SCALE_WEIGHT = 0.1


class Bottleneck(nn.Module):
    """Bounds latents (b, dim, h, w) in the basis of the irreps, adds noise, and normalises them.

    Args:
        representation: Representation of the group on the channels.
        kind: "rms" divides every example by its root mean square over channels and cells;
            "running" divides all examples by the root of one running mean power, so that bounding
            is linear;
            "kl" leaves the latent free and learns one Gaussian spread per irrep copy
            (Kingma & Welling 2014, arXiv:1312.6114, appendix B); "posterior" leaves it free, and
            noise to the encoder's own posterior. All its irreps share one scale, the
            `scaling_factor` of a pretrained autoencoder.
        noise: Standard deviation of the noise of "rms" and "running", relative to the latent's.
        factors: Factors of a pretrained autoencoder, in the basis of its networks, by which
            `normalize` maps instead; as far as they commute with the group. None for none.

    Attributes:
        power: Running mean power per irrep; of latents before they are bounded if the kind is
            "running", else of bounded ones.
    """

    copy_of_channel: Tensor

    def __init__(
        self,
        representation: Representation,
        kind: Literal["rms", "running", "kl", "posterior"],
        noise: float,
        factors: Factors | None = None,
    ):
        super().__init__()
        self.kind, self.noise = kind, noise
        self._factors, self._invariant = None, ()
        if factors is not None:
            # The mean over the group projects to the channels that no element changes. The others
            # commute with no shift and, where they mix, with one scale alone.
            whole = torch.stack([representation.matrix(g) for g in representation.group])
            self._invariant = tuple(map(float, whole.mean(0).diagonal()))
            self._factors = factors if min(self._invariant) == 1 else factors.with_one_scale()
        self.blocks = _blocks_of_one_scale(representation)
        if kind == "posterior":
            self.blocks = [slice(0, representation.dim)]
        counts = representation.multiplicities
        self._pairs = counts["b1"], counts["b2"]
        planes = representation.blocks.get("e", slice(representation.dim, representation.dim))
        channels = torch.arange(representation.dim)
        in_plane = planes.start + (channels - planes.start) // 2
        copies = torch.where(channels < planes.start, channels, in_plane)
        self.register_buffer("copy_of_channel", copies, persistent=False)
        # A statistic, not a weight; as a parameter it is saved and averaged with the weights.
        self.power = nn.Parameter(torch.ones(len(self.blocks)), requires_grad=False)
        if kind == "kl":
            self.log_variance = nn.Parameter(torch.full((int(copies.max()) + 1,), -4.0))

    @property
    def splits_planes(self) -> bool:
        """Whether rotations by any angle mix channels of B1 and B2 that have scales of their own.

        Only groups without mirrors pair unequal numbers of them. One scale for both would change
        the latents of models that are stored.
        """
        b1, b2 = self._pairs
        return len(self.blocks) > 1 and b1 != b2 and min(b1, b2) > 0

    def check_planes(self) -> None:
        """Raise ValueError if `normalize` does not commute with rotations by any angle."""
        if self.splits_planes:
            b1, b2 = self._pairs
            raise ValueError(
                f"representation.multiplicities: b1={b1} and b2={b2}: rotations by any angle mix B1"
                f" with B2, which have scales of their own; set b1={b1 + b2} and b2=0"
            )

    def bound(self, latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b dim h w"]:
        """Bound the encoder's output, in float32 or wider."""
        wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
        if self.kind in ("kl", "posterior"):
            return wide
        if self.kind == "running":
            return wide * torch.rsqrt(self._power_by_channel().mean())
        return wide * torch.rsqrt(wide.square().mean((1, 2, 3), keepdim=True) + 1e-6)

    def add_noise(
        self, latent: Float[Tensor, "b dim h w"], noise: Float[Tensor, "b dim h w"]
    ) -> Float[Tensor, "b dim h w"]:
        """Add standard normal noise, at the scale of training, to a bounded latent.

        With "posterior" it adds none: the encoder's own noise is drawn before the group acts.
        """
        if self.kind == "posterior":
            return latent
        return latent + self._spread() * noise

    def scale_penalty(self, latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b"]:
        """Return a term per example that holds the power of latents at 1; only for "running".

        Its gradient is that of half the squared logarithm of the mean power, with the running mean
        for one factor, so that the term of an example does not depend on its batch; its mean is
        0. Without it, latents would grow to drown the noise, since dividing by a running mean is
        no obstacle to them.

        Args:
            latent: Bounded latents.
        """
        power = self._power_by_channel().mean()
        return _SCALE_WEIGHT * power.log() * (latent.square().mean((1, 2, 3)) - 1)

    def divergence(self, latent: Float[Tensor, "b dim h w"]) -> Float[Tensor, "b"]:
        """Return KL(posterior || N(0, 1)), nats per example; only for "kl"."""
        log_variance = self.log_variance[self.copy_of_channel, None, None]
        terms = latent.square() + log_variance.exp() - 1 - log_variance
        return terms.sum((1, 2, 3)) / 2

    @torch.no_grad()
    def update_power(self, latent: Float[Tensor, "b dim h w"]) -> None:
        """Update the running mean power per irrep with a bounded training batch."""
        channels = latent.detach().float().square().mean((0, 2, 3))
        power = torch.stack([channels[block].mean() for block in self.blocks])
        if self.kind == "running":
            power = power * self._power_by_channel().mean()
        self.power.lerp_(power, _MOMENTUM)

    def mean_power(self) -> Float[Tensor, ""]:
        """Return the running mean power of bounded latents over all channels."""
        return self._bounded_power().mean()

    def normalize(
        self, latent: Float[Tensor, "b dim h w"], basis: Basis | None = None
    ) -> Float[Tensor, "b dim h w"]:
        """Scale a bounded latent to unit root mean square per irrep, or by the factors.

        Args:
            latent: Bounded latent.
            basis: Basis of the irreps, in which the latent is; None for that of the networks.
        """
        if self._factors is None:
            return latent / self._scale(latent.dtype)
        moved, scale = latent - self._shift(latent, basis), like(latent, self._factors.scale)
        return basis.to_irreps(basis.from_irreps(moved) * scale) if basis else moved * scale

    def denormalize(
        self, latent: Float[Tensor, "b dim h w"], basis: Basis | None = None
    ) -> Float[Tensor, "b dim h w"]:
        """Invert `normalize`."""
        if self._factors is None:
            return latent * self._scale(latent.dtype)
        scale = like(latent, self._factors.scale)
        moved = basis.to_irreps(basis.from_irreps(latent) / scale) if basis else latent / scale
        return moved + self._shift(latent, basis)

    def normalize_spread(
        self, spread: Float[Tensor, "b dim h w"], basis: Basis | None = None
    ) -> Float[Tensor, "b dim h w"]:
        """Scale deviations of an encoder's own posterior as `normalize` scales its means.

        Args:
            spread: Standard deviations, in the basis of the networks.
            basis: Basis of the irreps, in which the result is, channel by channel, without the
                correlations between channels; None for that of the networks.
        """
        if self._factors is None:
            scaled = spread / self._scale(spread.dtype)
        else:
            scaled = spread * like(spread, self._factors.scale)
        if basis is None:
            return scaled
        squares = basis.matrix().square().to(scaled.dtype)
        return torch.einsum("ji,bjhw->bihw", squares, scaled.square()).sqrt()

    def _shift(self, latent: Tensor, basis: Basis | None) -> Tensor:
        """Return the invariant part of the factors' shift, in the basis of the irreps."""
        assert self._factors is not None
        shift = like(latent, self._factors.shift)[None]
        return (basis.to_irreps(shift) if basis else shift) * like(latent, self._invariant)

    def _spread(self) -> Tensor | float:
        if self.kind != "kl":
            return self.noise
        return (self.log_variance / 2).exp()[self.copy_of_channel, None, None]

    def _scale(self, dtype: torch.dtype) -> Tensor:
        return self._bounded_power().sqrt().to(dtype)[:, None, None]

    def _bounded_power(self) -> Tensor:
        """Return the running power of bounded latents by channel."""
        power = self._power_by_channel()
        return power / power.mean() if self.kind == "running" else power

    def _power_by_channel(self) -> Tensor:
        """Repeat the running power of each block for its channels.

        The clamp keeps the scale of an irrep that no image excites above zero.
        """
        sizes = [block.stop - block.start for block in self.blocks]
        powers = self.power.clamp(min=1e-6)
        return torch.cat([p.expand(size) for p, size in zip(powers, sizes, strict=True)])


def _blocks_of_one_scale(representation: Representation) -> list[slice]:
    """Return the channels of each irrep; B1 and B2 share a scale if rotations can mix them."""
    blocks, counts = dict(representation.blocks), representation.multiplicities
    if counts["b1"] == counts["b2"] > 0:
        blocks["b1"] = slice(blocks["b1"].start, blocks.pop("b2").stop)
    return list(blocks.values())
