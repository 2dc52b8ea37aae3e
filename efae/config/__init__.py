"""All settings of a run in one frozen, typed tree.

Ray Tune and the tests change it through `forms.with_overrides`, the command line through ``tyro``.
The resolved tree is stored as JSON with every run, checkpoint and model version. Units are in the
names (``_seconds``, ``_bytes``); sizes are in pixels unless stated otherwise.
"""

from efae.config.generator import AnyConfig, GeneratorConfig, LatentsConfig, NetworkConfig
from efae.config.model import ModelConfig, RepresentationConfig, StartConfig
from efae.config.objective import FlowConfig, LossConfig
from efae.config.run import OptimizerConfig, RayConfig, TrackingConfig, TrainingConfig
from efae.config.tokenizer import Config, DataConfig

__all__ = [
    "AnyConfig",
    "Config",
    "DataConfig",
    "FlowConfig",
    "GeneratorConfig",
    "LatentsConfig",
    "LossConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "RayConfig",
    "RepresentationConfig",
    "StartConfig",
    "TrackingConfig",
    "TrainingConfig",
]
