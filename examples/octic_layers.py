"""Octic layers in your own network, and a check that it commutes with all eight elements.

    python examples/octic_layers.py

The network maps images to images: patches become tokens, attention and MLPs mix them, and the
transpose of the first layer converts them back to pixels. Each layer commutes with flips and
quarter turns for any weights, so the network does too, before and after training. A convolutional
network does not.
"""

import argparse

import torch
from torch import Tensor, nn

from efae import D4
from efae.model.networks.linear_path import patchify, unpatchify
from efae.model.networks.transformer import Positions
from efae.model.octic import Block, Lift, normalize, patch_action


class Denoiser(nn.Module):
    """Image (b, 3, side, side) -> image; `width` is the features per token, eight per channel."""

    def __init__(self, side: int = 32, patch_size: int = 4, width: int = 64, depth: int = 2):
        super().__init__()
        self.patch_size, m = patch_size, width // len(D4)
        source, sign = patch_action(D4, patch_size, channels=3)
        self.patches = Lift(D4, source, sign, m, fan_in=source.shape[1])
        self.positions = Positions(D4, side // patch_size, side // patch_size, m)
        self.blocks = nn.Sequential(*(Block(D4, m, num_heads=2, mlp_ratio=3) for _ in range(depth)))
        self.output = Lift(D4, source, sign, m, fan_in=width)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        tokens = self.patches(patchify(image, self.patch_size)) + self.positions(*grid)
        tokens = normalize(self.blocks(tokens))
        return unpatchify(self.output.back(tokens), self.patch_size, height, width)


def draw_images(count: int, generator: torch.Generator) -> Tensor:
    """Draw smooth random images (count, 3, 32, 32)."""
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (32, 32), mode="bicubic")


def train(network: nn.Module, steps: int, generator: torch.Generator) -> None:
    """Train the network to remove noise."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        image = draw_images(32, generator)
        noisy = image + torch.randn(image.shape, generator=generator)
        loss = (network(noisy) - image).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def measure(network: nn.Module, image: Tensor) -> dict[str, float]:
    """Return the largest |network(g x) - g network(x)| for each element g."""
    output = network(image)
    return {
        g.name: float((network(g.act_on_image(image)) - g.act_on_image(output)).abs().max())
        for g in D4
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 3, padding=1)
    )
    differences = {}
    for name, network in {"octic": Denoiser(), "convolutions": convolutions}.items():
        train(network, steps, generator)
        differences[name] = measure(network, draw_images(4, generator))
    print(f"largest |network(g x) - g network(x)| after {steps} steps of training\n")
    print(f"{'g':16}{'octic':>14}{'convolutions':>14}")
    for g in D4:
        row = [differences[name][g.name] for name in ("octic", "convolutions")]
        print(f"{g.name:16}" + "".join(f"{value:14.1e}" for value in row))
    if max(differences["octic"].values()) > 1e-4:
        raise SystemExit("octic layers must commute with every element up to rounding")


if __name__ == "__main__":
    main()
