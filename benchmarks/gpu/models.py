"""The models that are measured, and a training step of each."""

import torch
from torch import Tensor, nn

from benchmarks.original_sketch import OriginalSketch, build_optimizer
from efae.config import Config
from efae.config.forms import with_overrides
from efae.evaluation.measures import to_float
from efae.model.autoencoder import Autoencoder
from efae.model.fine_tuning import FineTuning
from efae.model.objective import Objective, draw
from efae.model.precision import float32_arithmetic
from efae.presets import PRESETS
from efae.training.compilation import compiler_options, prepare
from efae.training.divergence import DivergenceGuard
from efae.training.loop import seed_of
from efae.training.micro_batches import Accumulation
from efae.training.monitoring.meter import Meter
from efae.training.optimizer import learning_rate_at, set_learning_rate
from efae.training.state import TrainState

_TINY = {
    "data.resolution": 32,
    "model.hidden_size": 64,
    "model.encoder_hidden_size": 64,
    "model.num_heads": 2,
    "model.depth": 2,
    "model.encoder_depth": 1,
}


def quickstart(tiny: bool) -> Config:
    """Return the preset for 32 px, or something of its form to try the code."""
    config = PRESETS["quickstart"][1]
    return with_overrides(config, _TINY) if tiny else config


def imagenet(tiny: bool) -> Config:
    """Return the preset for 256 px, or something of its form to try the code."""
    config = PRESETS["imagenet_256"][1]
    return with_overrides(config, _TINY) if tiny else config


def photographs(tiny: bool) -> Config:
    """Return the convolutional preset for 256 px, or something of its form to try the code."""
    config, small = PRESETS["photos_f8_b"][1], {"model.fine_hidden_size": 16}
    return with_overrides(config, _TINY | small | {"model.attention_depth": 1}) if tiny else config


def wake(model: Autoencoder) -> Autoencoder:
    """Replace zero weights, which would hide half of the network; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def make_pixels(count: int, config: Config, device: torch.device) -> Tensor:
    """Make images (count, c, h, w) on the host as a loader hands them over: uint8, pinned."""
    channels, (height, width) = config.data.channels, config.data.image_size
    pixels = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8)
    return (pixels.pin_memory() if device.type == "cuda" else pixels).permute(0, 3, 1, 2)


class TrainingStep:
    """A step of `efae.training.loop.train`, without loader and intervals; calling it takes one.

    Args:
        config: Configuration; its global batch is this process's.
        device: Device to train on.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.state = TrainState.create(config, device)
        wake(self.state.model).train()
        has_flow = self.state.model.has_flow
        objective = (Objective if has_flow else FineTuning)(self.state.model)
        size = config.training.micro_batch_size
        prepare(objective, config, device, one_pass=size == 0)
        self._accumulate = Accumulation(objective, self.state, config, size)
        self._generator, self.meter = torch.Generator(device), Meter(device)
        self._guard = DivergenceGuard(self.state.optimizer, self.state.scaler)
        count = config.training.global_batch_size
        self._pixels = make_pixels(count, config, device)
        self._keys = [str(i) for i in range(count)]

    def __call__(self) -> Tensor:
        """Take a step and return the losses."""
        state, config = self.state, self.config
        image = self._pixels.to(self.device, non_blocking=True)
        self._generator.manual_seed(seed_of(config.training.seed, state.step, 0))
        draws = draw(config, tuple(image.shape), self._generator)
        with float32_arithmetic(config.training.precision), compiler_options(config):
            loss, t = self._accumulate(image, draws)
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.optimizer.max_grad_norm)
        self._guard.watch(state.step, self._keys, loss, norm)
        rate = learning_rate_at(state.step, config.training.steps, config.optimizer)
        set_learning_rate(state.optimizer, rate)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.average.update(state.model, state.step)
        self.meter.add(loss, t)
        state.step += 1
        return loss


class SketchStep:
    """A step of the original's loop: fp32, eager, Adam, the loss read at every step.

    Args:
        batch: Number of images.
        device: Device to train on.
        sizes: Sizes of `OriginalSketch`.
    """

    def __init__(self, batch: int, device: torch.device, **sizes: int):
        torch.manual_seed(0)
        self._model = OriginalSketch(3, 32, **sizes).to(device)
        self._optimizer = build_optimizer(self._model, 2e-3)
        self._generator, self._device = torch.Generator(device), device
        self._pixels = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)

    def __call__(self) -> float:
        """Take a step and return the loss."""
        loss = self._model(to_float(self._pixels.to(self._device)), self._generator)[0].mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()
