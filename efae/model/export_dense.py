"""Export of an octic model to plain dense layers: the same function, symmetry no longer built in.

The dense twins are the same classes over the trivial group. Their weights are read off by feeding
the identity matrix through the octic layers, with a token flattened into one vector: by channel,
then slot, then coset. In this order heads are contiguous, norms are unchanged and adaLN gains stay
diagonal. Between the two Linears of an MLP the features are in the regular basis, where the
nonlinearity is pointwise: its changes of basis are folded into the Linears. The permutations of
`Resample` are folded into the adjacent layers likewise.
"""

import copy
import math
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from efae.config.forms import with_overrides
from efae.model.autoencoder import Autoencoder
from efae.model.networks import transformer, unet
from efae.model.networks.conditioning import ConditionedDecoder
from efae.model.networks.linear_path import LinearPath
from efae.model.octic.convolution import ConvolutionBlock
from efae.model.octic.layers import Block, Lift, Linear, Offset, modulation_sizes
from efae.model.octic.layout import (
    Layout,
    embed_invariant,
    from_regular,
    spread_gains,
    take_invariant,
    to_regular,
)
from efae.model.octic.token_grid import Resample

_SHIFTS = (2, 5)
"""Positions of the shifts in `modulation_sizes`."""


def to_dense(model: Autoencoder) -> Autoencoder:
    """Return a dense model that encodes and decodes as `model` does, up to rounding.

    It has the configuration of `model` at level `objective`, and the device, dtype and mode of
    `model`. It is computed in float64 and shares no memory with `model`. Each of its weights is
    free, so further training at level `objective` may break the symmetry. That training takes no
    rectangles under quarter turns: there, `data.resolution` becomes a square of the longer side,
    and `data.buckets` are dropped.

    Raises:
        ValueError: The model is not of level `exact`.
    """
    level = model.config.model.level
    if level != "exact":
        raise ValueError(
            f"model.level={level!r}: its layers are dense already; to_dense takes a model of level"
            " 'exact'"
        )
    exact = copy.deepcopy(model).double().cpu()
    with torch.no_grad():
        # Parameters that no rule below replaces are not octic and stay as they are.
        state = exact.state_dict() | _dense_weights(exact)
    dense = Autoencoder(with_overrides(model.config, _choose_settings(model)))
    dense = dense.to(next(model.parameters())).train(model.training)
    dense.load_state_dict(state)  # strict: every weight is set, each of the right shape
    return dense


def _choose_settings(model: Autoencoder) -> dict[str, Any]:
    """Return the settings in which the dense twin differs."""
    settings: dict[str, Any] = {"model.level": "objective"}
    data = model.config.data
    if model.group.swaps_sides and any(h != w for h, w in (data.image_size, *data.buckets)):
        # No weight depends on these sizes: only a unet's resolution may be a rectangle here.
        settings |= {"data.resolution": max(data.image_size), "data.buckets": ()}
    return settings


def _dense_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return those parameters of a module's dense twin, by name, that differ from its own."""
    weights = {
        f"{name}.{key}": weight
        for name, child in module.named_children()
        for key, weight in _dense_weights(child).items()
    }
    # A module that folds an operation into a child replaces the child's own weights.
    match module:
        case Linear():
            return weights | _of_linear(module)
        case Lift():
            return weights | _of_lift(module)
        case LinearPath():
            return weights | _of_linear_path(module)
        case Block():
            return weights | _of_block(module)
        case ConvolutionBlock():
            return weights | _of_convolution_block(module)
        case transformer.Encoder() | unet.Encoder():
            return weights | _of_merges(module.patches.layout, module.resample, module.merges)
        case transformer.Decoder():
            return weights | _of_condition(module) | _of_transformer(module)
        case unet.Decoder():
            return weights | _of_condition(module) | _of_unet(module)
        case _:
            return weights


def _flatten(layout: Layout, x: Tensor) -> Tensor:
    """Flatten tokens (slot, ..., coset * m) into vectors (..., m * slot * coset)."""
    return torch.unflatten(x, -1, (layout.cosets, -1)).movedim((0, -2), (-2, -1)).flatten(-3)


def _unflatten(layout: Layout, x: Tensor) -> Tensor:
    """Invert `_flatten`."""
    split = torch.unflatten(x, -1, (-1, layout.slots, layout.cosets))
    return split.movedim((-2, -1), (0, -2)).flatten(-2)


def _probe(
    layer: Callable[[Tensor], Tensor], inputs: int
) -> tuple[Float[Tensor, "inputs outputs"], Float[Tensor, "outputs"]]:
    """Return the matrix and bias of an affine map of row vectors."""
    bias = layer(torch.zeros(1, inputs, dtype=torch.float64))
    return layer(torch.eye(inputs, dtype=torch.float64)) - bias, bias[0]


def _of_linear(linear: Linear) -> dict[str, Tensor]:
    layout = linear.layout
    matrix, bias = _probe(
        lambda x: _flatten(layout, linear(_unflatten(layout, x))), linear.m_in * len(layout.group)
    )
    weights = {"coefficient": matrix[None]}
    return weights if linear.bias is None else weights | {"bias": bias}


def _of_lift(lift: Lift) -> dict[str, Tensor]:
    matrix, _ = _probe(lambda x: _flatten(lift.layout, lift(x)), lift.coefficient.shape[1])
    return {"coefficient": matrix.T}


def _of_linear_path(path: LinearPath) -> dict[str, Tensor]:
    inputs = path.free.shape[1]
    matrix, _ = _probe(lambda x: path(x.view(len(x), -1, path.side, path.side))[:, 0], inputs)
    return {"free": matrix.T}


def _of_block(block: Block) -> dict[str, Tensor]:
    layout = block.layout
    inward, _, outward = block.mlp
    weights = _of_regular_layers(layout, {"mlp.0": inward}, {"mlp.2": outward})
    if block.modulation is None:
        return weights
    modulation = _of_modulation(layout, block.modulation, block.sizes, _SHIFTS)
    return weights | {f"modulation.{name}": value for name, value in modulation.items()}


def _of_regular_layers(
    layout: Layout, inward: dict[str, nn.Module], outward: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """Fold the changes of basis around a pointwise nonlinearity into the Linears before and after.

    Args:
        layout: Layout of the tokens.
        inward: Linear that leads into the regular basis, by name.
        outward: Linear that leads out of it, by name.
    """
    weights: dict[str, Tensor] = {}
    for name, linear in (inward | outward).items():
        assert isinstance(linear, Linear)

        def apply(x: Tensor, linear: Linear = linear, into: bool = name in inward) -> Tensor:
            if into:
                hidden = to_regular(layout.fourier, linear(_unflatten(layout, x)))
                return hidden.movedim(0, -1).flatten(-2)
            hidden = torch.unflatten(x, -1, (-1, len(layout.group))).movedim(-1, 0)
            return _flatten(layout, linear(from_regular(layout.fourier, hidden, layout.slots)))

        matrix, bias = _probe(apply, linear.m_in * len(layout.group))
        weights |= {f"{name}.coefficient": matrix[None], f"{name}.bias": bias}
    return weights


def _of_modulation(
    layout: Layout, modulation: nn.Module, sizes: list[int], shifts: Collection[int]
) -> dict[str, Tensor]:
    """Expand the rows for invariants to rows for all the features that they scale or shift."""

    def spread(invariants: Tensor) -> Tensor:
        parts = [
            embed_invariant(layout, part) if i in shifts else spread_gains(layout, part)[:, :, 0]
            for i, part in enumerate(torch.split(invariants, sizes, -1))
        ]
        return torch.cat([_flatten(layout, part) for part in parts], -1)

    if isinstance(modulation, nn.Linear):
        matrix, bias = _probe(lambda x: spread(modulation(x)), modulation.in_features)
        return {"weight": matrix.T, "bias": bias}
    assert isinstance(modulation, Offset)
    return {"bias": spread(modulation.bias[None])[0]}


def _of_convolution_block(block: ConvolutionBlock) -> dict[str, Tensor]:
    layout = block.layout
    weights = _of_regular_layers(layout, {"inward": block.inward}, {"outward": block.outward})
    filters = block.depthwise.filter[:, block.depthwise.source]  # (m, element, k * k)
    weights["depthwise.filter"] = filters.flatten(0, 1)
    if block.modulation is None:
        return weights
    modulation = _of_modulation(layout, block.modulation, block.sizes, shifts=(2,))
    return weights | {f"modulation.{name}": value for name, value in modulation.items()}


def _of_merges(layout: Layout, resample: Resample, merges: nn.ModuleList) -> dict[str, Tensor]:
    def matrix(linear: Linear) -> Tensor:
        def merge(x: Tensor) -> Tensor:
            """Merge four tokens (batch, 4 * features), by row and column, into one."""
            tokens = _unflatten(layout, torch.unflatten(x, -1, (4, -1)))
            return _flatten(layout, linear(resample.merge(tokens, 2, 2)))[:, 0]

        return _probe(merge, linear.m_in * len(layout.group))[0]

    return {
        f"merges.{i}.coefficient": matrix(cast(Linear, linear))[None]
        for i, linear in enumerate(merges)
    }


def _of_condition(decoder: ConditionedDecoder) -> dict[str, Tensor]:
    layout = decoder.layout

    def condition(x: Tensor) -> Tensor:
        return decoder.pooled_condition(take_invariant(layout, _unflatten(layout, x)))

    pooled, bias = _probe(condition, len(decoder.pooled.coefficient) * len(layout.group))
    weights = {"pooled_condition.weight": pooled.T, "pooled_condition.bias": bias}
    if decoder.null_tokens is not None and decoder.null_pooled is not None:
        null_tokens = embed_invariant(layout, decoder.null_tokens)
        # take_invariant scales an embedded invariant by sqrt(cosets); the division cancels it.
        null_pooled = embed_invariant(layout, decoder.null_pooled) / math.sqrt(layout.cosets)
        weights["null_tokens"] = _flatten(layout, null_tokens)
        weights["null_pooled"] = _flatten(layout, null_pooled)
    assert isinstance(decoder, transformer.Decoder | unet.Decoder)
    last = _of_modulation(layout, decoder.modulation, decoder.sizes, shifts=(1,))
    return weights | {f"modulation.{name}": value for name, value in last.items()}


def _of_transformer(decoder: transformer.Decoder) -> dict[str, Tensor]:
    layout, ratio = decoder.layout, decoder.resample.ratio

    def split(latent: Tensor) -> Tensor:
        """Map latent cells (batch, dim) to their tokens (batch, ratio^2 * features)."""
        tokens = decoder.resample.split(decoder.latent(latent[:, None]), ratio, ratio)
        return _flatten(layout, tokens).flatten(1)

    latent, _ = _probe(split, decoder.latent.coefficient.shape[1])
    weights = {"latent.coefficient": latent.T}
    if decoder.shared_modulation is not None:
        sizes = modulation_sizes(layout.group, len(decoder.patches.coefficient))
        shared = _of_modulation(layout, decoder.shared_modulation, sizes, _SHIFTS)
        weights |= {f"shared_modulation.{name}": value for name, value in shared.items()}
    return weights


def _of_unet(decoder: unet.Decoder) -> dict[str, Tensor]:
    layout = decoder.layout
    weights = _of_merges(layout, decoder.resample, decoder.merges)
    for i, (linear, skip) in enumerate(zip(decoder.splits, decoder.skips, strict=True)):
        assert isinstance(linear, Linear)

        def split(x: Tensor, linear: Linear = linear) -> Tensor:
            """Split a token (batch, features) into four (batch, 4 * features)."""
            tokens = decoder.resample.split(linear(_unflatten(layout, x[:, None])), 2, 2)
            return _flatten(layout, tokens).flatten(1)

        matrix, bias = _probe(split, linear.m_in * len(layout.group))
        weights |= {f"splits.{i}.coefficient": matrix[None], f"splits.{i}.bias": bias}
        assert isinstance(skip, nn.Linear)
        gain = _of_modulation(layout, skip, [skip.out_features], ())
        weights |= {f"skips.{i}.{name}": value for name, value in gain.items()}
    pairs = zip(decoder.shared_modulations, decoder.shared_sizes, strict=True)
    for i, (shared, sizes) in enumerate(pairs):
        spread = _of_modulation(layout, shared, sizes, shifts=(2,))
        weights |= {f"shared_modulations.{i}.{name}": value for name, value in spread.items()}
    return weights
