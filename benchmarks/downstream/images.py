"""Fashion-MNIST as tensors and as shard sets, upright or transformed."""

from pathlib import Path

import torch
from torch import Tensor
from webdataset.writer import TarWriter

from benchmarks.downstream.settings import Pose, Settings
from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import make_index
from data_pipelines.shards.index import INDEX_NAME, write_index
from efae.symmetry import D4
from efae.symmetry.group import act_on_grid


def build_images(settings: Settings, folder: Path) -> None:
    """Build both parts as shard sets of 32 px, folder/train and folder/test."""
    for part, name in (("train", "train"), ("test", "t10k")):
        found = sorted(Path(settings.images).glob(f"{name}-images*idx3-ubyte*"))
        if not found:
            raise ValueError(f"--images {settings.images}: holds no {name}-images-idx3-ubyte.gz")
        build_shards(f"idx:{found[0]}", str(folder / part), resolution=32)


def read_images(uri: Path, pose: Pose) -> tuple[Tensor, Tensor]:
    """Read images uint8 (n, 1, 32, 32) and labels (n,), in the shards' order, which is hashed."""
    loader = ShardDataset.open(str(uri)).loader(
        500, shuffle=False, members=("cls",), decode_threads=1
    )
    images: list[Tensor] = []
    labels: list[int] = []
    for batch in loader:
        images.append(batch.image)
        labels += [int(text) for text in batch.members["cls"]]
    everything = torch.cat(images).contiguous()
    if pose == "any":
        chosen = torch.randint(len(D4), (len(labels),), generator=torch.Generator().manual_seed(7))
        everything = act_on_grid(D4, chosen, everything)
    return everything, torch.tensor(labels)


def write_images(folder: Path, images: Tensor, samples_per_shard: int, views: bool = False) -> None:
    """Write a shard set of uint8 (n, 1, h, w); `views` adds the other seven, in separate shards.

    Shards are named ELEMENT-NUMBER.tar, and every sample stores its element.
    """
    if (folder / INDEX_NAME).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for element in D4 if views else [D4.identity]:
        turned = element.act_on_image(images)[:, 0].numpy()
        for number, first in enumerate(range(0, len(images), samples_per_shard)):
            path = folder / f"{element}-{number:03}.tar"
            with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
                for row in range(first, min(first + samples_per_shard, len(images))):
                    sample = {"png": encode_png(turned[row]), "element": element.name.encode()}
                    writer.write({"__key__": f"{row:06}-{element}", **sample})
    write_index(str(folder), make_index(str(folder)))
