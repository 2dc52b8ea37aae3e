"""Settings of a comparison."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Pose = Literal["upright", "any"]
ELEMENTS = 8


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of one comparison share."""

    images: str
    """Folder with the idx files of Fashion-MNIST."""
    sizes: tuple[int, ...] = (1000, 8000)
    """Numbers of images that the flow trains on; a shard holds their greatest common divisor."""
    tokenizer_seconds: float = 120.0
    """CPU seconds of training of each tokenizer, on an idle core."""
    classifier_steps: int = 1500
    """Training steps of the classifier that provides the features."""
    flow_steps: int = 2500
    """Training steps of every flow."""
    batch_size: int = 64
    """Batch size of the flow and of the tokenizers."""
    learning_rate: float = 1.2e-2
    """Peak learning rate of the flow in every arm: the best of 2e-3, 6e-3 and 1.2e-2 on held-out
    latents of "exact, as stored"."""
    hidden_size: int = 64
    """Width of the flow's transformer."""
    depth: int = 3
    """Blocks of the flow's transformer."""
    sampler_steps: int = 12
    """Heun steps per latent."""
    samples: int = 2048
    """Images in every set that is compared."""

    @property
    def samples_per_shard(self) -> int:
        """Samples per shard: each size is a whole number of shards."""
        return math.gcd(*self.sizes)


def claim_folder(folder: Path, settings: Settings) -> None:
    """Store the settings beside the results that depend on them.

    Raises:
        ValueError: The folder holds results of other settings.
    """
    path = folder / "settings.json"
    mine = json.loads(json.dumps(asdict(settings)))
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = {k: v for k, v in mine.items() if theirs.get(k) != v and k != "images"}
        if changed:
            raise ValueError(
                f"{folder} holds runs with other settings than {changed}: choose another --folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1) + "\n")
