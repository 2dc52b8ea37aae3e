"""Shards from a local folder in plain PyTorch: build, look, load, stop and resume.

    python examples/loader_in_torch.py                       # on generated images
    python examples/loader_in_torch.py --images FOLDER       # on your own

The same lines work for s3:// and gs:// addresses, and for WebDataset tars that exist already:
`python -m data_pipelines.index_shards URI` makes these a shard set.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards


def draw_images(folder: Path, count: int = 200) -> None:
    """PNG files of random gradients."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 48)
    for number in range(count):
        down, right = generator.random((2, 3))
        pixels = 127 * (np.outer(ramp, down)[:, None] + np.outer(ramp, right)[None])
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, help="folder of images; left out, some are generated"
    )
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = options.images or Path(folder) / "images"
        if options.images is None:
            draw_images(images)
        build_shards(f"folder:{images}", f"{folder}/shards", resolution=32)
        train(ShardDataset.open(f"{folder}/shards"), options.steps)


def train(dataset: ShardDataset, steps: int) -> None:
    """Train a small autoencoder, stop in the middle, and go on at the exact next image."""
    sample = dataset[0]
    print(f"{len(dataset)} images; {sample.key!r} is {tuple(sample.image.shape)}")
    print(f"dataset.show() is a picture of {dataset.show().size} pixels")

    # "carry": endless, every batch full. Pass rank and world_size to share the set.
    loader = dataset.loader(16, seed=0, tail="carry", channels=3)
    model = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.GELU(), nn.ConvTranspose2d(16, 3, 4, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = iter(loader)
    for step in range(1, steps + 1):
        image = next(batches).image / 127.5 - 1  # uint8 (b, c, h, w) to [-1, 1]
        loss = (model(image) - image).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:3}  loss {loss.item():.4f}")

    position = loader.state_dict()  # belongs into a checkpoint, beside model and optimizer
    expected = next(batches).key
    resumed = dataset.loader(16, seed=0, tail="carry", channels=3)
    resumed.load_state_dict(position)
    if next(iter(resumed)).key != expected:
        raise SystemExit("a resumed loader must go on at the exact next image")
    print(f"resumed at {position}")


if __name__ == "__main__":
    main()
