"""An equivariant flow autoencoder in a plain PyTorch loop: no Ray, no MLflow, no servers.

python examples/own_training_loop.py                      # on generated images
python examples/own_training_loop.py --data FOLDER        # on shards of data_pipelines
python examples/own_training_loop.py --output my-model    # efae.load("my-model") reads it
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import efae
from data_pipelines import ShardDataset
from efae.config import DataConfig, ModelConfig

SIDE, BATCH = 32, 32


def draw_images() -> Iterator[Tensor]:
    """Batches of coloured rectangles, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    while True:
        colours = torch.rand(BATCH, 2, 3, 1, 1, generator=generator) * 2 - 1
        top, left = torch.randint(0, 20, (2, BATCH, 1, 1, 1), generator=generator)
        height, width = torch.randint(4, 20, (2, BATCH, 1, 1, 1), generator=generator)
        inside = (rows >= top) & (rows < top + height) & (columns >= left)
        inside &= columns < left + width
        yield torch.where(inside, colours[:, 0], colours[:, 1])


def read_images(folder: str) -> Iterator[Tensor]:
    """Batches of a shard set, epoch after epoch, in [-1, 1]."""
    loader = ShardDataset.open(folder).loader(BATCH, tail="carry", channels=3, resolution=SIDE)
    return (batch.image / 127.5 - 1 for batch in loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of a shard set; left out, images are generated")
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    parser.add_argument("--output", help="folder to save the model to")
    options = parser.parse_args()

    config = efae.Config(
        data=DataConfig(resolution=SIDE),
        model=ModelConfig(hidden_size=64, encoder_hidden_size=64, depth=2, patch_size=8),
    )
    torch.manual_seed(0)
    model = efae.Autoencoder(config)
    objective = efae.Objective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    images = read_images(options.data) if options.data else draw_images()

    model.train()
    for step in range(1, options.steps + 1):
        loss, _ = objective(next(images), generator)  # one loss per image
        loss.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step:4}  loss {loss.mean().item():.4f}")

    model.eval()
    image = next(images)
    with torch.no_grad():
        latent = model.encode(image)
    error = (model.decode(latent, seed=0) - image).square().mean()
    print(f"reconstruction: {float(10 * torch.log10(4 / error)):.1f} dB PSNR")

    noise = torch.randn(image.shape, generator=generator)
    decoded = model.decode(latent, noise=noise)
    for g in efae.D4:
        turned = model.decode(model.act(g, latent), noise=g.act_on_image(noise))
        difference = float((turned - g.act_on_image(decoded)).abs().max())
        print(f"{g.name:16} |decode(act(g, z); g noise) - g decode(z; noise)| <= {difference:.0e}")
    if options.output:
        model.save_pretrained(options.output)
        print(f'saved: efae.load("{options.output}")')


if __name__ == "__main__":
    main()
