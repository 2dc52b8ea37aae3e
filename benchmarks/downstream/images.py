"""Fashion-MNIST as tensors and as shard sets, upright or in any pose."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from webdataset.writer import TarWriter

from data_pipelines import ShardDataset
from data_pipelines.build_shards import build_shards
from data_pipelines.images.codec import encode_png
from data_pipelines.index_shards import make_index
from data_pipelines.shards.index import INDEX_NAME, write_index
from efae.symmetry import D4
from efae.symmetry.group import act_on_grid

Pose = Literal["upright", "any"]
CLASSES = 10


def build_images(images: Path, folder: Path) -> None:
    """Build both parts as shard sets of 32 px, folder/train and folder/test."""
    for part, name in (("train", "train"), ("test", "t10k")):
        if (folder / part / INDEX_NAME).exists():
            continue
        found = sorted(images.glob(f"{name}-images*idx3-ubyte*"))
        if not found:
            raise ValueError(f"--images {images}: holds no {name}-images-idx3-ubyte.gz")
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
        everything = turn(everything, 7)
    return everything, torch.tensor(labels)


def turn(images: Tensor, seed: int) -> Tensor:
    """Act on each image by an element of the group, drawn for it."""
    generator = torch.Generator().manual_seed(seed)
    return act_on_grid(D4, torch.randint(len(D4), (len(images),), generator=generator), images)


def write_images(
    folder: Path, images: Tensor, labels: Tensor, samples_per_shard: int, views: bool = False
) -> None:
    """Write a shard set of uint8 (n, 1, h, w); `views` adds the other seven, in separate shards.

    Shards are named ELEMENT-NUMBER.tar. The class of a sample is `tell_class` of both.
    """
    folder.mkdir(parents=True)
    for element in D4 if views else [D4.identity]:
        turned = element.act_on_image(images)[:, 0].numpy()
        for number, first in enumerate(range(0, len(images), samples_per_shard)):
            path = folder / f"{element}-{number:03}.tar"
            with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
                for row in range(first, min(first + samples_per_shard, len(images))):
                    told = str(tell_class(int(labels[row]), D4.index(element))).encode()
                    sample = {"png": encode_png(turned[row]), "cls": told}
                    writer.write({"__key__": f"{row:06}-{element}", **sample})
    write_index(str(folder), make_index(str(folder)))


def tell_class(label: int, element: int = 0) -> int:
    """Return the class that tells a generator the label and the element that acted."""
    return len(D4) * label + element
