"""The original sketch, cloneofsimo/efae, reimplemented: the baseline of the ablation table.

Encoder: four 4 x 4 stride-2 convolutions with ReLU between them and a global average, to one
vector, without a norm. Decoder: a convolutional stem and a diffusion transformer that receives the
vector only through adaLN, with a rotary embedding along the flattened tokens. Objective: one coin
toss for the whole batch; on heads, images are mirrored and the last four latent dims change sign.
The latent is set to zero for a tenth of the examples, for guidance at sampling.

Kept because they affect the result: t enters its embedding unscaled in [0, 1]; gates are not
zero at first (the output layer is); z = 0 is the null condition although it is also a code; the
latent's scale is free; Adam at a constant 2e-3 (`build_optimizer`), no moving average, no clipping.
Dropped because they do not: it logs a loss per t over the wrong axes, prints in every forward pass,
overwrites its input, and moves its tables in every call.

The sizes are the original's for grey images, except for patches of 4 instead of 2 pixels (4x
faster) and a batch size (512) that the caller chooses. For colour, the original has
hidden_size=256, depth=10, num_heads=8 and first mirrors images at random. Nothing here comes from
efae.model: the baseline must not change with our flow.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from efae.symmetry import MIRROR, Element, Representation

TIME_FREQUENCIES = 128
DROP_PROBABILITY = 0.1


def embed_time(t: Tensor) -> Tensor:
    """Return cosines and sines of t in [0, 1] at frequencies from 1 to 1e-4: (b,) -> (b, 256)."""
    exponent = torch.arange(TIME_FREQUENCIES, device=t.device) / TIME_FREQUENCIES
    angle = t[:, None] * 10_000.0**-exponent
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotary_table(tokens: int, head_dim: int) -> Tensor:
    """Return exp(i n f) of tokens n, frequencies f (arXiv:2104.09864): (tokens, head_dim / 2)."""
    frequency = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(tokens)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs of (..., tokens, head_dim) by the angles of the table."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply one shift and scale (b, hidden) to all tokens of (b, tokens, hidden)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def drop_condition(latent: Float[Tensor, "b d h w"], generator: torch.Generator) -> Tensor:
    """Set the latent of a tenth of the examples to zero, the null condition."""
    chance = torch.rand((len(latent), 1, 1, 1), generator=generator, device=latent.device)
    return latent.where(chance >= DROP_PROBABILITY, 0)


class Attention(nn.Module):
    """Self-attention; LayerNorm on queries and keys over all heads together, then rotary."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.query_norm, self.key_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (b, head, token, head_dim)
            for part in (
                self.query_norm(self.query(x)),
                self.key_norm(self.key(x)),
                self.value(x),
            )
        )
        mixed = F.scaled_dot_product_attention(rotate(query, table), rotate(key, table), value)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class GatedMlp(nn.Module):
    """SiLU-gated MLP; its width is 8/3 hidden_size rounded up to a multiple of 256."""

    def __init__(self, hidden_size: int):
        super().__init__()
        width = math.ceil(8 * hidden_size // 3 / 256) * 256
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A transformer block, shifted, scaled and gated by the condition."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.attention = Attention(hidden_size, num_heads)
        self.mlp = GatedMlp(hidden_size)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor, table: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        attended = self.attention(modulate(self.attention_norm(x), shift1, scale1), table)
        x = x + gate1[:, None] * attended
        return x + gate2[:, None] * self.mlp(modulate(self.mlp_norm(x), shift2, scale2))


class Encoder(nn.Sequential):
    """Convolutional encoder: image (b, c, h, w) -> one vector (b, latent_dim, 1, 1)."""

    def __init__(self, channels: int, latent_dim: int):
        widths = [channels, 32, 64, 128, latent_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        super().__init__(*layers)


class Decoder(nn.Module):
    """Diffusion transformer: (x_t, t, latent) -> velocity."""

    table: Tensor

    def __init__(
        self,
        channels: int,
        resolution: int,
        latent_dim: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
    ):
        super().__init__()
        self.patch_size, self.grid = patch_size, resolution // patch_size
        width = hidden_size // 2
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 5, padding=2),
            nn.SiLU(),
            nn.GroupNorm(32, width),
            nn.Conv2d(width, width, 5, padding=2),
            nn.SiLU(),
            nn.GroupNorm(32, width),
        )
        self.embed_patch = nn.Linear(width * patch_size**2, hidden_size)
        nn.init.zeros_(self.embed_patch.bias)
        self.time_mlp = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )
        self.embed_latent = nn.Linear(latent_dim, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.to_patch = nn.Linear(hidden_size, channels * patch_size**2)
        nn.init.zeros_(self.to_patch.weight)
        nn.init.zeros_(self.to_patch.bias)
        table = rotary_table(self.grid**2, hidden_size // num_heads)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        condition = self.time_mlp(embed_time(t)) + self.embed_latent(latent.flatten(1))
        patches = F.pixel_unshuffle(self.stem(x_t), self.patch_size)  # (b, width * p^2, h/p, w/p)
        x = self.embed_patch(patches.flatten(2).mT)  # (b, token, hidden)
        for block in self.blocks:
            x = block(x, condition, self.table)
        shift, scale = self.modulation(condition).chunk(2, -1)
        patches = self.to_patch(modulate(self.norm(x), shift, scale)).mT
        return F.pixel_shuffle(patches.unflatten(-1, (self.grid, -1)), self.patch_size)


class OriginalSketch(nn.Module):
    """Encoder, decoder and objective of the original, on square images.

    Args:
        channels: Channels of the image.
        resolution: Side of the image in pixels, a multiple of patch_size.
        latent_dim: Length of the latent vector.
        sign_dims: Number of its last dims that change sign under the mirror.
        patch_size: Side of the decoder's patches in pixels.
        hidden_size: Width of the decoder, a multiple of 64 (half of it has 32 norm groups).
        depth: Blocks of the decoder.
        num_heads: Attention heads of the decoder.

    Raises:
        ValueError: The resolution or the hidden size is not such a multiple.
    """

    def __init__(
        self,
        channels: int,
        resolution: int,
        latent_dim: int = 256,
        sign_dims: int = 4,
        patch_size: int = 4,
        hidden_size: int = 64,
        depth: int = 6,
        num_heads: int = 4,
    ):
        super().__init__()
        if resolution % patch_size:
            raise ValueError(f"resolution={resolution}: use a multiple of patch_size={patch_size}")
        if hidden_size % 64:
            raise ValueError(f"hidden_size={hidden_size}: use a multiple of 64")
        self.image_shape = (channels, resolution, resolution)
        self.group = MIRROR
        self.representation = Representation(MIRROR, a1=latent_dim - sign_dims, a2=sign_dims)
        self.encoder = Encoder(channels, latent_dim)
        self.decoder = Decoder(
            channels, resolution, latent_dim, patch_size, hidden_size, depth, num_heads
        )

    def encode(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d 1 1"]:
        """Encode images in [-1, 1] to their latents, vectors of any scale."""
        return self.encoder(image)

    def act(self, element: Element, latent: Float[Tensor, "b d 1 1"]) -> Float[Tensor, "b d 1 1"]:
        """Apply an element of {e, h}; the mirror h changes the sign of the last dims."""
        return self.representation.act(element, latent)

    def velocity(self, x_t: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        """Predict dx_t / dt at (x_t, t) given the latent."""
        return self.decoder(x_t, t, latent)

    @torch.no_grad()
    def decode(
        self,
        latent: Float[Tensor, "b d 1 1"],
        steps: int = 50,
        noise: Float[Tensor, "b c h w"] | None = None,
        seed: int | None = None,
        guidance: float = 1.0,
    ) -> Float[Tensor, "b c h w"]:
        """Sample p(image | latent) by Euler steps from t = 1 (noise) to 0.

        Args:
            latent: Latent from `encode`, acted on or not.
            steps: Number of steps; the original takes 50.
            noise: Start of the flow, standard normal.
            seed: Seed from which to draw the noise instead.
            guidance: Factor in v(0) + guidance * (v(latent) - v(0)); the original takes 2, 1 is
                none.
        """
        if (noise is None) == (seed is None):
            raise ValueError("decode needs either noise or seed, so that it can be repeated")
        if noise is None:
            generator = torch.Generator().manual_seed(seed)  # type: ignore[arg-type]
            shape = (len(latent), *self.image_shape)
            noise = torch.randn(shape, generator=generator).to(latent.device)
        x, null = noise, torch.zeros_like(latent)
        for step in range(steps):
            t = torch.full((len(x),), 1 - step / steps, device=x.device)
            velocity = self.velocity(x, t, latent)
            if guidance != 1:
                velocity = torch.lerp(self.velocity(x, t, null), velocity, guidance)
            x = x - velocity / steps
        return x

    def forward(
        self, image: Float[Tensor, "b c h w"], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the training loss (b,) and t (b,) of each example.

        Draws t, noise and dropped conditions per example, and one group element for the batch.
        """
        device = image.device
        t = torch.sigmoid(torch.randn(len(image), generator=generator, device=device))
        noise = torch.randn(image.shape, generator=generator, device=device)
        latent = drop_condition(self.encode(image), generator)
        coin = torch.randint(len(self.group), (), generator=generator, device=device)
        element = self.group[int(coin)]
        latent, image = self.act(element, latent), element.act_on_image(image)
        x_t = torch.lerp(image, noise, t[:, None, None, None])  # (1 - t) image + t noise
        error = self.velocity(x_t, t, latent) - (noise - image)  # velocity dx_t / dt
        return error.square().mean((1, 2, 3)), t


def build_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Build Adam with a constant learning rate; the original's is 2e-3."""
    return torch.optim.Adam(model.parameters(), lr=learning_rate)
