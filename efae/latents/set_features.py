"""Features of images without Inception's weights: a small network, trained on labels or untrained.

Distances between such features rank sets of the same kind of images. They are not comparable with
published FIDs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn

from data_pipelines.loading.dataset import ImageSet
from data_pipelines.shards.index import LABEL
from efae.evaluation.measures import to_float
from efae.evaluation.set_distances import Features
from efae.model.pretrained import hash_tensors

FEATURES = 64
_GRID, _SPATIAL_CHANNELS = 4, 7
_LARGEST = 64
_STEPS, _BATCH = 400, 64
_MOST_IMAGES, _MOST_BYTES = 20_000, 2**30
_TESTED, _TESTED_AT_ONCE = 10, 256


class SmallNetwork(nn.Module):
    """Three convolutions, one linear layer of 64 features, and logits where there are classes.

    The initial weights depend on the shape and on torch's version alone. Untrained features are
    those of Naeem et al. 2020 (arXiv:2002.09797) in small: random convolutions.

    Args:
        channels: Number of colour channels of the images.
        classes: Names of the classes; none for a network that stays untrained.
    """

    def __init__(self, channels: int, classes: Sequence[str] = ()):
        super().__init__()
        self.classes = list(classes)
        self.protocol: dict[str, Any] = {"torch": torch.__version__}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.early = nn.Sequential(*_halve(channels, 16), *_halve(16, 32))
            self.late = nn.Sequential(
                *_halve(32, 64),
                nn.AdaptiveAvgPool2d(_GRID),
                *(nn.Flatten(), nn.Linear(64 * _GRID**2, FEATURES), nn.SiLU()),
            )
            self.label = nn.Linear(FEATURES, len(self.classes)) if classes else None
        self.eval().requires_grad_(False)

    @property
    def title(self) -> str:
        """Name of the network."""
        return "classifier" if self.classes else "untrained network"

    @property
    def description(self) -> str:
        """The features in words."""
        if not self.classes:
            return "features of an untrained convolutional network, not Inception's"
        return (
            f"features of a classifier of the reference's {len(self.classes)} classes"
            f" ({self.protocol['accuracy']:.1%} right on other images of it), not Inception's"
        )

    def forward(self, image: UInt8[Tensor, "b c h w"]) -> Features:
        """Return the features of images; large ones are shrunk by whole factors."""
        factor = max(1, min(image.shape[-2:]) // _LARGEST)
        early = self.early(F.avg_pool2d(to_float(image), factor))
        pooled = self.late(early)
        spatial = F.adaptive_avg_pool2d(early[:, :_SPATIAL_CHANNELS], _GRID).flatten(1)
        return Features(pooled, spatial, None if self.label is None else self.label(pooled))


def _halve(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.SiLU()


def build_network(reference: ImageSet, say: Callable[[str], None]) -> SmallNetwork:
    """Train a classifier of the reference on CPUs; where it has no labels, leave it untrained.

    A tenth of the images tests it only.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would round sums in another order
    try:
        network = _build_network(reference, say)
    finally:
        torch.set_num_threads(threads)
    network.protocol["weights_sha256"] = hash_tensors(network.state_dict())
    return network


def _build_network(reference: ImageSet, say: Callable[[str], None]) -> SmallNetwork:
    assert reference.image_shape is not None
    channels = reference.image_shape[0]
    if not _has_labels(reference):
        return SmallNetwork(channels)
    images, names = _read_labelled(reference)
    classes = sorted(set(names))
    if len(classes) < 2 or len(images) <= _TESTED:
        return SmallNetwork(channels)
    number = {name: place for place, name in enumerate(classes)}
    labels = torch.tensor([number[name] for name in names])
    say(f"training a classifier of {len(classes)} classes on {len(images)} images")
    network = SmallNetwork(channels, classes)
    tests = torch.arange(len(images)) % _TESTED == 0
    _train(network, images[~tests], labels[~tests])
    parts = torch.split(images[tests], _TESTED_AT_ONCE)
    found = torch.cat([network(part).logits.argmax(1) for part in parts])
    accuracy = float((found == labels[tests]).float().mean())
    network.protocol |= {"images": int((~tests).sum()), "steps": _STEPS, "accuracy": accuracy}
    return network


def _has_labels(images: ImageSet) -> bool:
    """Return whether every image has a class."""
    try:
        images.columns(LABEL)
    except ValueError:
        return False
    return True


def _read_labelled(reference: ImageSet) -> tuple[UInt8[Tensor, "n c h w"], list[str]]:
    """Read images in a shuffled order, up to a bound, and the names of their classes."""
    assert reference.image_shape is not None
    size = torch.Size(reference.image_shape).numel()
    count = min(_MOST_IMAGES, _MOST_BYTES // size, len(reference))
    images, names = list[Tensor](), list[str]()
    for batch in reference.loader(min(256, len(reference)), members=(LABEL,)):
        images.append(batch.image)
        names += [text.decode(errors="replace").strip() for text in batch.members[LABEL]]
        if len(names) >= count:
            break
    return torch.cat(images)[:count], names[:count]


def _train(network: SmallNetwork, images: Tensor, labels: Tensor) -> None:
    assert network.label is not None
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=_STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        chosen = torch.randint(len(images), (_BATCH,), generator=generator)
        F.cross_entropy(network(images[chosen]).logits, labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    network.requires_grad_(False)
