"""Image metrics: a classifier of label and view, and distances between its features.

The classifier learns from images in all eight views and predicts the view: features that did not
distinguish a rotated shoe from an upright one could not reveal a sampler that leaks rotated ones.
"""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efae.evaluation.measures import to_float
from efae.symmetry import D4
from efae.symmetry.group import act_on_grid
from efae.training.loop import seed_of

LABELS, FEATURES = 10, 64
_UPRIGHT = [D4.index(D4[name]) for name in ("identity", "flip_h")]
_AT_ONCE = 256


class Classifier(nn.Module):
    """Network: uint8 (b, 1, 32, 32) -> 64 features -> logits of label and view, linearly."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.SiLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(4, 64), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(64 * 16, FEATURES), nn.SiLU()),
        )
        self.label = nn.Linear(FEATURES, LABELS)
        self.view = nn.Linear(FEATURES, len(D4))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features and the logits of label and view."""
        features = self.body(to_float(images))
        return features, self.label(features), self.view(features)


@torch.no_grad()
def read_features(model: Classifier, images: Tensor) -> Tensor:
    """Return the features of images, float32 (n, 64)."""
    return torch.cat([model(part)[0] for part in images.split(_AT_ONCE)])


@torch.no_grad()
def share_upright(model: Classifier, images: Tensor) -> float:
    """Return the share of images classified as the identity or the left-right mirror."""
    views = torch.cat([model(part)[2].argmax(1) for part in images.split(_AT_ONCE)])
    return float(torch.isin(views, torch.tensor(_UPRIGHT)).float().mean())


def train_classifier(path: Path, images: Tensor, labels: Tensor, steps: int) -> Classifier:
    """Train on random views of upright images, or load the trained classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier()
    if path.exists():
        model.load_state_dict(safetensors.torch.load_file(path))
        return model.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator()
    for step in range(steps):
        generator.manual_seed(seed_of(0, step, 2))
        chosen = torch.randint(len(images), (128,), generator=generator)
        view = torch.randint(len(D4), (128,), generator=generator)
        _, label_logits, view_logits = model(act_on_grid(D4, view, images[chosen]))
        loss = F.cross_entropy(label_logits, labels[chosen]) + F.cross_entropy(view_logits, view)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    unfinished = path.with_suffix(".part")
    safetensors.torch.save_file(model.state_dict(), unfinished)
    unfinished.rename(path)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def score_classifier(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracy of the label, on held-out images and random views, and of the view."""
    generator = torch.Generator().manual_seed(0)
    view = torch.randint(len(D4), (len(images),), generator=generator)
    turned = act_on_grid(D4, view, images)
    found = [model(part) for part in turned.split(_AT_ONCE)]
    upright = torch.cat([model(part)[1].argmax(1) for part in images.split(_AT_ONCE)])
    return {
        "label_accuracy": float((upright == labels).float().mean()),
        "label_accuracy_any_view": float(
            (torch.cat([logits.argmax(1) for _, logits, _ in found]) == labels).float().mean()
        ),
        "view_accuracy": float(
            (torch.cat([logits.argmax(1) for _, _, logits in found]) == view).float().mean()
        ),
    }


def nearest(features: Tensor, others: Tensor) -> Tensor:
    """Return the distance of each of (n, d) to the nearest of (m, d)."""
    return torch.cat([torch.cdist(part, others).amin(1) for part in features.split(64)])
