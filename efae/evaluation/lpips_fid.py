"""Measures by trained networks, LPIPS and FID, whose weights the user supplies.

Nothing is downloaded. A weight file is read as named tensors only (safetensors, or torch's format
with weights_only): it cannot run code.
"""

import copy
import hashlib
import pickle
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torchmetrics
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from efae.evaluation.measures import gather_json, to_uint8
from efae.evaluation.set_distances import Features

LPIPS_SMALLEST = 32
_SPATIAL_CHANNELS = 7
_LPIPS_FILE = (
    "LPIPS needs torchvision's AlexNet weights, alexnet-owt-7be5be79.pth: run"
    ' torchvision.models.alexnet(weights="DEFAULT") once on a machine with internet access, then'
    " take the file from ~/.cache/torch/hub/checkpoints"
)
_FID_FILE = (
    "FID needs torch-fidelity's Inception weights, weights-inception-2015-12-05-6726825d.pth, from"
    " release v0.2.0 of github.com/toshas/torch-fidelity"
)


class Lpips(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018, arXiv:1801.03924) by AlexNet.

    torchmetrics has the linear heads but takes AlexNet from torchvision, which is not a dependency:
    its five convolutions are built here and get their weights from the file.

    Args:
        weights: File of torchvision's AlexNet weights, .pth or .safetensors.

    Raises:
        ValueError: The file does not exist, or holds something else.
    """

    def __init__(self, weights: Path):
        super().__init__()
        tensors, self.digest = _read_tensors(weights, _LPIPS_FILE)
        relu = nn.ReLU()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 64, 11, 4, 2), relu),
                nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), relu),
                nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), relu),
                nn.Sequential(nn.Conv2d(384, 256, 3, 1, 1), relu),
                nn.Sequential(nn.Conv2d(256, 256, 3, 1, 1), relu),
            ]
        )
        convolutions = [m for m in self.stages.modules() if isinstance(m, nn.Conv2d)]
        for convolution, place in zip(convolutions, (0, 3, 6, 8, 10), strict=True):
            for kind, parameter in convolution.named_parameters():
                name = f"features.{place}.{kind}"
                if name not in tensors or tensors[name].shape != parameter.shape:
                    raise ValueError(
                        f"{weights}: no {name} of shape {tuple(parameter.shape)}; {_LPIPS_FILE}"
                    )
                parameter.data.copy_(tensors[name])
        heads = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
        learned: dict[str, Tensor] = torch.load(heads, map_location="cpu", weights_only=True)
        self.heads = nn.ParameterList(
            [learned[f"lin{i}.model.1.weight"] for i in range(len(self.stages))]
        )
        # Mean and standard deviation of ImageNet, for images in [-1, 1].
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.eval().requires_grad_(False)

    @property
    def protocol(self) -> dict[str, str]:
        """The network, its weights and its settings, for the record."""
        return {
            "network": "AlexNet, no resizing",
            "weights_sha256": self.digest,
            "heads": f"torchmetrics {version('torchmetrics')}",
        }

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for images that are too small for AlexNet."""
        if min(height, width) < LPIPS_SMALLEST:
            raise ValueError(
                f"images of {height} x {width} pixels: LPIPS needs"
                f" {LPIPS_SMALLEST} at least; evaluate without its weights"
            )

    def forward(
        self, image: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b"]:
        """Return the distance of each pair of images in [-1, 1], grey or RGB; 0 if equal."""
        x, y = ((a.expand(-1, 3, -1, -1) - self.shift) / self.scale for a in (image, other))
        distance = x.new_zeros(len(x))
        for stage, head in zip(self.stages, self.heads, strict=True):
            x, y = stage(x), stage(y)
            difference = (_unit(x) - _unit(y)).square()
            distance = distance + (head[0] * difference).sum(1).mean((1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


class Fid:
    """Frechet distance of reconstructions to their images (Heusel et al. 2017, arXiv:1706.08500).

    The metric of torchmetrics, with torch-fidelity's Inception network, antialiased resizing and
    covariances in float64. It falls with the number of images: compare at equal numbers only.

    The interpolated distance (iFID) is that of latents decoded half-way to their nearest neighbours
    (Xu et al. 2026, arXiv:2603.05630; see `diffusability.interpolate_with_nearest`). It tells more
    about the FID of a generator than the distance of reconstructions does.

    Args:
        metric: Metric over uint8 RGB images; see `load_fid`.
        digest: SHA-256 of its weights.
    """

    def __init__(self, metric: FrechetInceptionDistance, digest: str):
        self.metric = metric
        metric.orig_dtype = torch.float32  # a process without images sets none
        network = cast(Any, metric).inception
        self.interpolated = copy.deepcopy(metric, {id(network): network})  # one network for both
        self.digest = digest

    @property
    def protocol(self) -> dict[str, str]:
        """The network, its weights and its settings, for the record."""
        return {
            "network": "Inception of torch-fidelity, 2048 features, antialiased to 299 pixels",
            "weights_sha256": self.digest,
            "reference": "the same images, as the model saw them",
            "interpolated": "latents half-way on the arc to the one of greatest cosine similarity",
            "package": f"torchmetrics {version('torchmetrics')}",
        }

    def add(
        self, image: Float[Tensor, "b c h w"], reconstruction: Float[Tensor, "b c h w"]
    ) -> None:
        """Add images and reconstructions in [-1, 1], grey or RGB."""
        self.metric.update(_to_pixels(image), real=True)
        self.metric.update(_to_pixels(reconstruction), real=False)

    def add_interpolated(self, image: Float[Tensor, "b c h w"]) -> None:
        """Add decodes of interpolated latents, in [-1, 1], grey or RGB."""
        self.interpolated.update(_to_pixels(image), real=False)

    def compute(self) -> tuple[float, float | None]:
        """Return the distance over all images of all processes, and the interpolated one if added.

        Raises:
            ValueError: There are fewer than two images.
        """
        names = "real_features_num_samples", "fake_features_num_samples"
        real, between = (
            sum(gather_json(int(getattr(metric, name)), metric.device))
            for metric, name in zip((self.metric, self.interpolated), names, strict=True)
        )
        if real < 2:
            raise ValueError("FID needs two images at least")
        distance = float(self.metric.compute())
        if between < 2:
            return distance, None
        for name in ("sum", "cov_sum", "num_samples"):
            name = f"real_features_{name}"
            setattr(self.interpolated, name, getattr(self.metric, name))
        return distance, float(self.interpolated.compute())


def _to_pixels(image: Tensor) -> Tensor:
    return to_uint8(image).expand(-1, 3, -1, -1)


class Inception(nn.Module):
    """Features as guided-diffusion's evaluator takes them, for distances between sets.

    Images are resized as TensorFlow 1 did it, without antialiasing, so that published references
    fit. The 2,048 features are pooled from the last layer, the 7 x 17 x 17 spatial ones are the
    first channels of Mixed_6d's 1 x 1 branch, and logits have no bias.

    Args:
        network: Inception of torchmetrics; see `load_inception`.
        digest: SHA-256 of its weights.
    """

    title = "Inception"
    description = "Inception's features"

    def __init__(self, network: nn.Module, digest: str):
        super().__init__()
        self.network = network
        self.digest = digest
        self._spatial: Tensor | None = None
        branch = cast(Any, network).Mixed_6d.branch1x1
        branch.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :_SPATIAL_CHANNELS]

    @property
    def protocol(self) -> dict[str, Any]:
        """The network, its weights and its settings, for the record."""
        return {
            "network": "Inception of torch-fidelity, TensorFlow 1's resizing to 299 pixels",
            "weights_sha256": self.digest,
        }

    @torch.no_grad()
    def forward(self, image: UInt8[Tensor, "b c h w"]) -> Features:
        """Return the features of images, grey or RGB."""
        pooled = self.network(image.expand(-1, 3, -1, -1))
        assert self._spatial is not None
        # Channels last, as TensorFlow flattens them.
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)
        return Features(pooled, spatial, pooled @ cast(Any, self.network).fc.weight.T)


def load_fid(weights: Path, device: str = "cpu") -> Fid:
    """Build FID with Inception weights from a file.

    Raises:
        ValueError: A package or the file is missing, or the file holds something else.
    """
    metric, digest = _build_metric(weights, antialias=True)
    return Fid(metric.to(device), digest)


def load_inception(weights: Path, device: str = "cpu") -> Inception:
    """Build the features of sets with Inception weights from a file; raises as `load_fid` does."""
    metric, digest = _build_metric(weights, antialias=False)
    return Inception(metric.inception, digest).to(device)


def _build_metric(weights: Path, antialias: bool) -> tuple[FrechetInceptionDistance, str]:
    missing = [name for name in ("torch_fidelity", "torchvision") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"FID needs the packages torch-fidelity and torchvision (missing:"
            f" {', '.join(missing)}): pip install torch-fidelity, and the torchvision for"
            f" torch {torch.__version__}"
        )
    tensors, digest = _read_tensors(weights, _FID_FILE)
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles its weight file, so it gets a copy that holds only tensors.
        copy = Path(folder) / "inception.pth"
        torch.save(tensors, copy)
        try:
            metric = FrechetInceptionDistance(
                2048, feature_extractor_weights_path=str(copy), antialias=antialias
            )
        except RuntimeError as error:
            raise ValueError(f"{weights}: {str(error).splitlines()[0]}; {_FID_FILE}") from error
    return metric, digest


def _read_tensors(path: Path, needed: str) -> tuple[dict[str, Tensor], str]:
    """Read the tensors of a file by name, and its SHA-256."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {needed}")
    try:
        if path.suffix == ".safetensors":
            found: Any = cast(Any, safetensors.torch).load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a file of weights; {needed}") from error
    tensors = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path}: not a file of named tensors; {needed}")
    with path.open("rb") as file:
        return tensors, hashlib.file_digest(file, "sha256").hexdigest()
