"""The generator: a transformer that predicts the velocity of a flow of latents.

It is the diffusion transformer of SiT (Ma et al. 2024, arXiv:2401.08740) with the blocks of
LightningDiT (Yao et al. 2025, arXiv:2501.01423): RMS norm, normalised queries and keys (Henry et
al. 2020, arXiv:2010.04245), SwiGLU (Shazeer 2020, arXiv:2002.05202) and rotary positions, modulated
by t, class and view. All layers are octic: over the trivial group they are dense; over the group of
the latents, the velocity commutes with it, v(rho(g) x, t, y) = rho(g) v(x, t, y), so that samples
and their views are equally likely. A label is invariant. Where the last blocks are dense, they see
all features of equivariant ones, and may prefer a view.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from data_pipelines.shards.latent_format import LatentFormat
from efae.config import GeneratorConfig
from efae.generation.normalization import Normalization
from efae.model.execution.compilation import Compilable
from efae.model.networks.conditioning import embed_time
from efae.model.networks.linear_path import patchify, unpatchify
from efae.model.networks.transformer import Positions
from efae.model.octic.layers import Block, Lift, Linear, latent_action, normalize, zero_linear
from efae.model.octic.layout import (
    embed_invariant,
    from_regular,
    layout_of,
    spread_gains,
    to_regular,
)
from efae.model.pretrained import StoredModel, check_weights
from efae.model.stored_files import CheckpointError
from efae.symmetry import TRIVIAL, Group, Representation
from efae.symmetry.group import grid_sources
from efae.symmetry.representation import irrep_matrix

_ROTARY_BASE = 100.0
"""Base of the rotary frequencies, as for images in Heo et al. 2024 (arXiv:2403.13298)."""


class Gate(nn.Module):
    """SiLU of one half of the channels times the other half, in the regular basis.

    There the group permutes features, so that their products are features again.
    """

    fourier: Tensor

    def __init__(self, group: Group):
        super().__init__()
        self.register_buffer("fourier", layout_of(group).fourier, persistent=False)

    def forward(
        self, x: Float[Tensor, "slot batch token coset*2*m"]
    ) -> Float[Tensor, "slot batch token coset*m"]:
        """Gate every token."""
        gate, value = _to_regular(self.fourier, x).chunk(2, -1)
        gated = F.silu(gate) * value
        return gated if len(self.fourier) == 1 else from_regular(self.fourier, gated, len(x))


def make_mlp(group: Group, m: int, mlp_ratio: int) -> nn.Sequential:
    """Return SwiGLU with as many weights as an MLP of two matrices and mlp_ratio * m channels."""
    hidden = -(-2 * mlp_ratio * m // 3)
    return nn.Sequential(Linear(group, m, 2 * hidden), Gate(group), Linear(group, hidden, m))


class RotaryAttention(nn.Module):
    """Self-attention with normalised queries and keys, rotated by their positions.

    In the regular basis, component g of a channel pair of frequency w turns by the angle
    <g w, p> at position p on the centred grid. As h moves component g at p to component hg at hp,
    and <hg w, hp> = <g w, p>, the rotation commutes with the group. Over the trivial group it is
    the usual rotation along rows and columns.

    Args:
        group: Group that acts.
        m: Number of channels of the tokens.
        num_heads: Number of heads; divides m.
        grid: Height and width of the grid of tokens.
    """

    fourier: Tensor
    cosine: Tensor
    sine: Tensor

    def __init__(self, group: Group, m: int, num_heads: int, grid: tuple[int, int]):
        super().__init__()
        self.num_heads = num_heads
        self.layout = layout_of(group)
        self.inward = Linear(group, m, 3 * m)
        self.outward = Linear(group, m, m)
        self.query_gain = nn.Parameter(torch.ones(m // num_heads))
        self.key_gain = nn.Parameter(torch.ones(m // num_heads))
        angles = rotary_angles(group, m // num_heads // 2, grid)
        self.register_buffer("fourier", self.layout.fourier, persistent=False)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(
        self, x: Float[Tensor, "slot batch token coset*m"]
    ) -> Float[Tensor, "slot batch token coset*m"]:
        """Attend from every token to all tokens of its example."""
        slots, batch, tokens, width = x.shape
        cosets = self.layout.cosets
        parts = self.inward(x).view(slots, batch, tokens, cosets, 3, -1).unbind(4)
        query, key = (
            self._rotate(part.flatten(-2), gain)
            for part, gain in zip(parts, (self.query_gain, self.key_gain), strict=False)
        )
        value = torch.unflatten(parts[2], -1, (self.num_heads, -1))
        value = value.permute(1, 4, 2, 0, 3, 5).flatten(3)
        mixed = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        mixed = torch.unflatten(mixed, -1, (slots, cosets, -1)).permute(3, 0, 2, 4, 1, 5)
        return self.outward(mixed.reshape(slots, batch, tokens, width))

    def _rotate(self, x: Tensor, gain: Tensor) -> Tensor:
        """Return normalised, rotated queries or keys (batch, head, token, element * channel).

        Inner products are the same in the regular basis, which is orthonormal.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        heads = torch.unflatten(_to_regular(self.fourier, wide), -1, (self.num_heads, -1))
        square = heads.square().mean((0, -1), keepdim=True)
        heads = heads * torch.rsqrt(square + 1e-6) * gain
        pairs = self.cosine.shape[-1]
        first, second = heads[..., :pairs], heads[..., pairs : 2 * pairs]
        cosine = self.cosine[:, None, :, None].to(heads.dtype)  # (element, 1, token, 1, pair)
        sine = self.sine[:, None, :, None].to(heads.dtype)
        turned = first * cosine - second * sine, first * sine + second * cosine
        return torch.cat([*turned, heads[..., 2 * pairs :]], -1).permute(1, 3, 2, 0, 4).flatten(3)


def rotary_angles(
    group: Group, pairs: int, grid: tuple[int, int]
) -> Float[Tensor, "element token pair"]:
    """Return the angle <g w, p> of each channel pair, by group element and position.

    Frequencies w fall geometrically from 1 to nearly 1 / 100 per cell, alternately along rows and
    columns.
    """
    steps = torch.arange(pairs, dtype=torch.float64)
    exponent = steps.div(2, rounding_mode="floor") / max(1, math.ceil(pairs / 2))
    sizes = _ROTARY_BASE**-exponent
    frequency = sizes * torch.stack([1 - steps % 2, steps % 2])  # to the right, up
    rows, columns = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in grid)
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    position = torch.stack([right, -down]).flatten(1)
    turned = torch.stack([irrep_matrix("e", element) @ frequency for element in group])
    return (turned.mT @ position).transpose(1, 2).float()


class GeneratorBlock(Block):
    """A block of the generator, with the modulation of `Block`.

    Args:
        group: Group that acts.
        m: Number of channels of the tokens.
        num_heads: Number of attention heads; divides m.
        mlp_ratio: Ratio of hidden channels to m, as `make_mlp` takes it.
        conditioning: Width of the condition.
        grid: Height and width of the grid of tokens.
    """

    def __init__(
        self,
        group: Group,
        m: int,
        num_heads: int,
        mlp_ratio: int,
        conditioning: int,
        grid: tuple[int, int],
    ):
        super().__init__(
            group,
            m,
            num_heads,
            mlp_ratio,
            conditioning,
            attention=RotaryAttention(group, m, num_heads, grid),
            mlp=make_mlp(group, m, mlp_ratio),
        )


class Generator(Compilable):
    """Network: (x_t, t, label, element) -> what flow.prediction says, on normalised latents.

    Attributes:
        config: Configuration of its run.
        format: Format of the latents.
        representation: Representation of the group on their channels.
        normalization: Scale and shift of the latents.
        shape: Shape (dim, h, w) of a latent.
        compiled: Whether `compile_blocks` has compiled its blocks.

    Raises:
        ValueError: The configuration does not say what the latents are, or does not fit them.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config, sizes = config, config.generator
        self.format = read_format(config)
        dim, height, width = self.format.shape
        self.shape = dim, height, width
        self.representation = self.format.representation
        if height % sizes.patch_size or width % sizes.patch_size:
            raise ValueError(
                f"generator.patch_size={sizes.patch_size}: does not divide the {height} x {width}"
                f" latents of {config.data.uri}"
            )
        for option, given in (
            (f"data.views={config.data.views}", config.data.views > 0),
            ("generator.equivariant=True", sizes.equivariant),
        ):
            if given:
                self.format.require_action(config.data.uri, option)
        group = self.representation.group if sizes.equivariant else TRIVIAL
        self.normalization = Normalization(self.representation)
        groups = [group] * (sizes.depth - sizes.dense_blocks) + [TRIVIAL] * sizes.dense_blocks
        hidden_size, last = sizes.hidden_size, groups[-1]
        m = hidden_size // len(group)
        grid = height // sizes.patch_size, width // sizes.patch_size
        action = patched_action(group, self.representation, sizes.patch_size)
        self.inward = Lift(group, *action, m, fan_in=action[0].shape[1])
        self.positions = Positions(group, *grid, m)
        self.time = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        classes = config.data.classes
        self.label = _embed(classes + 1, hidden_size) if classes else None  # the last is "any"
        order = len(self.representation.group)
        self.element = _embed(order, hidden_size) if config.data.views else None
        self.blocks = nn.ModuleList(
            GeneratorBlock(
                g, hidden_size // len(g), sizes.num_heads, sizes.mlp_ratio, hidden_size, grid
            )
            for g in groups
        )
        self.layout, m = layout_of(last), hidden_size // len(last)
        action = patched_action(last, self.representation, sizes.patch_size)
        self.sizes = [self.layout.gains * m, m]
        self.modulation = zero_linear(hidden_size, sum(self.sizes))
        self.outward = Lift(last, *action, m, fan_in=hidden_size)
        nn.init.zeros_(self.outward.coefficient)

    @classmethod
    def restore(cls, stored: StoredModel, device: str = "cpu") -> "Generator":
        """The generator that was read from a folder, for sampling: evaluation mode, no gradients.

        Args:
            stored: Model as its folder holds it; its weights become the generator's own.
            device: Device, as torch names them.

        Raises:
            CheckpointError: It is no generator, or its weights are not its configuration's.
        """
        if not isinstance(stored.settings, GeneratorConfig):
            raise CheckpointError(stored.uri, "holds an autoencoder, not a generator")
        model = cls(stored.settings)
        check_weights(stored, model.state_dict())
        model.load_state_dict(stored.weights, assign=True)
        return model.to(device).eval().requires_grad_(False)

    def forward(
        self,
        x_t: Float[Tensor, "b dim h w"],
        t: Float[Tensor, "b"],
        label: Int[Tensor, "b"] | None = None,
        element: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b dim h w"]:
        """Return the prediction.

        Args:
            x_t: Noisy, normalised latents.
            t: Times in (0, 1].
            label: Classes; data.classes is the null condition, and None means it for all.
            element: Positions in the group of the elements that acted on the data; None is the
                identity for all.
        """
        height, width = x_t.shape[-2:]
        patch_size = self.config.generator.patch_size
        condition = self.time(embed_time(t, self.config.generator.hidden_size).to(x_t.dtype))
        if self.label is not None:
            null = torch.full_like(t, self.config.data.classes, dtype=torch.long)
            condition = condition + self.label(null if label is None else label)
        if self.element is not None:
            identity = torch.zeros_like(t, dtype=torch.long)
            condition = condition + self.element(identity if element is None else element)
        condition = F.silu(condition)
        x = self.inward(patchify(x_t, patch_size))
        x = x + self.positions(height // patch_size, width // patch_size).to(x.dtype)
        for block in self.blocks:
            assert isinstance(block, GeneratorBlock)
            if len(x) != block.layout.slots:  # the first of the dense blocks
                x = x.movedim(0, -2).flatten(-2)[None]
            x = block(x, condition)
        scale, shift = self.modulation(condition).split(self.sizes, -1)
        x = normalize(x) * (1 + spread_gains(self.layout, scale))
        x = x + embed_invariant(self.layout, shift)[:, :, None]
        return unpatchify(self.outward.back(x), patch_size, height, width)


def read_format(config: GeneratorConfig) -> LatentFormat:
    """Return the format of the latents that a generator is made for.

    Raises:
        ValueError: The configuration does not hold one.
    """
    if not config.data.format:
        raise ValueError(
            "data.format='': not read from the latent set yet; efae.training.tasks.generator"
            ".adopt_latents does so"
        )
    return LatentFormat.model_validate_json(config.data.format)


def patched_action(
    group: Group, representation: Representation, side: int
) -> tuple[Int[Tensor, "element n"], Float[Tensor, "element n"]]:
    """Return source and sign, as `Lift` takes them, of the action on a patch of latent cells.

    The patch is side x side and flattened as (channel, row, column).
    """
    source, sign = latent_action(group, representation)
    cells = grid_sources(group, side, side)
    both = source[:, :, None] * side**2 + cells[:, None]
    return both.flatten(1), sign[:, :, None].expand_as(both).flatten(1)


def _embed(count: int, size: int) -> nn.Embedding:
    embedding = nn.Embedding(count, size)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding


def _to_regular(fourier: Tensor, x: Tensor) -> Tensor:
    """Return `to_regular`, or `x` itself over the trivial group."""
    return x if len(fourier) == 1 else to_regular(fourier, x)
