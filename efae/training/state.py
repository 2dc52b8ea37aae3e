"""The state that the next step depends on, and its conversion to and from a checkpoint.

Randomness needs no state: every draw is a function of (seed, step, rank).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efae.checkpoints.checkpoint import Checkpoint
from efae.config import AnyConfig, GeneratorConfig
from efae.generation.network import Generator
from efae.model.autoencoder import Autoencoder
from efae.training.ema import MovingAverage
from efae.training.optimizer import build_optimizer


@dataclass
class TrainState:
    """The state of training.

    Attributes:
        model: Model of the configuration, `Autoencoder` or `Generator`, on the device of training.
        average: Moving average of its weights, on the same device.
        optimizer: Optimizer of all parameters of `model`.
        scaler: Gradient scaler; disabled unless training.precision is fp16.
        step: Number of optimizer updates done.
    """

    model: Any
    average: MovingAverage
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    step: int = 0

    @classmethod
    def create(cls, config: AnyConfig, device: torch.device) -> "TrainState":
        """Create the state before the first step; the weights are a function of training.seed.

        Raises:
            ValueError: The sizes of the model do not fit together.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            model = build_model(config)
        model.to(device)
        return cls(
            model=model,
            average=MovingAverage(model, config.optimizer.ema_decay),
            optimizer=build_optimizer(model, config.optimizer),
            scaler=torch.amp.GradScaler(device.type, enabled=config.training.precision == "fp16"),
        )

    def snapshot(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Copy all tensors to the host, by file, with the remaining state as JSON values.

        Returns:
            The tensors as {"model" | "ema" | "optimizer": {name: tensor}}, where an entry of the
            optimizer is named PARAMETER.KEY, KEY being "exp_avg", "exp_avg_sq" or "step"; and
            {"step": int, "scaler": dict}.
        """
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        # A pretrained batch normalisation has statistics, which no step changes.
        buffers = {n: b for n, b in self.model.state_dict().items() if n not in parameters}
        states = self.optimizer.state
        optimizer = {
            f"{name}.{key}": value
            for name, parameter in zip(parameters, self.model.parameters(), strict=True)
            for key, value in states[parameter].items()
        }
        tensors = {
            "model": parameters | buffers,
            "ema": self.average.weights | buffers,
            "optimizer": optimizer,
        }
        host = {
            kind: {name: _copy_to_host(tensor) for name, tensor in part.items()}
            for kind, part in tensors.items()
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # once, for all copies
        return host, {"step": self.step, "scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state that a checkpoint holds; its tensors are copied.

        Raises:
            RuntimeError: The weights belong to another architecture.
            KeyError: An averaged weight is missing, or "step" or "scaler" in the metadata.
        """
        self.model.load_state_dict(checkpoint.model)
        self.average.load(checkpoint.ema)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True)
                for key, value in _strip_prefix(checkpoint.optimizer, f"{name}.").items()
            }
        if checkpoint.metadata["scaler"]:  # written at fp16
            self.scaler.load_state_dict(checkpoint.metadata["scaler"])
        self.step = checkpoint.metadata["step"]


def build_model(config: AnyConfig) -> Autoencoder | Generator:
    """Build the model of a configuration, with the parts that it does not train frozen.

    Raises:
        ValueError: The sizes of the model do not fit together, or its latents cannot be trained to
            rotate by any angle.
    """
    if isinstance(config, GeneratorConfig):
        return Generator(config)
    model = Autoencoder(config)
    if config.loss.rotation_probability:
        model.bottleneck.check_planes()
    trained = "decoder" if config.freezes_latent else config.start.train
    for name, parameter in model.named_parameters():
        if trained != "both" and not name.startswith(f"{trained}."):
            parameter.requires_grad_(False)
    return model


def _strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }


def _copy_to_host(tensor: Tensor) -> Tensor:
    """Copy to the host; from a GPU to pinned memory, which PyTorch keeps for the next snapshot."""
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
