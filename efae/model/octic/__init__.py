"""Octic layers, for networks of your own: `Lift` tokens from pixels, map and attend, lift back."""

from efae.model.octic.layers import (
    Attention,
    Block,
    Lift,
    Linear,
    Nonlinearity,
    latent_action,
    normalize,
    patch_action,
)

__all__ = [
    "Attention",
    "Block",
    "Lift",
    "Linear",
    "Nonlinearity",
    "latent_action",
    "normalize",
    "patch_action",
]
